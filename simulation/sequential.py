"""Clients one after the other in this process: the backend that does everything, and that others must agree with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..aggregation.metrics import add_metrics
from ..aggregation.weighted_sum import Contribution, RunningMean
from ..clients.engine.loop import run_job
from ..clients.engine.session import Session
from ..clients.job import Job, Result
from ..clients.own import Own
from ..clients.updates import metrics_of, weight_of
from ..protocol.messages import Assignment, Kind
from ..protocol.tensors import Layout
from .cohorts import Asked, Summed
from .federation import Federation
from .history import Totals


class Sequential:
    """Each client's job goes through the trainer's own loop."""

    name = "sequential"

    def __init__(self, federation: Federation, layout: Layout, folder: Path) -> None:
        """folder: where updates lie until they are summed, and in clients/ what clients keep between their jobs."""
        self._federation, self._layout, self._folder = federation, layout, folder
        self._session = Session()
        self._own = Own(folder / "clients")

    def mean(self, asked: Asked) -> Summed:
        mean, measured = RunningMean(self._layout.update()), Totals()
        for client, result in self.each(asked):
            add_metrics(measured, totals(asked.assignment, result))
            if result.update is not None:
                weight = weight_of(asked.assignment, result)
                mean.add(Contribution(client=client, path=result.update, weight=weight))
                result.update.unlink()
        return (mean.mean() if asked.assignment.kind is Kind.TRAIN else {}), measured

    def each(self, asked: Asked) -> Iterator[tuple[str, Result]]:
        for client in asked.cohort:
            yield client, self._work(client, asked)

    def _work(self, client: str, asked: Asked) -> Result:
        told = asked.assignment
        job = Job(
            id=f"{told.id}.{client}",
            kind="train" if told.kind is Kind.TRAIN else "evaluate",
            model=asked.version,
            update=self._folder / "update.safetensors",
            train=told.train,
            mu=told.mu,
            metrics=told.metrics,
            seed=told.seed,
            round=told.round,
            client=client,
            dp=told.dp,
            parallel=told.parallel,
            own=self._own.before(client, told.round),
            algorithm=told.algorithm,
        )
        try:
            result = run_job(self._federation.task(client), job, session=self._session)
        except Exception as error:
            error.add_note(f"in round {told.round} at {client}")
            raise
        if job.own_after.exists():
            self._own.adopt(client, told.round, job.own_after)
        return result


def totals(assignment: Assignment, result: Result) -> Totals:
    """The metrics of a result that were asked for, as sums and counts."""
    return {name: (total.sum, total.count) for name, total in metrics_of(assignment, result).items()}
