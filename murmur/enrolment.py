"""`murmur client enroll` and `join`: an organization's folder from one line that an admin gave it, and its tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from murmur.clients.enrolment import enrol
from murmur.clients.settings import TaskEntry
from murmur.clients.task import FLOWER
from murmur.protocol.errors import OperatorError


def enroll_here(
    join: str,
    name: str,
    directory: Path,
    *,
    tasks: dict[str, str],
    options: dict[str, Any],
    processes: int,
    new_key: bool = False,
) -> dict[str, str]:
    """Enrol and write client.toml; options are named `task.key`. Returns client, state and fingerprint.

    new_key: of an enrolled client only the key is made anew; all else stays as client.toml has it.
    """
    entries: dict[str, TaskEntry] = {}
    for task, reference in tasks.items():
        mine = {k.removeprefix(f"{task}."): v for k, v in options.items() if k.startswith(f"{task}.")}
        entries[task] = TaskEntry(reference=reference, options=mine)
    if stray := [key for key in options if key.partition(".")[0] not in tasks]:
        raise OperatorError(f"the option {stray[0]!r} names no task that is enrolled: write --option task.key=value")
    done = enrol(join, directory, name=name, tasks=entries, processes=processes, new_key=new_key)
    return done.model_dump(mode="json")


def flower_tasks(apps: list[str], node_config: dict[str, Any], run_config: dict[str, Any]) -> dict[str, TaskEntry]:
    """Flower apps as tasks, each named as in name=app, or "flower"; all are given the same configuration."""
    if (node_config or run_config) and not apps:
        raise OperatorError("--node-config and --run-config are for the app that --flower names")
    options = {name: given for name, given in (("node_config", node_config), ("run_config", run_config)) if given}
    found: dict[str, TaskEntry] = {}
    for given in apps:
        name, equals, app = given.partition("=")
        name, app = (name, app) if equals else ("flower", given)
        if name in found:
            raise OperatorError(f"two Flower apps are called {name!r}: write --flower name=module:app")
        found[name] = TaskEntry(reference=FLOWER + app, options=options)
    return found
