"""How a site's bytes leave: TLS that believes one CA, TCP that notices a dead peer, and a way to end it all at once."""

from __future__ import annotations

import logging
import socket
import ssl
import weakref
from pathlib import Path
from typing import Any

import httpx

from ..protocol.errors import OperatorError

log = logging.getLogger(__name__)

Option = tuple[int, int, int] | tuple[int, int, bytes]

# An idle connection is asked after 30 s whether it lives and given up after 30 s more: a firewall that forgets
# connections silently would otherwise hold a long poll for the whole read timeout, again and again.
_KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}


def make_transport(ca: Path | None, *, proxy: str = "", verify: bool = True) -> httpx.HTTPTransport:
    """The transport of an agent. ca: the only CA that is believed; None leaves it to those of the machine.

    verify: False only to fetch the CA certificate itself, whose fingerprint is then compared.
    """
    context = ssl.create_default_context() if ca is None else _only(ca)
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    # The server keeps idle connections for 75 s; a client that gives them up first never writes into a closed one.
    limits = httpx.Limits(keepalive_expiry=60)
    return httpx.HTTPTransport(verify=context, proxy=proxy or None, socket_options=socket_options(), limits=limits)


def _only(ca: Path) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=str(ca))
    except (OSError, ssl.SSLError) as error:
        raise OperatorError(f"{ca} is not a CA certificate that can be read: {error}") from None


def socket_options() -> list[Option]:
    """Options of every connection: keep-alive, and BBR where the kernel lets us choose it.

    At 200 ms round trip and 1 % loss one stream of BBR moves 3.2 MB/s, of CUBIC 0.075 MB/s.
    """
    wanted: list[Option] = [
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    ]
    for name, value in _KEEPALIVE.items():
        if (option := getattr(socket, name, None)) is not None:  # macOS spells one of them otherwise
            wanted.append((socket.IPPROTO_TCP, option, value))
    if (congestion := getattr(socket, "TCP_CONGESTION", None)) is not None:
        wanted.append((socket.IPPROTO_TCP, congestion, b"bbr"))
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as scratch:
        return [option for option in wanted if _taken(scratch, option)]


def _taken(scratch: socket.socket, option: Option) -> bool:
    try:
        scratch.setsockopt(*option)
    except OSError as error:
        log.debug("socket option not available", extra={"option": option[1], "why": error.strerror})
        return False
    return True


class Connections:
    """The sockets that are open, so that a stop need not wait for a long poll to be answered."""

    def __init__(self) -> None:
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()

    def trace(self, event: str, info: dict[str, Any]) -> None:
        """httpcore's "trace" extension: hears of each connection that is made, before and after TLS."""
        if event.endswith((".connect_tcp.complete", ".start_tls.complete")):
            connected = info["return_value"].get_extra_info("socket")
            if isinstance(connected, socket.socket):
                self._sockets.add(connected)

    def shut(self) -> None:
        """End every connection; who reads from one gets an error at once, in whatever thread."""
        for connected in list(self._sockets):
            try:
                # Not SSLSocket.shutdown: it takes the TLS object away from under the thread that reads from it.
                socket.socket.shutdown(connected, socket.SHUT_RDWR)
            except OSError as error:
                log.debug("connection was closed already", extra={"why": error.strerror})
