"""What it costs to keep agents waiting: memory and CPU of one process that holds so many parked polls."""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path

from .process import Coordinator, allow_files, at_rest
from .report import Figure, note
from .runs import Scale
from .swarm import WAIT_S, Agent, each, enrol, run

SETTLE_S = 90.0  # given to a coordinator to come to rest after the last poll was sent


def measure(scale: Scale) -> list[Figure]:
    """RSS and CPU while every agent's poll is parked, over a minute."""
    agents_count, seconds = (200, 2.0) if scale.quick else (scale.agents, 60.0)
    allow_files(agents_count)
    with tempfile.TemporaryDirectory(dir=scale.folder) as folder:
        coordinator = Coordinator(Path(folder))
        agents = enrol(coordinator.data, agents_count)
        with coordinator:
            return run(_measure(coordinator, agents, seconds, settle_s=2.0 if scale.quick else SETTLE_S))


async def _measure(coordinator: Coordinator, agents: list[Agent], seconds: float, *, settle_s: float) -> list[Figure]:
    await asyncio.sleep(2)  # the summing process imports torch
    alone = coordinator.memory()
    await each(agents, lambda agent: agent.connect(coordinator.port))
    answered = 0

    async def park(agent: Agent) -> None:
        nonlocal answered
        while True:
            await agent.poll()
            answered += 1

    began, used = time.monotonic(), coordinator.cpu_s()
    parked = [asyncio.ensure_future(park(agent)) for agent in agents]
    try:
        await at_rest(coordinator, settle_s)
        note(f"idle: {len(agents)} polls at rest after {time.monotonic() - began:.1f} s, measuring for {seconds:g} s")
        cost = (coordinator.cpu_s() - used) / (len(agents) + answered)
        before, cpu, start = answered, coordinator.cpu_s(), time.monotonic()
        await asyncio.sleep(seconds)
        took = time.monotonic() - start
        share = (coordinator.cpu_s() - cpu) / took
        memory = coordinator.memory()
    finally:
        for task in parked:
            task.cancel()
        done = await asyncio.gather(*parked, return_exceptions=True)
        for agent in agents:
            agent.close()
    broken = [error for error in done if not isinstance(error, asyncio.CancelledError)]
    if broken:
        raise RuntimeError(f"{len(broken)} of {len(agents)} polls failed, the first one with {broken[0]!r}")
    per_agent = (memory["anonymous"] - alone["anonymous"]) * 1000 / len(agents)
    steady = share * 100 + (0 if answered > before else len(agents) / WAIT_S * cost * 100)
    of = f"{len(agents):,} parked polls, over {took:.0f} s"
    return [
        Figure(name="idle_rss", value=memory["rss"], unit="MB", below=400, note=of),
        Figure(name="idle_cpu", value=share * 100, unit="% of a core", below=3, note=of),
        Figure(name="idle_per_agent", value=per_agent, unit="KB", note="of anonymous memory"),
        Figure(name="idle_poll_cost", value=cost * 1000, unit="ms", note="CPU of taking in one poll and parking it"),
        Figure(name="idle_cpu_with_repolls", value=steady, unit="% of a core", note=f"one each {WAIT_S} s"),
        Figure(name="idle_answered", value=(answered - before) / took, unit="polls/s", note="0 when all stay parked"),
        Figure(name="idle_rss_without_agents", value=alone["rss"], unit="MB"),
        Figure(name="idle_rss_of_the_summing_process", value=coordinator.helpers_rss_mb(), unit="MB"),
    ]
