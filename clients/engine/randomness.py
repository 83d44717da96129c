"""Random choices that can be made again: a seed for each purpose, and global generators that are put back."""

from __future__ import annotations

import random
from collections.abc import Generator
from contextlib import contextmanager

import numpy as np
import torch

from ...protocol.encoding import canonical_json, sha256_hex


def derive_seed(*parts: int | str) -> int:
    """63 bits that belong to these parts and to no others; the same on every machine."""
    return int(sha256_hex(canonical_json(list(parts)))[:16], 16) >> 1


@contextmanager
def seeded(seed: int, device: torch.device) -> Generator[None]:
    """Seed torch, numpy's and Python's global generators inside the block and put them back after it.

    Dropout and augmentation draw from these. They belong to the process: two threads cannot train side by side.
    """
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        # Not torch.manual_seed: it notes a stack trace for every kind of device there might be, 1 ms each time.
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % (1 << 32))
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
