"""What keeps other sites out of the pages: response headers, the session cookie, and who may send a form."""

from __future__ import annotations

from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..protocol.errors import NotAllowed, TooLarge

CSP = "; ".join(
    (
        "default-src 'self'",  # scripts and styles are files of ours; nothing inline, nothing from elsewhere
        "base-uri 'none'",
        "form-action 'self'",
        "frame-ancestors 'none'",
        "object-src 'none'",
    )
)
HEADERS = {
    "content-security-policy": CSP,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    # not "no-referrer": with that, browsers send `Origin: null` with our own forms
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
}
MAX_FORM_BYTES = 16 << 10  # the largest form is a name and a password
SESSION_S = 12 * 3600  # the browser forgets the cookie after a working day; the coordinator may end it earlier


class SecurityHeaders:
    """ASGI middleware that puts HEADERS on every HTTP answer; what an endpoint has set itself stays.

    It touches only the start of a response, so streams pass through unbuffered.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self.app(scope, receive, with_headers)


class OnlyHosts:
    """ASGI middleware that answers 403 unless the Host header is one of these.

    A page of another name that is made to resolve to 127.0.0.1 (DNS rebinding) would otherwise be of our origin.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str]) -> None:
        self.app, self.hosts = app, frozenset(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and Headers(scope=scope).getlist("host") not in [[host] for host in self.hosts]:
            await PlainTextResponse("This address is not the one that this page is served at.", 403)(
                scope, receive, send
            )
            return
        await self.app(scope, receive, send)


def caller(request: Request) -> str:
    """The network address of who asks; behind a reverse proxy, the proxy's."""
    return request.client.host if request.client else "unknown"


def check_form(headers: Headers) -> None:
    """Raise unless a POST comes from one of our own pages and is short.

    Browsers say so in Sec-Fetch-Site; over plain HTTP on other hosts than localhost they leave it out, so there the
    Origin must name the host that was asked. A request that carries neither is refused with NotAllowed.
    """
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site is not None:
        own = site == "same-origin"
    else:
        own = bool(origin) and urlsplit(origin or "").netloc == headers.get("host")
    if not own:
        raise NotAllowed("This form was not sent from one of Murmur's own pages. Open the page again and repeat it.")
    length = headers.get("content-length", "")
    if not length.isdecimal() or int(length) > MAX_FORM_BYTES:
        raise TooLarge(f"A form of {length or 'unknown'} bytes; at most {MAX_FORM_BYTES} are taken.")


class SessionCookie:
    """The one cookie. `__Host-` makes the browser refuse it without Secure, or set by another host or path."""

    def __init__(self, *, secure: bool, name: str = "murmur") -> None:
        self.secure = secure
        self.name = f"__Host-{name}" if secure else name

    def read(self, request: Request) -> str | None:
        return request.cookies.get(self.name)

    def put(self, response: Response, token: str) -> None:
        response.set_cookie(
            self.name, token, max_age=SESSION_S, path="/", secure=self.secure, httponly=True, samesite="strict"
        )

    def clear(self, response: Response) -> None:
        response.delete_cookie(self.name, path="/", secure=self.secure, httponly=True, samesite="strict")


def local_path(target: str) -> str:
    """`target` if it is a path on this host, else "/": where to go after signing in, as a URL may ask for it."""
    parts = urlsplit(target)
    plain = target.startswith("/") and not target.startswith(("//", "/\\")) and not parts.netloc
    return target if plain and target.isprintable() and "\\" not in target else "/"
