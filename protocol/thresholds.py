"""How many neighbours a client of a masked round has, and how many shares unmask: bounds for cohorts of any size.

In a small cohort everybody masks with everybody. In a large one each client masks with the k next to it on a ring in
random order (`privacy.graph`), and t of the k + 1 shares of its secrets (it holds one itself) rebuild them. Here k and
t are the smallest for which the round can be trusted, and can end, but for probabilities that are stated. The graph is
that of Bell et al. 2020, "Secure Single-Server Aggregation with (Poly)Logarithmic Overhead",
doi:10.1145/3372297.3417885; docs/decisions/0008 says why these bounds are what they are.

    n clients, of which c work with a coordinator that lies and d drop out; both placed at random on the ring
    k neighbours of each, h = k/2 on either side; t shares that unmask
"""

from __future__ import annotations

import math
from bisect import bisect_left
from functools import lru_cache
from typing import NamedTuple

COMPLETE = 50  # clients up to which everybody masks with everybody
MOST = 1000  # neighbours that are tried
PRIVACY, CORRECTNESS = 2.0**-40, 2.0**-20  # how likely a round may read too much, and may fail


class MaskGraph(NamedTuple):
    """degree: neighbours of a client, 0 for everybody; threshold: shares that unmask."""

    degree: int
    threshold: int


def default_threshold(n: int) -> int:
    """Shares that unmask a secret with n holders: two thirds and one.

    A lying coordinator with c clients on its side is held off while 2t > n + c, so up to (n - 1) // 3 of them; up to
    n - t clients may drop out.
    """
    return 2 * n // 3 + 1


def holders(n: int, degree: int) -> int:
    """How many clients hold a share of one client's secrets: its neighbours and itself."""
    return min(degree + 1, n) if degree else n


def fewest(n: int, degree: int, threshold: int, min_clients: int) -> int:
    """The fewest of n clients with which a round goes on: the share of all that t is of one client's holders."""
    return max(min_clients, -(-n * threshold // holders(n, degree)))


@lru_cache(maxsize=256)
def mask_graph(n: int, corrupt: float, dropout: float) -> MaskGraph:
    """The graph of n clients: complete up to 50 or where no other is safe, else of the smallest degree that is.

    corrupt, dropout: the shares of the clients that may be the coordinator's, and that may drop out.
    """
    for k in range(2, min(n - 1, MOST + 1) if n > COMPLETE else 0, 2):
        thresholds = range(k // 2 + 1, k + 2)
        safe = bisect_left(thresholds, True, key=lambda t, k=k: exposure(n, k, t, corrupt) <= PRIVACY)
        lame = bisect_left(thresholds, True, key=lambda t, k=k: failure(n, k, t, dropout) > CORRECTNESS)
        if safe < lame:
            return MaskGraph(k, thresholds[safe])
    return MaskGraph(0, default_threshold(n))


def exposure(n: int, degree: int, threshold: int, corrupt: float) -> float:
    """Bound on the probability that a lying coordinator can read less than the whole sum of the honest.

    It may show the roster of as few clients as they go on with, all its own among them. Then it needs one of:
    - both secrets of one honest client: of its k + 1 holders, c' of them corrupt, t - c' honest ones each must show one
      and t - c' others the other, so c' >= 2t - k - 1;
    - the ring cut in two places. A place is cut by h clients in a row of whom none is honest and still counted. The
      honest ones among them were dropped with the help of t holders, who lie outside: at most h + 1 and the corrupt of
      the row are there, so the row holds at least t - h - 1 corrupt ones.
    """
    c, h = _count(n, corrupt), degree // 2
    there = fewest(n, degree, threshold, 0)
    if there <= degree + 1:  # such a roster is a complete graph
        return float(2 * threshold <= degree + 1 + c)
    both = (there - c) * tail(there - 1, c, degree, 2 * threshold - degree - 1)
    row = there * tail(there, c, h, threshold - h - 1)
    return both + row * row / 2  # the numbers of corrupt clients in two rows are negatively associated


def failure(n: int, degree: int, threshold: int, dropout: float) -> float:
    """Bound on the probability that some client's secret cannot be rebuilt, and with it the sum."""
    d = _count(n, dropout)
    stays, leaves = degree + 2 - threshold, degree + 1 - threshold  # neighbours whose loss is too much for it
    return (n - d) * tail(n - 1, d, degree, stays) + (d and d * tail(n - 1, d - 1, degree, leaves))


def tail(n: int, marked: int, drawn: int, least: int) -> float:
    """P(X >= least) for the number X of marked ones among `drawn` of n, drawn without putting back.

    The terms are summed from the first one on; scipy's quantiles of this distribution are wrong from n = 10^4 on.
    """
    x, most = max(least, 0, drawn + marked - n), min(marked, drawn)
    if x > most:
        return 0.0
    if x < (drawn + 1) * (marked + 1) // (n + 2):  # before the mode the other tail is the small one
        return 1.0 - tail(n, n - marked, drawn, drawn - x + 1)
    term = math.exp(_log_choose(marked, x) + _log_choose(n - marked, drawn - x) - _log_choose(n, drawn))
    total = 0.0
    while x <= most and term > total * 1e-17:
        total += term
        term *= (marked - x) * (drawn - x) / ((x + 1) * (n - marked - drawn + x + 1))
        x += 1
    return min(total, 1.0)


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def _count(n: int, share: float) -> int:
    return math.ceil(round(n * share, 9))  # 0.07 * 100 is 7.000000000000001
