import torch


def get_rng_state():
    return torch.zeros(1, dtype=torch.uint8)


def set_rng_state(state):
    pass


def manual_seed_all(seed):
    pass
