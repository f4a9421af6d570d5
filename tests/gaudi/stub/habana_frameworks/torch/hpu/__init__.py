from habana_frameworks.torch.hpu import random

__all__ = ["random"]
wrapped_in_graphs = []


def wrap_in_hpu_graph(model, **options):
    wrapped_in_graphs.append(model)
    return model


class ModuleCacher:
    def __call__(self, model, inplace):
        wrapped_in_graphs.append(model)


def memory_stats(device=None):
    return {"InUse": 0, "MaxInUse": 0, "Limit": 1}


def get_device_name():
    return "GAUDI2"


def enable_dynamic_shape():
    pass


def disable_dynamic_shape():
    pass


def is_initialized():
    return True


def is_autocast_hpu_enabled():
    return False


def get_autocast_hpu_dtype():
    return None
