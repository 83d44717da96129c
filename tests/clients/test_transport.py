import threading
import time

import pytest

from murmur.clients.identity import Identity
from murmur.clients.link import Link
from murmur.clients.transport import socket_options
from murmur.protocol.errors import (
    Unavailable,
)

from .scripted import KEY, POLL, ok
from .servers import Authority, serve


@pytest.mark.parametrize("tls", [False, True], ids=["http", "tls"])
def test_a_stop_does_not_wait_for_a_long_poll(tmp_path, tls):
    parked, leave = threading.Event(), threading.Event()
    authority = Authority.new()
    (tmp_path / "ca.pem").write_bytes(authority.pem)

    def handle(request):
        if request.url.path != "/v1/token":
            parked.set()
            leave.wait(120)
        return ok({"token": "t", "expires_s": 1})

    with serve(handle, certificate=authority.issue(tmp_path / "server.pem") if tls else None) as url:
        link = Link(url, name="alpha", identity=Identity(KEY), ca=tmp_path / "ca.pem" if tls else None)
        failed = []

        def poll():
            try:
                link.poll(POLL)
            except Unavailable as error:
                failed.append(error)

        thread = threading.Thread(target=poll)
        thread.start()
        assert parked.wait(60)
        link.abort()
        thread.join(60)
        assert len(failed) == 1  # while the poll is held
        leave.set()
        with pytest.raises(Unavailable):
            link.poll(POLL)
        link.close()


def test_an_abort_ends_a_pause():
    link = Link("http://127.0.0.1:1", name="alpha", identity=Identity(KEY), draw=lambda: 1.0)  # nobody listens there
    failed = []

    def poll():
        try:
            link.poll(POLL)
        except Unavailable as error:
            failed.append(error)

    thread = threading.Thread(target=poll)
    thread.start()
    time.sleep(0.2)
    link.abort()
    thread.join(60)
    assert len(failed) == 1
    link.close()


def test_connections_are_kept_alive_by_the_kernel():
    import socket

    options = {(level, name): value for level, name, value in socket_options()}
    assert options[(socket.SOL_SOCKET, socket.SO_KEEPALIVE)] == 1
    assert options[(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)] == 30
