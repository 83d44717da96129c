"""What is known at the coordinator of the privacy that runs have spent: by run, and by data owner over all runs."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .views import PrivacyView, View


class RunBudget(View):
    """A run's budget. mode: the recipe's `dp.mode`; "local" is accounted for at each site, which tells nobody.

    spent: what its sums come to so far, None where no bound is stated; forecast: epsilon once the rounds that are left
    have been summed, each once; rounds: how many updates of each data owner were accepted for a sum.
    """

    run: str
    name: str
    state: str
    mode: Literal["off", "central", "distributed", "local"]
    done: int
    planned: int
    delta: float
    budget: float
    spent: PrivacyView | None = None
    forecast: float | None = None
    simulated: bool = False
    rounds: dict[str, int] = Field(default_factory=dict)

    @property
    def share(self) -> float | None:
        """The part of the budget that is spent."""
        if not self.budget or self.spent is None or self.spent.value is None:
            return None
        return self.spent.value / self.budget


class OwnerBudget(View):
    """A data owner over all runs. epsilon, delta: the sums over the runs that protect whole clients.

    By basic composition (Dwork and Roth 2014, theorem 3.16) that bounds what all those models together tell about it;
    None where one of them is infinite. unbounded: runs without differential privacy, about which nothing is stated.
    """

    client: str
    epsilon: float | None
    delta: float
    counted: tuple[str, ...] = ()
    unbounded: tuple[str, ...] = ()
    local: tuple[str, ...] = ()


def owners(runs: tuple[RunBudget, ...] | list[RunBudget]) -> list[OwnerBudget]:
    """The data owners of real runs, by name."""
    found: list[OwnerBudget] = []
    for client in sorted({name for r in runs if not r.simulated for name in r.rounds}):
        mine = [r for r in runs if client in r.rounds and not r.simulated]
        spent = [(r, r.spent) for r in mine if r.spent is not None and r.spent.unit == "client"]
        values = [s.value for _, s in spent]
        found.append(
            OwnerBudget(
                client=client,
                epsilon=None if None in values else sum(v for v in values if v is not None),
                delta=sum(s.delta for _, s in spent),
                counted=tuple(r.run for r, _ in spent),
                unbounded=tuple(r.run for r in mine if r.mode == "off"),
                local=tuple(r.run for r in mine if r.mode == "local"),
            )
        )
    return found
