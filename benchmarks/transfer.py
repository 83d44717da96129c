"""Upload and download of a 1 GiB blob against the same work on a bare socket, and the memory that they take."""

from __future__ import annotations

import asyncio
import hashlib
import http.client
import json
import os
import socket
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from murmur.clients.link import CHUNK_BYTES, PIECE_BYTES
from murmur.protocol import PROTOCOL_VERSION

from .process import Coordinator
from .raw import RawServer
from .report import Figure, median, note
from .runs import METRICS, Scale, layout_of, start_run, write_model
from .swarm import Agent, Refused, each, enrol, run


def measure(scale: Scale) -> list[Figure]:
    """Ratios of rates, of runs that alternate with those of the bare socket; each update is a new one."""
    runs, size = (1, 16 << 20) if scale.quick else (5, 1 << 30)
    with tempfile.TemporaryDirectory(dir=scale.folder) as name:
        folder = Path(name)
        coordinator = Coordinator(folder)
        agents = enrol(coordinator.data, runs + 1)
        with coordinator, RawServer(folder) as raw:
            started = start_run(coordinator, size, clients=len(agents))
            works = run(_hand_out(coordinator, agents))  # one client more than uploads: nothing is summed meanwhile
            found = _measure(coordinator, raw, agents[:runs], works, size)
            with coordinator.admin() as admin:
                admin.stop_run(started)
    return found


async def _hand_out(coordinator: Coordinator, agents: list[Agent]) -> list[dict[str, Any]]:
    await each(agents, lambda agent: agent.connect(coordinator.port))
    works = await asyncio.gather(*(agent.work() for agent in agents))
    for agent in agents:
        agent.close()
    return works


def _measure(
    coordinator: Coordinator, raw: RawServer, agents: list[Agent], works: list[dict[str, Any]], size: int
) -> list[Figure]:
    update = coordinator.data.parent / "update"
    write_model(update, size)  # an update to this model has its layout
    header, wire = len(layout_of(size).header()), update.stat().st_size
    idle = coordinator.memory()["anonymous"]
    ups: list[tuple[float, float]] = []
    downs: list[tuple[float, float]] = []
    completes: list[float] = []
    grown = dict.fromkeys(("upload", "download"), 0.0)
    peak = 0.0
    for i, (agent, work) in enumerate(zip(agents, works, strict=False)):
        _mark(update, header, float(i))
        with update.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        theirs = _timed(partial(_raw_upload, raw, update, wire, sha256))
        with _Watch(coordinator) as watch:
            began = time.monotonic()
            sent = _upload(coordinator, agent, work, update, wire, sha256)
            done = time.monotonic()
        grown["upload"], peak = max(grown["upload"], watch.grown), max(peak, watch.peak)
        ups.append((theirs, done - began))
        completes.append(done - sent)
        blob = coordinator.data / "blobs" / "sha256" / work["model"][:2] / work["model"]
        theirs = _timed(partial(_raw_download, raw, blob))
        with _Watch(coordinator) as watch:
            ours = _timed(partial(_download, coordinator, agent, work["model"]))
        grown["download"], peak = max(grown["download"], watch.grown), max(peak, watch.peak)
        downs.append((theirs, ours))
        rates = [f"{wire / s / 1e6:,.0f}" for s in (*ups[-1], *downs[-1])]
        note("transfer, MB/s: upload raw {}, ours {}; download raw {}, ours {}".format(*rates))
    kept = coordinator.memory()["anonymous"] - idle
    growth = max(grown["upload"], grown["download"])
    said = f"{wire / (1 << 20):,.0f} MiB; median of {len(ups)} alternating runs"
    return [
        Figure(name="upload", value=median([r / o for r, o in ups]), unit="x bare", at_least=0.9, note=said),
        Figure(name="download", value=median([r / o for r, o in downs]), unit="x bare", at_least=0.8, note=said),
        Figure(name="transfer_rss_growth", value=growth, unit="MB", below=80, note="peak RSS above that before it"),
        Figure(name="transfer_peak_rss", value=peak, unit="MB"),
        Figure(name="upload_rss_growth", value=grown["upload"], unit="MB"),
        Figure(name="download_rss_growth", value=grown["download"], unit="MB"),
        Figure(name="transfer_kept", value=kept, unit="MB", note="anonymous, after"),
        Figure(name="upload_rate", value=median([wire / o / 1e6 for _, o in ups]), unit="MB/s"),
        Figure(name="upload_rate_bare", value=median([wire / r / 1e6 for r, _ in ups]), unit="MB/s"),
        Figure(name="upload_complete", value=median(completes), unit="s", note="of it, after the last byte was taken"),
        Figure(name="download_rate", value=median([wire / o / 1e6 for _, o in downs]), unit="MB/s"),
        Figure(name="download_rate_bare", value=median([wire / r / 1e6 for r, _ in downs]), unit="MB/s"),
    ]


