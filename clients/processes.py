"""The processes of a trainer: forked from a server that has torch loaded, spoken to over one socket pair each."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import sys
import threading
from collections.abc import Generator, Mapping
from multiprocessing import connection, forkserver, get_context
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import ModuleType
from typing import Any

# Optimizers import torch._dynamo at their first step, which takes a second: paid here, before ranks are forked.
PRELOAD = ["torch._dynamo", "murmur.clients.trainer", "murmur.clients.engine.worker"]

_context = get_context("forkserver")
_main_hidden = threading.Lock()
_server_starts = threading.Lock()
_number = itertools.count()


def start_fork_server() -> None:
    """Start the one fork server of this process, if it does not run; it loads torch while the caller goes on."""
    with _server_starts:
        _context.set_forkserver_preload(PRELOAD)
        own = os.environ.copy()
        os.environ.update(
            # OpenMP's threads spin while they wait, unless told not to before torch is loaded. On cores that several
            # agents share, steps of a small model were measured 2 to 15 times slower so.
            OMP_WAIT_POLICY=own.get("OMP_WAIT_POLICY", "PASSIVE"),
            # The server finds what this process finds, and nothing that lies in the current folder by chance;
            # Python 3.11 does not hand its search path on to what is preloaded.
            PYTHONPATH=os.pathsep.join(filter(None, sys.path)),
            PYTHONSAFEPATH="1",
        )
        try:
            forkserver.ensure_running()
        finally:
            _set_environment(own)


def _set_environment(wanted: Mapping[str, str]) -> None:
    for name in os.environ.keys() - wanted.keys():
        del os.environ[name]
    os.environ.update(wanted)


class RankProcesses:
    """One group of ranks, from its start to its end; a new group is a new object, so that nothing meets the dead."""

    def __init__(
        self, world: int, reference: str, options: Mapping[str, Any], workdir: Path, log_file: Path | None
    ) -> None:
        self.world, self.speakers, self._what = world, world, (reference, dict(options))
        self._log_file = log_file
        self._rendezvous = workdir / f"rendezvous.{os.getpid()}.{next(_number)}"
        self._processes: list[ForkServerProcess] = []
        self._connections: list[Any] = []  # Connection, which typeshed tells from its Windows twin only by platform
        self._gone: set[int] = set()
        self._sending = threading.Lock()

    def start(self) -> None:
        """Fork the ranks; blocks until the fork server has loaded torch."""
        start_fork_server()  # it may have died since
        self._tidy()
        reference, options = self._what
        for rank in range(self.world):
            ours, theirs = _context.Pipe()
            args = (rank, self.world, reference, options, theirs, self._rendezvous, self._log_file, os.environ.copy())
            process = _context.Process(target=_enter, args=args, name=f"murmur rank {rank}")
            with _without_main():
                process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)

    def send(self, message: dict[str, Any]) -> None:
        """To every rank, from any thread. A rank that died is passed over: `hear` tells of it."""
        data = json.dumps(message).encode()
        with self._sending:
            for link in self._connections:
                with contextlib.suppress(OSError):
                    link.send_bytes(data)

    def hear(self, timeout_s: float) -> list[tuple[int, dict[str, Any]]]:
        """(rank, message) as they came, {"died": how, "signal": number} after a rank's last one; empty after timeout_s.

        signal: 0 for a rank that exited by itself.
        """
        heard: list[tuple[int, dict[str, Any]]] = []
        listened = [r for r in range(len(self._processes)) if r not in self._gone]
        links = [self._connections[r] for r in listened]
        ready = set(connection.wait([*links, *(self._processes[r].sentinel for r in listened)], timeout_s))
        for rank in listened:
            link, process = self._connections[rank], self._processes[rank]
            # The sentinel alone is not enough: a process's last words may still lie in the socket.
            over = process.sentinel in ready
            try:
                while link.poll():
                    heard.append((rank, json.loads(link.recv_bytes())))
            except (EOFError, OSError):
                over = True
            if over:
                self._gone.add(rank)
                process.join(1.0)
                code = process.exitcode
                heard.append((rank, {"died": _how(code), "signal": -code if code and code < 0 else 0}))
        return heard

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(process.pid for process in [*self._processes] if process.pid)

    @property
    def alive(self) -> bool:
        return not self._gone and all(process.is_alive() for process in self._processes)

    def kill(self) -> None:
        """From any thread, and again as one likes; `end` cleans up."""
        for process in [*self._processes]:
            with contextlib.suppress(ValueError):  # `end` was faster
                process.kill()

    def end(self) -> None:
        """Kill what is left and wait for it."""
        self.kill()
        for process, link in zip(self._processes, self._connections, strict=True):
            process.join()
            process.close()
            link.close()
        self._processes, self._connections = [], []
        self._rendezvous.unlink(missing_ok=True)

    def _tidy(self) -> None:
        """Take away the meeting points of agents that were killed."""
        for left in self._rendezvous.parent.glob("rendezvous.*.*"):
            pid = left.name.split(".")[1]
            if pid.isdecimal() and not Path("/proc", pid).exists():
                left.unlink(missing_ok=True)


def _how(exitcode: int | None) -> str:
    if exitcode is None:
        return "it closed its connection"
    if exitcode >= 0:
        return f"it exited with {exitcode}"
    with contextlib.suppress(ValueError):
        name = signal.Signals(-exitcode).name
        hint = "; the kernel does that when memory runs out" if name == "SIGKILL" else ""
        return f"it was ended by {name}{hint}"
    return f"it was ended by signal {-exitcode}"


@contextlib.contextmanager
def _without_main() -> Generator[None]:
    """Hide the program's main module: multiprocessing would import it again, CLI and all, in every rank."""
    with _main_hidden:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = main


def _enter(
    rank: int,
    world: int,
    reference: str,
    options: Mapping[str, Any],
    link: connection.Connection,
    rendezvous: Path,
    log_file: Path | None,
    environment: dict[str, str],
) -> None:
    """A rank's first function; here and not in the engine, so that the agent can name it without torch."""
    _set_environment(environment)  # the agent's of now, not the fork server's
    if log_file is not None:
        target = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(target, 1)
        os.dup2(target, 2)
        os.close(target)
    from .engine.worker import main

    main(rank, world, reference, options, link, rendezvous)
