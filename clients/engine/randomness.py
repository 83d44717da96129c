"""Random choices: those that can be made again, from a seed for each purpose, and those that nobody may foresee.

P = pairs of numbers
"""

from __future__ import annotations

import math
import random
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...privacy.masks import Keystream as AesCtr
from ...protocol.encoding import canonical_json, sha256_hex

AES_BYTES = 1 << 18  # what `AesCtr.into` takes at a time


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
        try:
            seed_all(seed, device)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def seed_all(seed: int, device: torch.device) -> None:
    """Seed the global generators: for one job after the other inside `seeded`, which puts them back."""
    # Not torch.manual_seed: it notes a stack trace for every kind of device there might be, 1 ms each time.
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % (1 << 32))


class Keystream:
    """Numbers that nobody can tell who lacks the key: AES-256-CTR, as masks have it; the same for the same key.

    `number` names one of 2^64 streams of a key, which never overlap.
    """

    def __init__(self, key: bytes, number: int = 0) -> None:
        self._stream = AesCtr(key, counter=number << 64)

    def words(self, count: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
        """(count,) uniform in [0, 2^64): the next of the stream."""
        found = bytearray(8 * count)
        view = memoryview(found)
        for first in range(0, len(found), AES_BYTES):
            self._stream.into(view[first : first + AES_BYTES])
        return np.frombuffer(found, "<u8")

    def normals(self, count: int) -> Tensor:
        """(count,) float64 on the CPU, independent standard normals: Box and Muller 1958, doi:10.1214/aoms/1177706645.

        The uniform that gives the radius has 64 bits, so nothing is cut off below 9.4 standard deviations.
        """
        pairs = -(-count // 2)
        uniform_2P = torch.from_numpy((self.words(2 * pairs) + 0.5) * 2.0**-64)
        radius_P = uniform_2P[:pairs].log_().mul_(-2).sqrt_()
        angle_P = uniform_2P[pairs:].mul_(2 * math.pi)
        return torch.cat([radius_P * angle_P.cos(), radius_P * angle_P.sin()])[:count]
