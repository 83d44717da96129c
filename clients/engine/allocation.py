"""How the host's memory is given back."""

from __future__ import annotations

import ctypes
from contextlib import suppress

M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
LARGE = 1 << 20  # bytes


def return_large_blocks() -> None:
    """Let freed blocks of a MiB or more go back to the system at once, from now on in this process; glibc only.

    Else it keeps blocks of up to 32 MiB once it has seen them freed, and pieces that live on between them: a rank that
    gathers a sharded model block by block came to hold 3.6 models in this way, and holds 1.1 without it.
    """
    with suppress(AttributeError, OSError, TypeError):  # another C library has no such habit to break
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE)
