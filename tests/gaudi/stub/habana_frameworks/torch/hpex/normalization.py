import torch


class FusedClipNorm:
    def __init__(self, parameters, max_norm):
        self.max_norm = max_norm

    def clip_norm(self, parameters):
        return torch.nn.utils.clip_grad_norm_(parameters, self.max_norm).reshape(1)
