"""Masks: AES-256-CTR keystreams, added to a vector in pieces that stay in the processor's cache.

A key is used for one vector of one round and never again, so the counter starts at 0. Element i of a mask is the
little-endian number at byte i * itemsize of the keystream: a mask can be taken up anywhere, and how a vector is cut
into pieces does not change it.
Source of the mode: NIST SP 800-38A.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from ..protocol.threads import in_order

CHUNK = 1 << 16  # elements; 256 KiB of a 32-bit vector, which stays in a second-level cache
RING = np.dtype("<u4")
AUX = np.dtype("<u8")
_PIECE_BYTES = CHUNK * RING.itemsize
_ZEROS = bytes(_PIECE_BYTES)
_BLOCK_BYTES = 16  # of AES: the counter counts these

Array = np.ndarray[Any, Any]


class Keystream:
    """AES-256-CTR keystream of one key from a byte on; `into` fills a buffer and goes on from there."""

    def __init__(self, key: bytes, *, start: int = 0, counter: int = 0) -> None:
        self._counter = counter
        self._cipher = Cipher(algorithms.AES256(key), modes.CTR(bytes(_BLOCK_BYTES))).encryptor()
        self.seek(start)

    def seek(self, start: int) -> None:
        """Go on from this byte of the keystream."""
        blocks, inside = divmod(start, _BLOCK_BYTES)
        self._cipher.reset_nonce(((self._counter + blocks) % (1 << 128)).to_bytes(_BLOCK_BYTES, "big"))
        if inside:
            self._cipher.update(_ZEROS[:inside])

    def into(self, buffer: memoryview) -> None:
        """Overwrite a buffer of at most 256 KiB with the next bytes of the keystream; nothing is allocated."""
        self._cipher.update_into(memoryview(_ZEROS)[: len(buffer)], buffer)


class Masks:
    """The sum of several masks, some of them negative, as one stream that is added to a vector piece by piece.

    keys: pairs (key of 32 bytes, True to add or False to subtract). start: the first element.
    """

    def __init__(self, keys: Iterable[tuple[bytes, bool]], dtype: np.dtype[Any], *, start: int = 0) -> None:
        self._dtype = dtype
        self._streams = [(Keystream(key), np.add if plus else np.subtract) for key, plus in keys]
        self._buffer = bytearray(_PIECE_BYTES)
        self.seek(start)

    def seek(self, start: int) -> None:
        """Go on from this element of the masks."""
        for stream, _ in self._streams:
            stream.seek(start * self._dtype.itemsize)

    def apply(self, values: Array) -> None:
        """Add the masks' next `len(values)` elements to a vector in place, modulo 2^32 or 2^64."""
        if values.dtype != self._dtype or values.ndim != 1:
            raise ValueError(f"masks of {self._dtype} were asked for {values.ndim} dimensions of {values.dtype}")
        step = _PIECE_BYTES // self._dtype.itemsize
        view, mask = memoryview(self._buffer), np.frombuffer(self._buffer, self._dtype)
        for first in range(0, len(values), step):
            piece = values[first : first + step]
            part, raw = mask[: len(piece)], view[: piece.nbytes]
            for stream, operation in self._streams:
                stream.into(raw)
                operation(piece, part, out=piece)


def apply(keys: Sequence[tuple[bytes, bool]], values: Array, *, threads: int = 0) -> None:
    """Add a sum of masks to a whole vector in place, in as many threads as can run at once (0) or so many.

    The result does not depend on how many: each thread takes up the masks where its piece begins.
    """

    def worker() -> Callable[[int], None]:
        masks = Masks(keys, values.dtype)

        def work(first: int) -> None:
            masks.seek(first)
            masks.apply(values[first : first + CHUNK])

        return work

    for _ in in_order(worker, range(0, len(values), CHUNK), threads=1 if len(values) <= CHUNK else threads):
        pass
