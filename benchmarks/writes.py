"""Acknowledged state writes a second: signs of progress from 64 connections, each answered after its commit."""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
import time
from pathlib import Path

from .process import Coordinator
from .report import Figure, median, note, percentile
from .runs import Scale, start_run
from .swarm import Agent, each, enrol, run

CONNECTIONS = 64


def measure(scale: Scale) -> list[Figure]:
    """Rate and 99th percentile over several runs, beside the rate at which the disk syncs a page."""
    runs, seconds = (1, 0.5) if scale.quick else (5, 6.0)
    with tempfile.TemporaryDirectory(dir=scale.folder) as folder:
        coordinator = Coordinator(Path(folder))
        agents = enrol(coordinator.data, CONNECTIONS)
        with coordinator:
            return run(_measure(coordinator, agents, runs, seconds))


async def _measure(coordinator: Coordinator, agents: list[Agent], runs: int, seconds: float) -> list[Figure]:
    await each(agents, lambda agent: agent.connect(coordinator.port))
    polls = [asyncio.ensure_future(agent.work()) for agent in agents]
    name = await asyncio.to_thread(start_run, coordinator, 4096, clients=len(agents))
    works = {
        work["id"]: (agent, work["fence"]) for agent, work in zip(agents, await asyncio.gather(*polls), strict=True)
    }
    step = dict.fromkeys(works, 0)
    rates: list[float] = []
    slow_ms: list[float] = []
    syncs: list[float] = []

    async def write(assignment: str, until: float, taken: list[float]) -> None:
        agent, fence = works[assignment]
        path = f"/v1/assignments/{assignment}/progress?fence={fence}"
        while (start := time.monotonic()) < until:
            step[assignment] += 1
            body = json.dumps({"phase": "training", "step": step[assignment], "steps": 1 << 30, "bytes": 0}).encode()
            await agent.bearer("POST", path, body)
            taken.append(time.monotonic() - start)

    await asyncio.gather(*(write(a, time.monotonic() + 0.5, []) for a in works))  # warm
    for _ in range(runs):
        syncs.append(_sync_rate(coordinator.data, min(1.0, seconds)))
        taken: list[float] = []
        began = time.monotonic()
        await asyncio.gather(*(write(a, began + seconds, taken) for a in works))
        rates.append(len(taken) / (time.monotonic() - began))
        slow_ms.append(percentile(taken, 0.99) * 1000)
        _check(coordinator, name, step)
        note(f"writes: {rates[-1]:,.0f}/s, p99 {slow_ms[-1]:.0f} ms; the disk syncs {syncs[-1]:,.0f}/s")
    for agent in agents:
        agent.close()
    return [
        Figure(name="writes", value=median(rates), unit="/s", at_least=1500, note=f"{CONNECTIONS} connections"),
        Figure(name="writes_p99", value=median(slow_ms), unit="ms", below=150),
        Figure(name="disk_syncs", value=median(syncs), unit="/s", note="4 KB appended and fdatasync'ed, one at a time"),
    ]


def _check(coordinator: Coordinator, run: str, step: dict[str, int]) -> None:
    """Every step that was acknowledged must be in the database, as another process reads it."""
    for assignment, said in step.items():
        stored = coordinator.ask_database("SELECT step FROM assignment WHERE id = ? AND run = ?", assignment, run)
        if stored != said:
            raise RuntimeError(f"{assignment}: step {said} was acknowledged, the database has {stored}")


def _sync_rate(folder: Path, seconds: float) -> float:
    page = os.urandom(4096)
    count = 0
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            file.write(page)
            os.fdatasync(file.fileno())
            count += 1
        return count / (time.monotonic() - began)
