"""One piece of work for many clients on as many threads as torch may use, each client whole on one of them.

Torch divides one large computation among its threads; of many small ones it makes one after the other. K = clients
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from itertools import pairwise
from threading import Barrier

import torch

_lent: ContextVar[int] = ContextVar("lent", default=0)  # threads that torch would use outside of for_clients_only


def by_clients(clients: int, work: Callable[[range], None]) -> None:
    """Do `work` for consecutive parts of range(K), at the same time; raises what it raises, when all parts are done."""
    before = torch.get_num_threads()
    threads = _lent.get() or before
    parts = max(1, min(threads, clients))
    first, *others = (range(*pair) for pair in pairwise(clients * k // parts for k in range(parts + 1)))
    waiting = [_others(threads).submit(work, part) for part in others]
    torch.set_num_threads(1)
    try:
        work(first)
    finally:
        torch.set_num_threads(before)
        errors = [each.exception() for each in waiting]  # waits
    if error := next(filter(None, errors), None):
        raise error


@contextmanager
def for_clients_only() -> Generator[None]:
    """Torch's threads are `by_clients`' alone: torch's own wait for work by spinning, on the cores that it needs."""
    threads = torch.get_num_threads()
    lent = _lent.set(threads)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        _lent.reset(lent)


@cache
def _others(threads: int) -> ThreadPoolExecutor:
    """The threads beside the caller's, in each of which torch takes one."""
    begun = Barrier(threads)

    def begin() -> None:
        torch.get_num_threads()  # the first call in a thread takes the process's number, whatever was set before
        torch.set_num_threads(1)
        begun.wait()

    pool = ThreadPoolExecutor(threads - 1, "murmur-crew", initializer=begin)
    for _ in range(threads - 1):
        pool.submit(int)
    begun.wait()
    torch.set_num_threads(threads)  # torch gives the last number that was set to threads to come
    return pool


os.register_at_fork(after_in_child=_others.cache_clear)  # a child has none of its parent's threads
