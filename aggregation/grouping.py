"""Groups of clients that are summed apart, so that a robust rule can look at several sums where it may see no update.

A client's group is drawn once and stays for the run: sums over groups that change would differ by single clients.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping

from ..protocol.recipe import Recipe
from .selection import select


def place(ids: Iterable[str], known: Mapping[str, int], groups: int, seed: int) -> dict[str, int]:
    """The group of each client that is there, from 1: its own if it has one, or else the smallest, ties by seed.

    known: the groups of all clients that have one. Smallest is the one with the fewest of those who are there, so that
    newcomers make up for who has left. The same ids, groups and seed give the same answer on any machine.
    """
    there = sorted(set(ids))
    placed = {name: known[name] for name in there if name in known}
    sizes = Counter(placed.values())
    newcomers = [name for name in there if name not in known]
    draw = random.Random(f"{seed}/groups")
    draw.shuffle(newcomers)
    for name in newcomers:
        fewest = min(sizes[n] for n in range(1, groups + 1))
        placed[name] = draw.choice([n for n in range(1, groups + 1) if sizes[n] == fewest])
        sizes[placed[name]] += 1
    return placed


def draw_cohort(placed: Mapping[str, int], recipe: Recipe, *, round: int, attempt: int) -> dict[str, int]:
    """Who is asked, each with its group: `cohort.size` spread as evenly over the groups as they allow, or all.

    A group with too few members for a sum sits the attempt out.
    """
    sizes = {n: size for n, size in Counter(placed.values()).items() if size >= recipe.fewest}
    there = sum(sizes.values())
    shares = Counter[int]()
    for _ in range(min(recipe.cohort.size or there, there)):
        shares[min((n for n in sizes if shares[n] < sizes[n]), key=lambda n: (shares[n], n))] += 1
    asked: dict[str, int] = {}
    for n, share in shares.items():
        members = [name for name, group in placed.items() if group == n]
        asked |= dict.fromkeys(select(members, share, seed=recipe.seed, round=round, attempt=attempt), n)
    return dict(sorted(asked.items()))
