"""The work of an upload and of a download on a bare socket: what the coordinator's transfers are measured against.

A process of its own, as the coordinator is. Each connection sends one line: `up SIZE` and the bytes, or `down PATH`.
"""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

PIECE_BYTES = 1 << 20


def serve(folder: Path) -> None:
    """Serve one connection after another; prints the port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        while True:
            connection, _ = listener.accept()
            with connection:
                word, _, what = _line(connection).partition(" ")
                if word == "up":
                    connection.sendall(_receive(connection, int(what), folder).encode())
                else:
                    _send(connection, Path(what))


def _receive(connection: socket.socket, size: int, folder: Path) -> str:
    """Receive, write, hash, sync: the SHA-256 of what lies on disk."""
    digest, piece = hashlib.sha256(), memoryview(bytearray(PIECE_BYTES))
    with tempfile.NamedTemporaryFile(dir=folder, buffering=0) as file:
        while size and (count := connection.recv_into(piece)):
            file.write(piece[:count])
            digest.update(piece[:count])
            size -= count
        os.fsync(file.fileno())
    return digest.hexdigest()


def _send(connection: socket.socket, path: Path) -> None:
    piece = memoryview(bytearray(PIECE_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(piece):
            connection.sendall(piece[:count])


def _line(connection: socket.socket) -> str:
    line = b""
    while not line.endswith(b"\n"):
        line += connection.recv(1)
    return line.decode().strip()


class RawServer:
    """The server above, running."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-m", "benchmarks.raw", str(folder)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())

    def __enter__(self) -> RawServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
