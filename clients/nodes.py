"""Ranks on several machines, as the agent sees them: a launcher starts them, and rank 0 comes to the agent's socket.

    agent ── Unix socket ── rank 0 ── torch.distributed ── rank 1 .. rank n-1, here and on other nodes

No torch here. The ranks' own side is `engine.nodes`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ..protocol.errors import OperatorError
from .job import Cancelled

log = logging.getLogger(__name__)

SOCKET = "ranks.sock"  # in the folder of a task's trainer
LONGEST_PATH = 107  # bytes of a Unix socket's
ASK_S = 0.25  # between two looks whether the job is still wanted
HELLO_S = 5.0  # from a connection to its first message
WAIT_S = 120.0  # for ranks that are to come, or come again, before a job fails for want of them


class Nodes:
    """Where the ranks of one task come to: one group at a time, which stays as long as it lives.

    nodes: machines that there must be. how: the command that starts them, for people who have not.
    """

    def __init__(self, folder: Path, nodes: int, how: str, wait_s: float = WAIT_S) -> None:
        self._nodes, self._how, self._wait_s = nodes, how, wait_s
        self._path = socket_path(folder)
        self._path.unlink(missing_ok=True)
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o177)
        try:
            self._listening.bind(str(self._path))
        finally:
            os.umask(before)
        self._listening.listen(4)
        log.info("waiting for this client's ranks", extra={"nodes": nodes, "start": how})

    def meet(self, reference: str, options: Mapping[str, Any], given_up: Callable[[], bool]) -> NodeRanks:
        """The next group of ranks to come, for this task.

        Raises OperatorError where none does in time, or one from another number of nodes; Cancelled when given up.
        """
        until = time.monotonic() + self._wait_s
        self._listening.settimeout(ASK_S)
        while time.monotonic() < until:
            if given_up():
                raise Cancelled("the job was called off before its ranks were there")
            try:
                link, _ = self._listening.accept()
            except TimeoutError:
                continue
            link.setblocking(True)
            group = NodeRanks(Connection(link.detach()), {"reference": reference, "options": dict(options)})
            if group.hello is None or not group.alive:
                group.end()  # it came and died while nobody looked
            elif group.nodes != self._nodes:
                group.end()
                raise OperatorError(
                    f"client.toml says nodes = {self._nodes}, and ranks of {group.nodes} have come: start them with "
                    f"{self._how} on {self._nodes}, or change nodes"
                )
            else:
                return group
        raise OperatorError(f"no ranks have come from this client's {self._nodes} nodes: start them with {self._how}")

    def close(self) -> None:
        self._listening.close()
        self._path.unlink(missing_ok=True)


class NodeRanks:
    """A group that a launcher has started; to the trainer it is what `processes.RankProcesses` is."""

    speakers = 1  # rank 0 tells for all

    def __init__(self, link: Connection, task: Mapping[str, Any]) -> None:
        self._link, self._task = link, dict(task)
        self._sending, self._over = threading.Lock(), False
        self.hello: dict[str, Any] | None = None
        with contextlib.suppress(OSError, EOFError, ValueError):
            if link.poll(HELLO_S):
                self.hello = json.loads(link.recv_bytes())["hello"]

    @property
    def world(self) -> int:
        return int((self.hello or {}).get("world", 0))

    @property
    def nodes(self) -> int:
        return int((self.hello or {}).get("nodes", 0))

    @property
    def pids(self) -> tuple[int, ...]:
        """Rank 0's; the others may be on other machines."""
        return (int((self.hello or {}).get("pid", 0)),)

    @property
    def alive(self) -> bool:
        if self._over:
            return False
        try:
            if not self._link.poll():
                return True
            # Between two jobs rank 0 says nothing, but that a rank has failed or that it is gone.
            self._link.recv_bytes()
        except (OSError, EOFError):
            pass
        return False

    def send(self, message: dict[str, Any]) -> None:
        """To rank 0, from any thread, which hands it on; a job goes with the task that it is of."""
        whole = message | {"task": self._task} if "job" in message else message
        with self._sending, contextlib.suppress(OSError):
            self._link.send_bytes(json.dumps(whole).encode())

    def hear(self, timeout_s: float) -> list[tuple[int, dict[str, Any]]]:
        """As `RankProcesses.hear`. A message with a "rank" is about that one."""
        heard: list[tuple[int, dict[str, Any]]] = []
        if self._over:
            time.sleep(timeout_s)
            return heard
        try:
            while self._link.poll(0.0 if heard else timeout_s):
                message = json.loads(self._link.recv_bytes())
                heard.append((int(message.get("rank", 0)), message))
        except (EOFError, OSError):
            self._over = True
            heard.append((0, {"died": "the ranks on this client's nodes are gone", "signal": 1}))
        return heard

    def kill(self) -> None:
        """Tell them to end: at once where they work, and in good order where they wait."""
        self.send({"end": True})

    def end(self) -> None:
        self.kill()
        self._over = True
        self._link.close()


def socket_path(folder: Path) -> Path:
    """The socket's path in a trainer's folder; raises OperatorError where the system could not take it."""
    path = folder / SOCKET
    if len(os.fsencode(path)) > LONGEST_PATH:
        raise OperatorError(
            f"{path} is longer than the {LONGEST_PATH} bytes of a socket's path: set workdir to another"
        )
    return path
