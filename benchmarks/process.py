"""A coordinator in a process of its own, started as a user starts it, and what /proc says of it."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from murmur.client import Client, find_access

START_S = 60.0
AT_REST = 0.1  # of a core
SPARE_FILES = 500  # beside one socket per agent: the database's connections, libraries, blobs
_TICKS = os.sysconf("SC_CLK_TCK")


class Coordinator:
    """`murmur coordinator serve` over a data folder; it can be killed and started again on the same port."""

    def __init__(self, folder: Path) -> None:
        self.data = folder / "coordinator"
        self.data.mkdir(parents=True, exist_ok=True)
        self.port = _free_port()
        self._log = folder / "coordinator.log"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Coordinator:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self, *, wait: bool = True) -> None:
        ready = self.data / "operator.json"
        ready.unlink(missing_ok=True)
        command = [sys.executable, "-m", "murmur", "coordinator", "serve", "--insecure-http"]
        command += ["--data", str(self.data), "--port", str(self.port)]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        until = time.monotonic() + START_S
        while wait and not ready.exists():
            if self._process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"the coordinator did not start:\n{self.log()}")
            time.sleep(0.02)

    def kill(self) -> None:
        """SIGKILL, as a power cut or the kernel's out-of-memory killer would."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        if self._process is None or self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self.kill()

    def admin(self) -> Client:
        return Client(find_access(self.data))

    def log(self) -> str:
        return self._log.read_text()[-3000:]

    def ask_database(self, question: str, *values: object) -> Any:
        """The first column of the first row, read from the file itself and not through the coordinator."""
        with closing(sqlite3.connect(f"file:{self.data / 'murmur.db'}?mode=ro", uri=True, timeout=30)) as connection:
            row = connection.execute(question, values).fetchone()
        return row[0] if row else None

    def column(self, question: str, *values: object) -> list[Any]:
        with closing(sqlite3.connect(f"file:{self.data / 'murmur.db'}?mode=ro", uri=True, timeout=30)) as connection:
            return [row[0] for row in connection.execute(question, values)]

    # What /proc says

    def memory(self) -> dict[str, float]:
        """Resident memory in MB: all of it, its anonymous part, and the peak since `forget_peak`."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        found = {name: value for name, _, value in (line.partition(":") for line in lines)}
        names = {"rss": "VmRSS", "anonymous": "RssAnon", "peak": "VmHWM"}
        return {name: int(found[key].split()[0]) * 1024 / 1e6 for name, key in names.items()}

    def forget_peak(self) -> None:
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    def cpu_s(self) -> float:
        """CPU seconds, user and system, of all threads so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    def helpers_rss_mb(self) -> float:
        """Resident memory of its child processes: the one that sums."""
        pids = _children(self.pid)
        total = 0
        for pid in pids:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            total += sum(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))
        return total * 1024 / 1e6


def allow_files(connections: int) -> None:
    """Let this process, and those that it starts, hold so many sockets; exits with a clear word where it cannot."""
    wanted = connections + SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise SystemExit(
            f"{connections} agents need {wanted} open files in each process; the hard limit here is {hard}: "
            f"raise it (ulimit -Hn {wanted}, or LimitNOFILE= of the unit), or measure fewer with --agents"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


async def at_rest(coordinator: Coordinator, most_s: float) -> None:
    """Wait until the coordinator has taken in all that it was sent, which shows in its CPU; at most so long."""
    until = time.monotonic() + most_s
    while time.monotonic() < until:
        before = coordinator.cpu_s()
        await asyncio.sleep(1)
        if coordinator.cpu_s() - before < AT_REST:
            return


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _children(pid: int) -> Sequence[int]:
    found = [int(n) for task in Path(f"/proc/{pid}/task").iterdir() for n in (task / "children").read_text().split()]
    return [child for child in found if Path(f"/proc/{child}").exists()]
