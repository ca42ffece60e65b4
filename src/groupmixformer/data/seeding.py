"""Random numbers as a function of the position in a run, so that a resumed run continues as if it had not stopped."""

import random

import numpy as np
import torch


def seed_all(*keys: int) -> None:
    """Seed the generators of Python, NumPy and PyTorch's CPU from `keys`, such as a seed, an epoch and an image's index."""
    state = np.random.SeedSequence(keys).generate_state(3)
    random.seed(int(state[0]))
    np.random.seed(int(state[1]))  # noqa: NPY002 - timm draws from the global generator
    torch.default_generator.manual_seed(int(state[2]))  # without the accelerators, which take 90 times as long
