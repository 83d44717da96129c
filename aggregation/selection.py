"""Who is asked in a round."""

from __future__ import annotations

import random
from collections.abc import Iterable


def select(ids: Iterable[str], size: int, *, seed: int, round: int, attempt: int) -> tuple[str, ...]:
    """The cohort of one attempt: `size` of the ids, drawn uniformly without replacement, in sorted order.

    size: 0, or as many as there are ids or more, takes all of them.
    The same ids, seed, round and attempt give the same cohort on any machine, in whatever order the ids come: Python
    promises that `random.Random` seeded with a string draws alike everywhere.
    """
    known = sorted(set(ids))
    if size <= 0 or size >= len(known):
        return tuple(known)
    return tuple(sorted(random.Random(f"{seed}/{round}/{attempt}").sample(known, size)))
