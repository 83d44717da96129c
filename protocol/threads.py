"""Pieces of one computation in several threads: numpy, AES and file reads leave the interpreter to the others."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import local
from typing import TypeVar

Piece = TypeVar("Piece")
Found = TypeVar("Found")


def processors() -> int:
    """How many threads can run at once: the processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(
    make: Callable[[], Callable[[Piece], Found]], pieces: Iterable[Piece], *, threads: int = 0
) -> Iterator[Found]:
    """What a worker finds for each piece, in the order of the pieces, a few of them ahead of the caller.

    make: a new worker with buffers of its own; every thread makes one. threads: 0 for as many as can run at once, 1
    for none but the caller's. The first error of a piece, or of the pieces themselves, is raised in its place.
    """
    threads = threads or processors()
    if threads == 1:
        yield from map(make(), pieces)
        return
    mine = local()

    def work(piece: Piece) -> Found:
        if not hasattr(mine, "worker"):
            mine.worker = make()
        return mine.worker(piece)

    pool, under_way = ThreadPoolExecutor(threads, thread_name_prefix="murmur-piece"), deque[Future[Found]]()
    try:
        for piece in pieces:
            under_way.append(pool.submit(work, piece))
            if len(under_way) > 2 * threads:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
