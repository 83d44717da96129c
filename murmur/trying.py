"""`murmur up`: a coordinator with its dashboard and one client for a task, on this machine, to try one's own data.

The folder keeps both: the next `up` goes on with what is there. Plain HTTP on loopback and a client that takes part
alone are for trying only; `murmur coordinator init` begins the real thing.
"""

from __future__ import annotations

import shlex
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from murmur.client import Client
from murmur.local import admit, start_agent, start_coordinator, until, wait
from murmur.output import out
from murmur.processes import Children
from murmur.protocol.errors import OperatorError

NAME, TASK = "local", "my-task"  # of the client, and what a new recipe calls the task


def up(folder: Path, task: str, options: dict[str, Any], *, port: int) -> None:
    """Start both and wait for Ctrl-C; no process outlives it. task: "file.py:Class"; "" where the client is there."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends all children, as Ctrl-C does
    folder = folder.resolve()
    logs, place = folder / "logs", folder / "client"
    known = (place / "client.toml").exists()
    if known == bool(task):
        raise OperatorError(
            f"{place} has a client already, whose tasks stand in its client.toml: leave the task out"
            if known
            else "which task? murmur up task.py:Class"
        )
    with Children(logs) as children:
        client, login = start_coordinator(children, folder / "coordinator", logs / "coordinator.log", port=port)
        _client(client, place, task, options)
        start_agent(children, NAME, place)
        until(lambda: any(v.online for v in client.clients()) or children.dead() or None, "the client did not come")
        if not children.dead():
            out.print(f"dashboard: [bold]{login}[/]  (the link logs in once)", soft_wrap=True)
            out.print(f"[bold]export MURMUR_DATA={folder / 'coordinator'}[/], and in that shell:", soft_wrap=True)
            out.print(shlex.join(_start(place)), soft_wrap=True, markup=False, highlight=False)
            wait(children)
        if dead := children.dead():
            raise OperatorError(f"a process ended with code {dead[0]}; see {logs}")


def _client(client: Client, place: Path, task: str, options: dict[str, Any]) -> None:
    """Enrol the client, or make sure that the one there will find this coordinator."""
    from murmur.clients.settings import Policy, TaskEntry, load_settings

    if not task:
        if (before := load_settings(place).coordinator) != client.url:
            raise OperatorError(f"the client knows its coordinator at {before}: give --port as it was then")
        return
    tasks = {TASK: TaskEntry(reference=task, options=options)}
    admit(client, place, name=NAME, tasks=tasks, policy=Policy(require_secure=False), processes=1)


def _start(place: Path) -> Iterator[str]:
    """The command that trains the client's first task by a recipe of whatever name."""
    from murmur.clients.settings import load_settings

    (name, entry), *_ = load_settings(place).tasks.items()
    yield from ("murmur", "run", "start", "recipe.toml", "--watch", "--task", entry.reference)
    for key, value in entry.options.items():
        yield from ("--option", f"{key}={value}")
    for change in (f"task={name}", "secure.on=false", "cohort.min=1"):
        yield from ("--set", change)
