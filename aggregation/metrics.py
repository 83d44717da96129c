"""Metrics of a cohort: each a sum over examples and their count, so that parts add up to the whole exactly."""

from __future__ import annotations

from collections.abc import Mapping

Sums = dict[str, tuple[float, float]]  # metric -> (sum, count)


def add_metrics(sums: Sums, more: Mapping[str, tuple[float, float]]) -> None:
    """Add what one client, or one group, measured; a metric that only some report counts for those."""
    for name, (total, count) in more.items():
        before = sums.get(name, (0.0, 0.0))
        sums[name] = (before[0] + total, before[1] + count)
