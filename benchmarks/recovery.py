"""From the start of a new process after SIGKILL to the first answered poll, with 100 clients and a 100 MB model."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from pathlib import Path
from typing import Any

from .process import Coordinator
from .report import Figure, median, note
from .runs import Scale, start_run
from .swarm import Agent, each, enrol, run

RETRY_S = 0.01  # agents pause longer (with jitter), which says nothing about the coordinator


def measure(scale: Scale) -> list[Figure]:
    """Median over several kills in one run; each time every client loses the long poll it waits in."""
    kills, clients, size = (1, 5, 1 << 20) if scale.quick else (5, 100, 100_000_000)
    with tempfile.TemporaryDirectory(dir=scale.folder) as folder:
        coordinator = Coordinator(Path(folder))
        agents = enrol(coordinator.data, clients)
        with coordinator:
            return run(_measure(coordinator, agents, kills, size))


async def _measure(coordinator: Coordinator, agents: list[Agent], kills: int, size: int) -> list[Figure]:
    """The clients are asked in round 1 and never deliver, so the run stands where it was at every kill."""
    await each(agents, lambda agent: agent.connect(coordinator.port))
    polls = [asyncio.ensure_future(agent.work()) for agent in agents]
    name = await asyncio.to_thread(start_run, coordinator, size, clients=len(agents))
    works = list(await asyncio.gather(*polls))
    asked = {work["id"] for work in works}
    firsts: list[float] = []
    alls: list[float] = []
    for _ in range(kills):
        waiting = [asyncio.ensure_future(_survive(coordinator, *one)) for one in zip(agents, works, strict=True)]
        await asyncio.sleep(1)
        await asyncio.to_thread(coordinator.kill)
        began = time.monotonic()
        coordinator.start(wait=False)
        found = await asyncio.gather(*waiting)
        works = [work for _, work in found]
        firsts.append(min(at for at, _ in found) - began)
        alls.append(max(at for at, _ in found) - began)
        if {work["id"] for work in works} != asked:
            raise RuntimeError("after the kill the clients were asked for something else")
        note(f"recovery: first answer after {firsts[-1]:.2f} s, all {len(agents)} after {alls[-1]:.2f} s")
    for agent in agents:
        agent.close()
    state = coordinator.ask_database("SELECT state FROM run WHERE id = ?", name)
    if state != "running":
        raise RuntimeError(f"the run is {state}")
    said = f"median of {kills} kills, {len(agents)} clients, a model of {size / 1e6:.0f} MB"
    return [
        Figure(name="recovery", value=median(firsts), unit="s", below=3, note=said),
        Figure(name="recovery_of_all", value=median(alls), unit="s", note="until the last client was answered"),
    ]


async def _survive(coordinator: Coordinator, agent: Agent, work: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """Wait for the next word on an assignment until the connection breaks, then connect and poll until answered.

    Returns when that was, and the assignment, which is the same one, handed out again: this agent has forgotten it.
    """
    path = f"/v1/assignments/{work['id']}/step?fence={work['fence']}"
    with contextlib.suppress(OSError):
        while True:
            await agent.bearer("GET", path)
    while True:
        with contextlib.suppress(OSError):
            await agent.connect(coordinator.port)
            found = await agent.work()
            return time.monotonic(), found
        await asyncio.sleep(RETRY_S)
