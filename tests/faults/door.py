"""A TCP proxy that stands between an agent and its coordinator, and does what networks do."""

from __future__ import annotations

import asyncio
import re
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from socket import SO_LINGER, SOL_SOCKET

Address = tuple[str, int]
PATCH = re.compile(rb"PATCH (\S+)\?.*?\r\nupload-offset: (\d+)\r\n.*?\r\n\r\n", re.IGNORECASE | re.DOTALL)


@dataclass
class Weather:
    """What happens to the connections that are made from now on. Nothing does by default."""

    cut: Callable[[], int | None] = lambda: None  # after so many bytes, both ways together, the connection is reset
    reset: Callable[[], bool] = lambda: False  # ended with RST instead of being taken
    bytes_s: float = 0.0  # how many a second pass each way; 0: all
    delay_s: float = 0.0  # of every byte, each way
    again: Callable[[bytes], bool] = lambda request: False  # whether it is sent once more, on a second connection


@dataclass
class Seen:
    """What a door has counted."""

    connections: int = 0
    cuts: int = 0
    repeated: int = 0
    pieces: list[tuple[str, int, int]] = field(default_factory=list)  # of uploads: (path, offset, bytes that came)


class Door:
    """Listens on `port`. `target` may be changed at any time; None: who comes is sent away, as by a machine that is up
    while nobody listens. `hold` keeps new connections waiting instead."""

    def __init__(self) -> None:
        self.target: Address | None = None
        self.weather, self.seen = Weather(), Seen()
        self._held: asyncio.Event
        self._loop = asyncio.new_event_loop()
        self._open: set[asyncio.Task[None]] = set()
        self._forgetting = False
        self._forgotten: list[asyncio.StreamWriter] = []
        self._thread = threading.Thread(target=self._loop.run_forever, name="door", daemon=True)
        self._thread.start()
        self.port = self._call(self._listen())

    def hold(self, on: bool) -> None:
        self._loop.call_soon_threadsafe(self._held.clear if on else self._held.set)

    def drop_all(self) -> None:
        """Reset every connection that is open."""
        self._loop.call_soon_threadsafe(lambda: [task.cancel() for task in self._open])

    def forget_all(self) -> None:
        """Do as a firewall that forgets its connections: agents are sent away, and the coordinator hears nothing."""
        self._call(self._forget())

    def close(self) -> None:
        self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, work):
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(20)

    async def _listen(self) -> int:
        self._held = asyncio.Event()
        self._held.set()
        self._server = await asyncio.start_server(self._enter, "127.0.0.1", 0)
        return self._server.sockets[0].getsockname()[1]

    async def _end(self) -> None:
        self._server.close()
        self._held.set()
        for task in self._open:
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

        for inside in self._forgotten:
            _reset(inside)

    async def _forget(self) -> None:
        self._forgetting, open_now = True, list(self._open)
        for task in open_now:
            task.cancel()
        await asyncio.gather(*open_now, return_exceptions=True)
        self._forgetting = False

    async def _enter(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        self.seen.connections += 1
        inside = None
        try:
            await self._held.wait()
            if self.target is None or self.weather.reset():
                return
            opened, inside = await asyncio.open_connection(*self.target)
            await self._pass(self.weather, reader, writer, opened, inside)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._open.discard(task)
            _reset(writer)
            if inside is not None and self._forgetting:
                self._forgotten.append(inside)
            elif inside is not None:
                _reset(inside)

    async def _pass(self, weather: Weather, reader, writer, opened, inside) -> None:
        left, request, answered = weather.cut(), bytearray(), False

        async def carry(source: asyncio.StreamReader, sink: asyncio.StreamWriter, upward: bool) -> None:
            nonlocal left, request, answered
            while data := await source.read(16_384):
                if upward:
                    if answered:
                        request, answered = bytearray(), False
                    request += data
                    self._count(request, len(data))
                elif not answered:
                    answered = True
                    if weather.again(request):
                        self._loop.create_task(self._repeat(bytes(request)))
                if weather.delay_s:
                    await asyncio.sleep(weather.delay_s)
                if weather.bytes_s:
                    await asyncio.sleep(len(data) / weather.bytes_s)
                if left is not None and (left := left - len(data)) <= 0:
                    sink.write(data[: len(data) + left])
                    await sink.drain()
                    self.seen.cuts += 1
                    return
                sink.write(data)
                await sink.drain()

        tasks = [
            self._loop.create_task(carry(reader, inside, True)),
            self._loop.create_task(carry(opened, writer, False)),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _count(self, request: bytearray, new: int) -> None:
        """Note how many bytes of an upload have come by."""
        if request.startswith(b"PATCH") and (head := PATCH.match(request)):
            path, offset, came = head[1].decode(), int(head[2]), len(request) - head.end()
            pieces = self.seen.pieces
            if pieces and came > new and pieces[-1][:2] == (path, offset):
                pieces[-1] = (path, offset, came)
            elif came:
                pieces.append((path, offset, came))

    async def _repeat(self, request: bytes) -> None:
        """Send a request a second time, with its old signature and nonce, and listen to the answer for a moment."""
        if self.target is None:
            return
        try:
            async with asyncio.timeout(0.5):
                reader, writer = await asyncio.open_connection(*self.target)
                try:
                    writer.write(request)
                    await writer.drain()
                    await reader.read(1 << 16)
                    self.seen.repeated += 1
                finally:
                    _reset(writer)
        except (OSError, TimeoutError):
            return


def _reset(writer: asyncio.StreamWriter) -> None:
    """End a connection as a cut does: with RST, whatever was still on its way."""
    if (socket := writer.get_extra_info("socket")) is not None and socket.fileno() >= 0:
        socket.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
