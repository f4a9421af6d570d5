from torch.optim import AdamW as FusedAdamW

__all__ = ["FusedAdamW"]
