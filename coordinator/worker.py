"""The process that sums: torch lives there, so that the API starts in a second and a large sum never slows it."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from ..privacy.dp.accounting import Event
from ..privacy.dp.plan import view_of
from ..protocol.errors import OperatorError
from ..protocol.recipe import Recipe
from ..protocol.views import PrivacyView
from .blobs import Blobs
from .store.attempts import Attempt, Outcome

log = logging.getLogger(__name__)

T = TypeVar("T")


class Worker:
    """One process that is started anew when it dies; `aggregate` is repeatable, so nothing is lost with it."""

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs
        self._pool = self._new()

    def warm(self) -> None:
        """Have torch imported before the first round needs it."""
        self._pool.submit(_import)

    def submit(self, attempt: Attempt, identities: Mapping[str, bytes]) -> Future[Outcome]:
        return self._submit(_aggregate, attempt, dict(identities), self._blobs)

    def account(self, recipe: Recipe, spent: Sequence[Event]) -> Future[PrivacyView]:
        """What the ledger of a run that has ended comes to, by PLD."""
        return self._submit(view_of, recipe, list(spent), "pld")

    def _submit(self, work: Callable[..., T], *given: Any) -> Future[T]:
        try:
            return self._pool.submit(work, *given)
        except BrokenProcessPool:
            log.warning("the summing process died and is started again")
            self._pool.shutdown(wait=False)
            self._pool = self._new()
            return self._pool.submit(work, *given)

    def close(self) -> None:
        """End at once: the coordinator has 5 s, torch may be on its way in, and a sum is taken again."""
        for process in (self._pool._processes or {}).values():  # pyright: ignore[reportPrivateUsage]
            process.kill()
        self._pool.shutdown(wait=True, cancel_futures=True)

    @staticmethod
    def _new() -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(1, mp_context=context, initializer=_settle, initargs=(os.getpid(),))


def check_flower_apart(recipe: Recipe) -> None:
    """Raise OperatorError unless the recipe's Flower strategy works with it; tried in a process of its own.

    It is code of others and loads flwr: neither belongs in the process that answers.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            pool.submit(_check_flower, recipe).result()
        except BrokenProcessPool:
            name = recipe.strategy.flower
            raise OperatorError(f"the Flower strategy {name!r} ended the process that tried it") from None


def _check_flower(recipe: Recipe) -> None:
    from ..aggregation.flower_probe import check_flower

    check_flower(recipe)


def _settle(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal reaches us too; the coordinator ends us
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()


def _follow(parent: int) -> None:
    """End with the coordinator, however it ends; an idle worker would otherwise outlive a killed one."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _import() -> None:
    from ..aggregation import server

    _ = server


def _aggregate(attempt: Attempt, identities: Mapping[str, bytes], blobs: Blobs) -> Outcome:
    from .summing import aggregate

    return aggregate(attempt, identities, blobs)