class _Watch:
    """How far the coordinator's resident memory rose, at its peak, above what it was before."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self.grown = self.peak = 0.0

    def __enter__(self) -> _Watch:
        self._coordinator.forget_peak()
        self._before = self._coordinator.memory()["rss"]
        return self

    def __exit__(self, *_: object) -> None:
        self.peak = self._coordinator.memory()["peak"]
        self.grown = self.peak - self._before


def _upload(coordinator: Coordinator, agent: Agent, work: dict[str, Any], path: Path, size: int, sha256: str) -> float:
    """Offer, send in the pieces of `clients.link`, complete; returns when the last piece was answered."""
    at, fence = f"/v1/assignments/{work['id']}", work["fence"]
    with _Http(coordinator.port, agent) as ask, path.open("rb", buffering=0) as file:
        ask.signed(f"{at}/upload", {"fence": fence, "sha256": sha256, "size": size})
        for offset in range(0, size, PIECE_BYTES):
            length = min(PIECE_BYTES, size - offset)
            ask.patch(f"{at}/upload?fence={fence}", file, offset, length)
        sent = time.monotonic()
        ask.signed(f"{at}/complete", {"fence": fence, "sha256": sha256, "weight": 1.0, "metrics": METRICS})
        return sent


def _download(coordinator: Coordinator, agent: Agent, sha256: str) -> None:
    with socket.create_connection(("127.0.0.1", coordinator.port)) as connection:
        connection.sendall(agent.request("GET", f"/v1/blobs/{sha256}"))
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        if answer.status != 200:
            raise Refused(f"{answer.status}: {answer.read(300)!r}")
        _drain(answer.readinto)


def _raw_upload(raw: RawServer, path: Path, size: int, sha256: str) -> None:
    with socket.create_connection(("127.0.0.1", raw.port)) as connection, path.open("rb", buffering=0) as file:
        connection.sendall(f"up {size}\n".encode())
        _pour(file, connection, size)
        if connection.recv(64, socket.MSG_WAITALL).decode() != sha256:
            raise RuntimeError("the bare socket's server received something else")


def _raw_download(raw: RawServer, path: Path) -> None:
    with socket.create_connection(("127.0.0.1", raw.port)) as connection:
        connection.sendall(f"down {path}\n".encode())
        _drain(connection.recv_into)


def _drain(read_into: Callable[[Any], int]) -> None:
    piece = memoryview(bytearray(1 << 20))
    while read_into(piece):
        pass


def _pour(file: BinaryIO, connection: socket.socket, size: int) -> None:
    """Send so many bytes of a file, in the pieces in which agents read theirs."""
    piece = memoryview(bytearray(CHUNK_BYTES))
    while size:
        count = file.readinto(piece[: min(CHUNK_BYTES, size)])  # type: ignore[attr-defined]
        connection.sendall(piece[:count])
        size -= count


class _Http:
    """One connection of one agent, kept alive, in plain blocking calls."""

    def __init__(self, port: int, agent: Agent) -> None:
        self._agent = agent
        self._http = http.client.HTTPConnection("127.0.0.1", port)

    def __enter__(self) -> _Http:
        self._http.connect()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def signed(self, path: str, message: dict[str, Any]) -> None:
        body = json.dumps(message).encode()
        lines = self._agent.signature("POST", path, body).strip().split("\r\n")
        headers = {"Murmur-Protocol": str(PROTOCOL_VERSION), **dict(line.split(": ", 1) for line in lines)}
        self._http.request("POST", path, body, headers)
        self._answered()

    def patch(self, path: str, file: BinaryIO, offset: int, length: int) -> None:
        about = f"Upload-Offset: {offset}\r\nContent-Type: application/offset+octet-stream\r\n"
        self._http.sock.sendall(self._agent.request("PATCH", path, length, about))
        _pour(file, self._http.sock, length)
        answer = http.client.HTTPResponse(self._http.sock, method="PATCH")
        answer.begin()
        body = answer.read()
        if answer.status >= 300 or json.loads(body)["offset"] != offset + length:
            raise Refused(f"{answer.status}: {body[:300]!r}")

    def _answered(self) -> None:
        answer = self._http.getresponse()
        body = answer.read()
        if answer.status >= 300:
            raise Refused(f"{answer.status}: {body[:300]!r}")


def _mark(path: Path, header: int, value: float) -> None:
    """Make an update differ from the one before, in its first number."""
    with path.open("r+b") as file:
        os.pwrite(file.fileno(), np.float32(value).tobytes(), header)


def _timed(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began
