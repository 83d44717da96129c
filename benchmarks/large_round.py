"""A round of 10,000 agents over real HTTP, each update on disk before it is acknowledged."""

from __future__ import annotations

import asyncio
import resource
import tempfile
import time
from collections import Counter
from pathlib import Path

from .process import Coordinator, allow_files, at_rest
from .report import Figure, note
from .runs import METRICS, Scale, start_run, update_of, wait_for_version
from .swarm import Agent, Refused, each, enrol, run

MODEL_BYTES = 4096
LIMIT_S = 300.0
SETTLE_S = 90.0  # given to a coordinator to come to rest after the last poll was sent


def measure(scale: Scale) -> list[Figure]:
    """Seconds from `start_run`, with every agent parked, to the committed version; and how many did not count."""
    count = 50 if scale.quick else scale.agents
    allow_files(count)
    with tempfile.TemporaryDirectory(dir=scale.folder) as folder:
        coordinator = Coordinator(Path(folder))
        agents = enrol(coordinator.data, count)
        with coordinator:
            return run(_measure(coordinator, agents))


async def _measure(coordinator: Coordinator, agents: list[Agent]) -> list[Figure]:
    updates = {agent.name: update_of(MODEL_BYTES, float(i)) for i, agent in enumerate(agents)}
    await each(agents, lambda agent: agent.connect(coordinator.port))
    errors: Counter[str] = Counter()
    delivered = 0

    async def take_part(agent: Agent) -> None:
        nonlocal delivered
        try:
            work = await agent.work()
            await agent.blob(work["model"])
            await agent.deliver(work, *updates[agent.name], METRICS)
            delivered += 1
        except (Refused, OSError) as error:
            errors[f"{type(error).__name__}: {error}"[:200]] += 1

    parts = [asyncio.ensure_future(take_part(agent)) for agent in agents]
    await at_rest(coordinator, SETTLE_S)
    note(f"round: {len(agents)} polls are parked")
    swarm, cpu = resource.getrusage(resource.RUSAGE_SELF), coordinator.cpu_s()
    began = time.monotonic()
    until = began + LIMIT_S
    name = await asyncio.to_thread(start_run, coordinator, MODEL_BYTES, clients=len(agents))
    committed = await asyncio.to_thread(wait_for_version, coordinator, name, 1, until=until)
    took = time.monotonic() - began
    used, now = coordinator.cpu_s() - cpu, resource.getrusage(resource.RUSAGE_SELF)
    memory = coordinator.memory()
    for part in parts:
        part.cancel()
    await asyncio.gather(*parts, return_exceptions=True)
    for agent in agents:
        agent.close()
    counted = coordinator.ask_database("SELECT count(*) FROM assignment WHERE run = ? AND state = 'counted'", name)
    contributors = "SELECT json_array_length(contributors) FROM version WHERE run = ? AND n = 1"
    listed = coordinator.ask_database(contributors, name)
    if committed and counted != listed:
        raise RuntimeError(f"{counted} assignments are counted, the version lists {listed} contributors")
    said = f"{counted} of {len(agents)} counted in the database, {delivered} acknowledged"
    if not committed:
        said += f"; given up after {LIMIT_S:.0f} s"
    if errors:
        said += f"; {sum(errors.values())} errors, mostly {errors.most_common(1)[0][0]}"
    ours = now.ru_utime + now.ru_stime - swarm.ru_utime - swarm.ru_stime
    return [
        Figure(name="round", value=took if committed else None, unit="s", below=30, note=said),
        Figure(name="round_failed", value=float(len(agents) - counted), unit="agents", at_most=0),
        Figure(name="round_coordinator_cpu", value=used, unit="s"),
        Figure(name="round_swarm_cpu", value=ours, unit="s", note="of the fake agents, on the same machine"),
        Figure(name="round_peak_rss", value=memory["peak"], unit="MB"),
    ]
