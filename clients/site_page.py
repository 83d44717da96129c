"""The site's own page: served by the agent on 127.0.0.1 to whoever may read the client's folder.

`murmur client site` makes a link that signs in once, from a key in that folder which is new at each start. Nothing of
the server is loaded before the first browser comes.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import secrets
import select
import socket
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ..protocol.errors import OperatorError
from .shared import Site

if TYPE_CHECKING:
    import uvicorn

log = logging.getLogger(__name__)

FILE = "site.json"
HOST = "127.0.0.1"
LINK_S = 600


class SitePage:
    """The page of one agent: `start` it, and `close` it in the end."""

    def __init__(self, site: Site, port: int) -> None:
        """port: 0 takes a free one. Raises OperatorError for one that is taken."""
        self._site = site
        self._key = secrets.token_hex(32)
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((HOST, port))
        except OSError as error:
            self._socket.close()
            raise OperatorError(
                f"this site's page cannot have port {port}: {error.strerror}. Give [site] port another one, 0 for any, "
                'or "off"'
            ) from None
        self._socket.listen(64)
        self.port: int = self._socket.getsockname()[1]
        self.url = f"http://{HOST}:{self.port}"
        self._path = site.settings.directory / FILE
        self._closing = threading.Event()
        self._server: uvicorn.Server | None = None
        self._thread = threading.Thread(target=self._serve, name="site page", daemon=True)

    def start(self) -> None:
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump({"url": self.url, "key": self._key}, file)
        self._thread.start()

    def link(self) -> str:
        """An address that signs one browser in, once, within ten minutes."""
        return _link(self.url, self._key)

    def close(self) -> None:
        self._closing.set()
        if self._server is not None:
            self._server.should_exit = True
        if self._thread.is_alive():
            self._thread.join(3.0)
        self._socket.close()
        self._path.unlink(missing_ok=True)

    def _serve(self) -> None:
        while not self._closing.is_set():
            if select.select([self._socket], [], [], 0.25)[0]:
                break
        else:
            return
        import uvicorn

        from .site_app import site_app

        app = site_app(self._site, port=self.port, key=self._key, closing=self._closing.is_set)
        config = uvicorn.Config(
            app, ws="none", lifespan="off", log_config=None, log_level="warning", access_log=False,
            server_header=False, timeout_graceful_shutdown=1,
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        if not self._closing.is_set():
            self._server.run(sockets=[self._socket])


def new_link(directory: Path) -> str:
    """A link to the page of the agent that runs from a folder; raises OperatorError when there is none."""
    try:
        found = json.loads((directory / FILE).read_text())
        return _link(str(found["url"]), str(found["key"]))
    except FileNotFoundError:
        raise OperatorError(
            f"no page is served from {directory}: start the agent (murmur client join --dir {directory}), and see that "
            '[site] port in its client.toml is not "off"'
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OperatorError(f"cannot read {directory / FILE}: {error}; start the agent anew") from None


def _link(url: str, key: str) -> str:
    text = f"{int(time.time()) + LINK_S}.{secrets.token_hex(8)}"
    return f"{url}/login?link={text}.{_mac(text, key)}"


def is_link(text: str, key: str, now: float) -> bool:
    """Whether a link is of this key and not too old; that it was not used before, the caller knows."""
    about, _, mac = text.rpartition(".")
    until = about.partition(".")[0]
    return hmac.compare_digest(mac.encode(), _mac(about, key).encode()) and until.isdecimal() and int(until) >= now


def _mac(text: str, key: str) -> str:
    return hmac.new(key.encode(), text.encode(), hashlib.sha256).hexdigest()
