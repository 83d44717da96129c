"""`simulate`: a run of virtual clients from its arguments to its history."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..coordinator.store.simulations import Simulated
from ..protocol.errors import OperatorError
from ..protocol.messages import OF_TRAINING
from ..protocol.recipe import Recipe
from ..protocol.sections import Dp, Strategy
from .cohorts import Backend
from .ending import ended_by_sigterm
from .federation import Federation, as_federation, find_federation
from .history import History, Round, Totals
from .living import Ended
from .places import in_folder
from .rounds import Simulation
from .settling import Secure, settle
from .storing import Stored, opened
from .testing import CentralTest, Examiner, hold_out
from .world import World, load_world

log = logging.getLogger(__name__)


def simulate(
    federation: Any,
    recipe: Recipe | None = None,
    *,
    strategy: Strategy | None = None,
    clients: int | None = None,
    rounds: int | None = None,
    seed: int | None = None,
    cohort: int | None = None,
    secure: Secure = False,
    dp: Dp | None = None,
    options: Mapping[str, Any] | None = None,
    backend: Backend = "auto",
    workers: int = 0,
    ray: str = "",
    world: World | Mapping[str, Any] | Path | str | None = None,
    test: CentralTest | None = None,
    on_round: Callable[[Round], None] | None = None,
    folder: Path | str | None = None,
    store: Stored | Path | str | None = None,
    resume: str = "",
) -> History:
    """Train virtual clients on this machine, with the training loop, sums and server steps of a real run.

    federation: a mapping of names to tasks, a sequence of tasks, a function that makes one of these (it is given
    `options`, and `clients` where it takes it), a folder such as "examples/hospitals", or "file.py:function".
    recipe: the one in that folder, or all defaults, when absent. strategy, rounds, seed, cohort (clients asked in a
    round, 0 for all) take the place of what it says.
    secure: "real" or True masks every update as real clients do, which costs time that grows with the square of the
    cohort and moves the mean by the fixed point's rounding only; "ideal" adds the same integers without the masks, to
    the same model; "off" or False adds plain updates; None follows the recipe.
    dp: differential privacy for clients, in the recipe's place; `History.epsilon` says what it comes to.
    backend: "sequential" trains the clients one after the other, "vectorized" many in one computation, with the same
    result up to the rounding of floats; "auto" does that where it can be done, docs/simulation.md says where.
    "processes" forks `workers` processes that train parts of a cohort either way, by default one for each core; "ray"
    has so many actors of the Ray cluster at the address `ray`, without one of a Ray that it starts on this machine.
    world: how fast clients are, when they are there and what happens to them, on a virtual clock: a World, the name of
    one ("hospitals", "laptops", "phones"), its values or a TOML file. `History.world` tells what happened.
    test: a test set that no client of a round holds, every how many rounds versions are measured on it, and when a run
    that gets no better ends. `History.tests` has what came out.
    on_round is called after each round. folder: where the versions are kept; without it only the final one, for as
    long as the History lives.
    store: a coordinator's data folder, in which the simulation is a run beside the real ones, round by round; resume:
    the id of one there that was killed, and goes on from its last round with its own recipe (in a world, if the same is
    given again, and so for `test`), to the same model.
    The same arguments give the same model, bit for bit on one machine, masked or plain alike from run to run; not so
    under differential privacy, whose noise nobody may know and is fresh each time.
    Raises OperatorError for a federation or settings that cannot work, and whatever a client's task raises, with the
    client's name in a note: nothing is dropped silently here.
    """
    found: Recipe | None = None
    if isinstance(federation, str | Path):
        made, found = find_federation(str(federation), clients, options)
    else:
        made = as_federation(federation, clients, options)
    if resume and backend == "ray":
        raise OperatorError("what clients kept was with Ray's actors, which are gone: begin it anew, without resume")
    held: Federation | None = None
    if test and test.clients:
        given = recipe or found
        made, held = hold_out(made, test.clients, seed if seed is not None else given.seed if given else 0)
    settled = settle(recipe or found, made, strategy, rounds, seed, cohort, secure, dp)
    there = load_world(world) if world is not None else None

    def run(place: Path, stored: Stored | None = None, taken: Simulated | None = None) -> History:
        masks = (
            taken.about["secure"]
            if taken
            else "off"
            if not settled.secure.on
            else "ideal"
            if secure == "ideal"
            else "real"
        )
        simulation = Simulation(
            made,
            settled,
            place,
            backend,
            workers=workers,
            ray=ray,
            keep=folder is not None,
            ideal=masks == "ideal",
            world=there,
        )
        examiner = Examiner(test, held, settled) if test else None
        if examiner:
            simulation.start = examiner.test(simulation.version)
        if stored and taken:
            simulation.go_on(stored.recall(taken))
        elif stored:
            stored.begin(simulation.version, clients=len(made), backend=simulation.trainer.name, secure=masks)
        return _run(simulation, len(made), settled, on_round, stored, examiner)

    with ended_by_sigterm(), opened(store, resume, folder) as stored:
        if stored is None:
            return in_folder(folder, run)
        if not resume:
            with stored.new(settled) as place:
                return run(place, stored)
        with stored.taken_over(resume, len(made)) as taken:
            settled = taken.recipe
            return run(stored.place, stored, taken)


def _run(
    simulation: Simulation,
    clients: int,
    recipe: Recipe,
    on_round: Callable[[Round], None] | None,
    stored: Stored | None,
    examiner: Examiner | None,
) -> History:
    done, ended, failed = simulation.done, "", False
    with closing(simulation.trainer):
        try:
            for n in range(len(done) + 1, recipe.rounds + 1):
                if examiner and (ended := examiner.enough([(0, simulation.start), *((r.n, r.tested) for r in done)])):
                    break
                done.append(simulation.round(n))
                if examiner and examiner.due(n):
                    done[-1] = replace(done[-1], tested=examiner.test(simulation.version))
                if stored:
                    stored.commit(done[-1], simulation.progress())
                if on_round:
                    on_round(done[-1])
        except Ended as why:
            ended, failed = str(why), True
            log.warning("the run has ended early", extra={"rounds": len(done), "why": ended})
        measured, model = simulation.evaluate(len(done) + 1), simulation.version
    if stored:
        model = stored.give_up(ended) if failed else stored.finish(len(done) + 1, measured, ended)
    versions = (*(r.metrics for r in done), _means(measured))
    return History(
        recipe=recipe,
        clients=clients,
        backend=simulation.trainer.name,
        rounds=tuple(done),
        versions=versions,
        model=model,
        ledger=tuple(simulation.ledger),
        spent={client: tuple(events) for client, events in sorted(simulation.spent.items())},
        run=stored.id if stored else "",
        world=simulation.living.timeline if simulation.living else None,
        start=simulation.start,
        ended=ended,
    )


def _means(totals: Totals) -> dict[str, float]:
    return {name: total / count for name, (total, count) in totals.items() if count and name not in OF_TRAINING}
