"""`murmur client ranks`: the processes of a client of several nodes, as torchrun or srun start them."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Annotated

import typer

from murmur.output import told


def ranks(
    directory: Annotated[Path, typer.Option("--dir", help="the agent's folder, on rank 0's machine")] = Path(
        "murmur-client"
    ),
    task: Annotated[str, typer.Option(help="name in client.toml; not needed where there is one")] = "",
    rendezvous: Annotated[str, typer.Option(help="host:port where ranks meet, in place of the launcher's")] = "",
    wait_s: Annotated[float, typer.Option(min=1, help="seconds that an agent which is not there is waited for")] = 600,
) -> None:
    """Train on one of a client's several nodes: start it on all of them with torchrun --no-python, or with srun.

    Rank 0 must be on the agent's machine. It ends in good order when the agent does, and with 1 when a rank was lost:
    then start it again, as a loop in the batch script can.
    """
    from murmur.clients import logs
    from murmur.clients.places import place

    with told():
        found = place(os.environ, rendezvous)
        logs.to_stderr(logging.INFO if found.rank == 0 else logging.WARNING)
        path = _socket(directory, task) if found.rank == 0 else None
        from murmur.clients.engine.nodes import serve

        code = serve(found, path, wait_s=wait_s)
    raise typer.Exit(code)


def _socket(directory: Path, task: str) -> Path:
    from murmur.clients.nodes import socket_path
    from murmur.clients.settings import load_settings
    from murmur.protocol.errors import OperatorError

    settings = load_settings(directory)
    names = sorted(settings.tasks)
    if not task and len(names) == 1:
        (task,) = names
    if task not in settings.tasks:
        raise OperatorError(f"--task {task or '…'}: client.toml has {', '.join(names) or 'no task'}")
    return socket_path(settings.workdir / "trainers" / task)
