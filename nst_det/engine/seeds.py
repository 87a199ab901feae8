"""Randomness that depends on what is done, not on what was done before.

Every random draw in training is made under a seed derived from (run seed, purpose, step).  So a run that resumes at
step k draws what the undisturbed run drew there, with no random state to save; and all methods of one seed see the same
batches, augmentation and head initialization, so that they are compared in pairs.
"""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np


def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed; the same parts give the same seed on every machine."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def seed_everything(*parts: int | str) -> None:
    """Seed Python, NumPy and torch (all devices) from ``derive_seed(*parts)``."""
    # it takes seconds to import, and seeds alone don't need it
    import torch

    seed = derive_seed(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def seeded(*parts: int | str) -> Iterator[None]:
    """Run a block under ``seed_everything(*parts)`` and put the former random states back after it."""
    import torch

    python_state, numpy_state = random.getstate(), np.random.get_state()
    # a loader's worker may not ask for GPUs
    with torch.random.fork_rng(devices=range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)):
        seed_everything(*parts)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
