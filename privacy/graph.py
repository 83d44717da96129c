"""The graph of masks: with whom each client of a masked round shares masks and secrets.

The clients lie on a ring in the order of a hash of the session and their ids, and each is joined to the k/2 next to it
on either side (a Harary graph). The session stands for every key of everyone who takes part, so that the keys are
fixed before the order is known. Source: Bell et al. 2020, doi:10.1145/3372297.3417885; how large k must be is
reckoned in `protocol.thresholds`.

    U1, U2, U3 = clients that sent keys, that dealt shares, whose updates are summed
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache

Near = Mapping[str, frozenset[str]]


def neighbours(session: bytes, clients: Iterable[str], degree: int) -> Near:
    """The neighbours of each client, itself not among them; everybody's are all others where `degree` is 0.

    clients: U1. degree: even; one that n - 1 clients do not fill gives the complete graph too.
    """
    return _neighbours(session, tuple(clients), degree)


@lru_cache(maxsize=2)  # a coordinator asks again at every message of a round
def _neighbours(session: bytes, clients: tuple[str, ...], degree: int) -> Near:
    if not degree or degree >= len(clients) - 1:
        everyone = frozenset(clients)
        return {u: everyone - {u} for u in clients}
    ring = sorted(clients, key=lambda u: hashlib.sha256(session + u.encode()).digest())
    n, around = len(ring), [*range(-(degree // 2), 0), *range(1, degree // 2 + 1)]
    return {u: frozenset(ring[(i + j) % n] for j in around) for i, u in enumerate(ring)}


def standing(near: Near, shared: Collection[str], summed: Collection[str]) -> list[str]:
    """The clients of U2 a secret of which must be rebuilt: the survivors, and those dropped that masked with one."""
    there = set(summed)
    return [u for u in shared if u in there or not there.isdisjoint(near[u])]


def short(near: Near, clients: Iterable[str], there: Iterable[str], threshold: int) -> list[str]:
    """Those of the clients of whose shares fewer than `threshold` lie with those that are there."""
    present = frozenset(there)
    return [u for u in clients if len(near[u] & present) + (u in present) < threshold]
