"""Plain updates at half the size: bfloat16 on the wire, float32 on either side of it.

A float32 keeps its 8 bits of exponent and 8 of its 24 of significance, rounded to nearest, ties to even: on the deltas
of a training the relative error is 0.2 %, without bias.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .tensors import Layout, map_file, write_chunks

PIECE = 1 << 20  # elements converted at a time

Array = np.ndarray[Any, Any]


def to_bf16(values: Array) -> Array:
    """The bits of float32 values as bfloat16, in uint16; NaN stays NaN, what rounds beyond the largest is infinite."""
    bits = np.ascontiguousarray(values, "<f4").view("<u4")
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype("<u2")


def from_bf16(bits: Array) -> Array:
    """bfloat16 bits in uint16 as the float32 values that they are exactly."""
    return (bits.astype("<u4") << 16).view("<f4")


def narrow(update: Path, model: Layout, to: Path) -> None:
    """Write a plain update to a model as it travels at `bf16`. update: a checked file of `Layout.update()`."""
    arrays, wire = map_file(update, model.update()), model.update("bf16")

    def pieces() -> Iterator[memoryview]:
        for t in wire.tensors:
            flat = arrays[t.name].reshape(-1)
            for start in range(0, len(flat), PIECE):
                piece = flat[start : start + PIECE]
                yield np.ascontiguousarray(to_bf16(piece) if t.dtype == "BF16" else piece).view(np.uint8).data

    with to.open("wb") as file:
        write_chunks(file, wire, pieces())


def pack_ring(words: Array, ring_bits: int) -> Array:
    """Ring words, (m,) uint32, as they travel: the lowest 16, 24 or 32 bits of each, (bytes,) uint8."""
    if ring_bits == 24:
        return words.view(np.uint8).reshape(-1, 4)[:, :3].reshape(-1)
    return words.astype(np.uint16 if ring_bits == 16 else np.uint32, copy=False).view(np.uint8)


def unpack_24(packed: Array, out: Array) -> Array:
    """Words of three bytes, (3 m,) uint8, as the first m of `out`, uint32; what was written is returned."""
    words = out[: len(packed) // 3]
    pairs = words.view(np.uint8).reshape(-1, 4)
    pairs[:, :3] = packed.reshape(-1, 3)
    pairs[:, 3] = 0
    return words
