"""What a round costs beside the training: ten agents that deliver a tiny update at once."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from murmur.privacy.client import ClientSession, Policy
from murmur.privacy.terms import block_of, context_of
from murmur.protocol.messages import Assignment
from murmur.protocol.tensors import Layout, masked_layout

from .process import Coordinator
from .report import Figure, median, note
from .runs import METRICS, Scale, layout_of, start_run, update_of, wait_for_version
from .swarm import Agent, Refused, each, enrol, run

AGENTS = 10
MODEL_BYTES = 256
LIMIT_S = 120.0
_assignment: TypeAdapter[Assignment] = TypeAdapter(Assignment)


def measure(scale: Scale) -> list[Figure]:
    """Seconds from one committed version to the next, median over the rounds of a run; plain and masked."""
    rounds, agents = (3, 3) if scale.quick else (20, AGENTS)
    found = {secure: _rounds(scale, agents, rounds, secure=secure) for secure in (False, True)}
    said = f"{agents} agents, {rounds} rounds"
    return [
        Figure(name="overhead", value=found[False], unit="s", below=0.3, note=said),
        Figure(name="overhead_masked", value=found[True], unit="s", note=f"{said}; the agents' cryptography included"),
    ]


def _rounds(scale: Scale, count: int, rounds: int, *, secure: bool) -> float | None:
    with tempfile.TemporaryDirectory(dir=scale.folder) as folder:
        coordinator = Coordinator(Path(folder))
        agents = enrol(coordinator.data, count)
        with coordinator:
            return run(_measure(coordinator, agents, rounds, secure=secure))


async def _measure(coordinator: Coordinator, agents: list[Agent], rounds: int, *, secure: bool) -> float | None:
    await asyncio.sleep(2)  # the summing process imports torch
    await each(agents, lambda agent: agent.connect(coordinator.port))
    part = _masked if secure else _plain

    async def work_on(agent: Agent) -> None:
        while True:
            await part(agent, await agent.work())

    working = [asyncio.ensure_future(work_on(agent)) for agent in agents]
    about = {"clients": len(agents), "rounds": rounds + 1, "secure": secure}
    name = await asyncio.to_thread(start_run, coordinator, MODEL_BYTES, **about)
    until = time.monotonic() + LIMIT_S
    committed = asyncio.ensure_future(asyncio.to_thread(wait_for_version, coordinator, name, rounds + 1, until=until))
    await asyncio.wait([committed, *working], return_when=asyncio.FIRST_COMPLETED)
    for one in working:
        if one.done():
            raise RuntimeError("an agent failed") from one.exception()
        one.cancel()
    await asyncio.gather(*working, return_exceptions=True)
    for agent in agents:
        agent.close()
    if not await committed:
        note(f"overhead: {rounds + 1} rounds took more than {LIMIT_S:.0f} s; the median is that of those that ended")
    at = coordinator.column("SELECT created_at FROM version WHERE run = ? AND n > 0 ORDER BY n", name)
    took = [after - before for before, after in itertools.pairwise(at)]
    return median(took) if took else None


async def _plain(agent: Agent, work: dict[str, Any]) -> None:
    if work["kind"] == "evaluate":
        return await _evaluated(agent, work)
    await agent.blob(work["model"])
    await agent.deliver(work, *update_of(MODEL_BYTES, 0.0), METRICS)
    await _step(agent, work, "", "done")


async def _masked(agent: Agent, work: dict[str, Any]) -> None:
    """The whole conversation of secure aggregation, with the client's own state machine."""
    assignment = _assignment.validate_python(work)
    if assignment.secure is None or work["kind"] == "evaluate":
        return
    await agent.blob(work["model"])
    layout = layout_of(MODEL_BYTES)
    context = context_of(assignment, layout, assignment.secure)
    session = ClientSession(context, agent.name, agent.key, policy=Policy(), known={})
    await _say(agent, work, "advert", session.advertise())
    await _say(agent, work, "shares", session.share(await _step(agent, work, "", "roster")))
    session.open(await _step(agent, work, "roster", "inbox"))
    block = block_of(assignment, layout, assignment.secure)
    integers = np.zeros(0, np.int64)
    aux = block.encode(weight=1, clipped=0, metrics={"train_loss": (1.0, 1)}, integers=integers)
    masked = session.mask([np.zeros(context.dim, np.float32)], weight=1, aux=aux)
    update = masked_layout(context.dim, context.aux).header() + b"".join(bytes(piece) for piece in masked)
    await agent.deliver(work, update, hashlib.sha256(update).hexdigest(), None)
    await _say(agent, work, "agree", session.agree(await _step(agent, work, "inbox", "survivors")))
    # The unmasking goes on as soon as enough have revealed: the others are told that the round is done, or are late.
    found = await _next(agent, work, "survivors")
    if found["kind"] == "reveal":
        with contextlib.suppress(Refused):
            await _say(agent, work, "reveal", session.reveal(found["body"]))
        found = await _next(agent, work, "reveal")
    _expect(found, "done")


async def _evaluated(agent: Agent, work: dict[str, Any]) -> None:
    empty = Layout(()).header()
    await agent.deliver(work, empty, hashlib.sha256(empty).hexdigest(), {})


async def _say(agent: Agent, work: dict[str, Any], kind: str, body: str) -> None:
    await agent.signed(f"/v1/assignments/{work['id']}/answers/{kind}?fence={work['fence']}", body)


async def _step(agent: Agent, work: dict[str, Any], after: str, wanted: str) -> str:
    """The body of the coordinator's next word, which must be the wanted one."""
    found = await _next(agent, work, after)
    _expect(found, wanted)
    return found["body"]


async def _next(agent: Agent, work: dict[str, Any], after: str) -> dict[str, Any]:
    path = f"/v1/assignments/{work['id']}/step?fence={work['fence']}&after={after}"
    while (found := await agent.bearer("GET", path, headers="Prefer: wait=300\r\n")) is None:
        pass
    return found


def _expect(found: dict[str, Any], wanted: str) -> None:
    if found["kind"] != wanted:
        raise RuntimeError(f"the coordinator said {found['kind']}, {wanted} should follow: {found['reason']}")
