"""Clients one after the other in this process: the backend that does everything, and that others must agree with."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..aggregation.metrics import add_metrics
from ..aggregation.weighted_sum import Contribution, RunningMean
from ..clients.engine.loop import run_job
from ..clients.engine.randomness import seeded
from ..clients.engine.session import Session
from ..clients.job import Job, Result
from ..clients.own import Own
from ..clients.updates import metrics_of, weight_of
from ..protocol.messages import Assignment, Kind
from ..protocol.recipe import Recipe
from ..protocol.tensors import Layout
from .cohorts import Asked, Part, Summed, Unsuited
from .federation import Federation
from .history import Totals
from .turns import Turns, add_times, suits


class Sequential:
    """Each client's job goes through the trainer's own loop, and in plain rounds through its steps alone (`Turns`)."""

    name = "sequential"

    def __init__(
        self,
        federation: Federation,
        recipe: Recipe,
        layout: Layout,
        folder: Path,
        *,
        own: Own | None = None,
        on_client: Callable[[int], None] = lambda _: None,
    ) -> None:
        """folder: where updates lie until they are summed, and in clients/ what clients keep between their jobs.

        own: where they keep it instead. on_client is called before each client, with its number in what is asked.
        """
        self._federation, self._layout = federation, layout
        self._session = Session()
        self._update = folder / "update.safetensors"
        self._own, self._on_client = own or Own(folder / "clients"), on_client
        self._turns = Turns(self._session, layout) if suits(recipe) else None

    def mean(self, asked: Asked) -> Summed:
        summed, measured = self._summed(asked)
        return (summed.mean() if asked.assignment.kind is Kind.TRAIN else {}), measured

    def part(self, asked: Asked) -> Part:
        """Of a cohort's clients, those that are asked here."""
        summed, measured = self._summed(asked)
        if asked.assignment.kind is not Kind.TRAIN:
            return Part(sums={}, weight=0, measured=measured)
        return Part(sums=summed.sums(), weight=int(summed.weight), measured=measured)

    def _summed(self, asked: Asked) -> tuple[RunningMean, Totals]:
        if self._turns is not None:
            try:
                return self._in_memory(asked, self._turns)
            except Unsuited:
                self._turns = None
        mean, measured = RunningMean(self._layout.update()), Totals()
        for client, result in self.each(asked):
            add_metrics(measured, totals(asked.assignment, result))
            if result.update is not None:
                weight = weight_of(asked.assignment, result)
                mean.add(Contribution(client=client, path=result.update, weight=weight))
                result.update.unlink()
        return mean, measured

    def _in_memory(self, asked: Asked, turns: Turns) -> tuple[RunningMean, Totals]:
        """The same bits: one model, read once, and differences that go from it into the sum."""
        mean = RunningMean(self._layout.update(), fused=add_times)
        measured, told = Totals(), asked.assignment
        with seeded(0, self._session.ranks.device):
            for number, client in enumerate(asked.cohort):
                self._on_client(number)
                job = self._job(client, asked)
                with _named(client, told):
                    task = self._federation.task(client)
                    if not number:
                        turns.begin(task, job)
                    result = turns.turn(task, job)
                    if job.kind == "train":
                        mean.add_parts(client, weight_of(told, result), turns.update())
                add_metrics(measured, totals(told, result))
        return mean, measured

    def each(self, asked: Asked) -> Iterator[tuple[str, Result]]:
        for number, client in enumerate(asked.cohort):
            self._on_client(number)
            yield client, self._work(client, asked)

    def close(self) -> None: ...

    def _work(self, client: str, asked: Asked) -> Result:
        told, job = asked.assignment, self._job(client, asked, self._own.before(client, asked.assignment.round))
        with _named(client, told):
            result = run_job(self._federation.task(client), job, session=self._session)
        if job.own_after.exists():
            self._own.adopt(client, told.round, job.own_after)
        return result

    def _job(self, client: str, asked: Asked, own: Path | None = None) -> Job:
        told = asked.assignment
        return Job(
            id=f"{told.id}.{client}",
            kind="train" if told.kind is Kind.TRAIN else "evaluate",
            model=asked.version,
            update=self._update,
            train=told.train,
            mu=told.mu,
            metrics=told.metrics,
            seed=told.seed,
            round=told.round,
            client=client,
            dp=told.dp,
            parallel=told.parallel,
            own=own,
            algorithm=told.algorithm,
        )


@contextmanager
def _named(client: str, told: Assignment) -> Generator[None]:
    """Errors inside say where they were."""
    try:
        yield
    except Exception as error:
        error.add_note(f"in round {told.round} at {client}")
        raise


def totals(assignment: Assignment, result: Result) -> Totals:
    """The metrics of a result that were asked for, as sums and counts."""
    return {name: (total.sum, total.count) for name, total in metrics_of(assignment, result).items()}
