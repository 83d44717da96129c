"""Auditing with canaries: what right guesses about a run prove about its epsilon.

Each of m canaries, examples or clients made for the purpose, takes part in one run or not, by a fair coin of its own.
Then somebody who sees what the run gave, but not the coins, guesses them. If the run is (epsilon, delta)-differentially
private, the guesses cannot be right much more often than e^epsilon / (1 + e^epsilon); so guesses that are prove that
its epsilon is larger.
Source: Steinke, Nasr and Jagielski 2023, "Privacy Auditing with One (1) Training Run", arXiv:2305.08846.

    M = canaries
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

FEWEST_GUESSES = 8  # of fewer nothing much can follow: eight right ones prove an epsilon of 0.8 at 95 %
_PRECISION = 1e-6  # of epsilon


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What the guesses prove: with probability `confidence` over the coins, the run's epsilon is `epsilon` or more.

    It is the best of `tries` numbers of guesses, and `confidence` holds for the best of them.
    """

    epsilon: float
    delta: float
    confidence: float
    canaries: int
    guesses: int
    correct: int
    tries: int


def audit(
    scores_M: Array, included_M: Array, *, delta: float, confidence: float = 0.95, guesses: Sequence[int] = ()
) -> Finding:
    """The best lower bound on epsilon that scores prove.

    scores_M: (M,) floats, higher the likelier it is that the canary took part; made without knowledge of the coins.
    included_M: (M,) bool, the coins. guesses: how many canaries to guess, the rest is passed over; eighths of M
    when absent. Each number that is tried is tested at its share of 1 - confidence (the union bound), so that trying
    costs a little and looking for the best is no cheating.
    """
    if scores_M.shape != included_M.shape or scores_M.ndim != 1 or not np.isfinite(scores_M).all():
        raise ValueError(f"one finite score for each coin was asked for, got {scores_M.shape} and {included_M.shape}")
    m = len(scores_M)
    numbers = sorted({*guesses} or _eighths(m), reverse=True)
    beta = (1.0 - confidence) / len(numbers)
    found: list[Finding] = []
    for r in numbers:
        correct = count_correct(scores_M, included_M, r)
        epsilon = lower_bound(m, r, correct, delta=delta, beta=beta)
        facts = {"canaries": m, "guesses": r, "correct": correct, "tries": len(numbers)}
        found.append(Finding(epsilon=epsilon, delta=delta, confidence=confidence, **facts))
    return max(found, key=lambda f: (f.epsilon, f.guesses))


def count_correct(scores_M: Array, included_M: Array, guesses: int) -> int:
    """Right guesses when the highest scores are said to be in, the lowest out, half each; the middle is passed over."""
    if not 1 <= guesses <= len(scores_M):
        raise ValueError(f"{guesses} guesses of {len(scores_M)} canaries")
    order = np.argsort(scores_M, kind="stable")
    low, high = order[: guesses // 2], order[len(order) - (guesses - guesses // 2) :]
    return int(np.count_nonzero(included_M[high]) + np.count_nonzero(~included_M[low]))


def lower_bound(m: int, guesses: int, correct: int, *, delta: float, beta: float) -> float:
    """The largest epsilon that so many right guesses refute with error probability beta; 0 when they refute none.

    With delta = 0 and all r guesses right it is ln(q / (1 - q)) for q = beta^(1/r).
    """
    if not (0 < beta < 1 and 0 <= delta < 1):
        raise ValueError(f"beta = {beta}, delta = {delta}: between 0 and 1 both")
    if p_value(m, guesses, correct, epsilon=0.0, delta=delta) >= beta:
        return 0.0
    low, high = 0.0, 1.0
    while p_value(m, guesses, correct, epsilon=high, delta=delta) < beta:
        low, high = high, 2 * high
    while high - low > _PRECISION:
        middle = (low + high) / 2
        if p_value(m, guesses, correct, epsilon=middle, delta=delta) < beta:
            low = middle
        else:
            high = middle
    return low


def p_value(m: int, guesses: int, correct: int, *, epsilon: float, delta: float) -> float:
    """At most so probable are v or more right among r guesses of m coins in an (epsilon, delta)-DP run.

    Source: corollary 5.4 of the paper. With W ~ Binomial(r, e^epsilon / (1 + e^epsilon)) it is
    P[W >= v] + delta m alpha, where alpha = max over i = 1 .. m of (2 / i) P[v > W >= v - i].
    """
    r, v = guesses, correct
    if not 0 <= v <= r <= m:
        raise ValueError(f"{v} right of {r} guesses of {m} canaries")
    pmf = _binomial(r, epsilon)
    below = np.cumsum(pmf[:v][::-1])  # P[v > W >= v - i] for i = 1 .. v; from there on it does not grow
    alpha = 2.0 * float((below / np.arange(1, v + 1)).max()) if v else 0.0
    return min(1.0, math.fsum(pmf[v:]) + delta * m * alpha)


def _binomial(r: int, epsilon: float) -> Array:
    """(r + 1,) probabilities of 0 .. r right guesses, each right with e^epsilon / (1 + e^epsilon)."""
    k = np.arange(r + 1)
    factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, r + 1)))])
    right = -math.log1p(math.exp(-epsilon))
    return np.exp(factorials[r] - factorials[k] - factorials[r - k] + k * right + (r - k) * (right - epsilon))


def _eighths(m: int) -> set[int]:
    """7/8, 4/8, 2/8 and 1/8 of m, as far as they are worth a try; of all m, half guessed in, some would be wrong."""
    return {m * i // 8 for i in (7, 4, 2, 1) if m * i // 8 >= FEWEST_GUESSES} or {m}
