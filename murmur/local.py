"""A coordinator and clients as processes on this machine, over plain HTTP on loopback: what `demo` and `up` start."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from murmur.client import Client, find_access
from murmur.processes import Children
from murmur.protocol.errors import OperatorError

if TYPE_CHECKING:
    from murmur.clients.settings import Policy, TaskEntry

START_S = 60.0


def start_coordinator(children: Children, data: Path, log: Path, *, port: int = 0) -> tuple[Client, str]:
    """A coordinator that answers, and the link that signs in to its pages once. log: where `children` writes."""
    where = ("--data", str(data), "--port", str(port), "--insecure-http", "--json")
    child = children.start("coordinator", "murmur", "coordinator", "serve", *where)

    def said() -> dict[str, str] | None:
        if child.poll() is not None:
            raise OperatorError(f"the coordinator did not start; {log} says why")
        lines = [line for line in log.read_text().splitlines() if line.startswith("{")]
        return json.loads(lines[0]) if lines else None

    address = until(said, "the coordinator did not start")
    return Client(find_access(data)), address["login"]


def admit(
    client: Client, folder: Path, *, name: str, tasks: Mapping[str, TaskEntry], policy: Policy, processes: int
) -> None:
    """Enrol a client in this folder, and approve its key after comparing fingerprints as an admin would."""
    from murmur.clients.enrolment import enrol

    join = client.invite(name).join
    enrolled = enrol(join, folder, name=name, tasks=tasks, processes=processes, policy=policy)
    shown = {v.id: v.fingerprint for v in client.clients()}
    if shown[name] != enrolled.fingerprint:
        raise OperatorError(f"{name}'s key is not the one that the coordinator was sent")
    client.approve(name)


def start_agent(children: Children, name: str, folder: Path) -> None:
    children.start(name, "murmur.clients.agent", "--dir", str(folder), environment={"OMP_NUM_THREADS": "1"})


def until(look: Callable[[], Any], failure: str) -> Any:
    """What `look` returns once that is something."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        found = look()
        if found is not None:
            return found
        time.sleep(0.05)
    raise OperatorError(f"{failure} within {START_S:.0f} s")


def wait(children: Children) -> None:
    """Until Ctrl-C, which is how this ends well here, or a process ends by itself."""
    with suppress(KeyboardInterrupt):
        while not children.dead():
            time.sleep(0.5)
