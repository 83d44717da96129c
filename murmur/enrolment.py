"""`murmur client enroll`: an organization's folder from one line that an admin gave it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from murmur.clients.enrolment import enrol
from murmur.clients.settings import TaskEntry
from murmur.protocol.errors import OperatorError


def enroll_here(
    join: str, name: str, directory: Path, *, tasks: dict[str, str], options: dict[str, Any], processes: int
) -> dict[str, str]:
    """Enrol and write client.toml; options are named `task.key`. Returns client, state and fingerprint."""
    entries: dict[str, TaskEntry] = {}
    for task, reference in tasks.items():
        mine = {k.removeprefix(f"{task}."): v for k, v in options.items() if k.startswith(f"{task}.")}
        entries[task] = TaskEntry(reference=reference, options=mine)
    if stray := [key for key in options if key.partition(".")[0] not in tasks]:
        raise OperatorError(f"the option {stray[0]!r} names no task that is enrolled: write --option task.key=value")
    return enrol(join, directory, name=name, tasks=entries, processes=processes).model_dump(mode="json")
