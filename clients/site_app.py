"""The routes of the site's own page, as an ASGI application; `site_page` serves it."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from urllib.parse import quote

from anyio import from_thread
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Mount, Route

from ..protocol.errors import MurmurError, NotAuthenticated, NotFound
from ..web.chosen import address, choose, language_of
from ..web.language import _, speaking
from ..web.rendering import environment, static_app
from ..web.security import SESSION_S, OnlyHosts, SecurityHeaders, SessionCookie, check_form
from . import site_board
from .receipt import make_receipt
from .shared import Site
from .site_board import Boards
from .site_page import is_link

LOOK_S = 0.5  # between two looks whether an open page has something new to show
PING_S = 15.0
HERE = "the site's page"  # where a stop came from
PARTS = ("site_head", "site_notice", "site_figures", "site_runs", "site_sent", "site_budgets")

Handler = Callable[[Request], Awaitable[Response]]


def site_app(site: Site, *, port: int, key: str, closing: Callable[[], bool] = lambda: False) -> Starlette:
    """key: what links are made with (see `site_page`). closing: whether open streams should end."""
    return _Site(site, port, key, closing).app


class _Site:
    def __init__(self, site: Site, port: int, key: str, closing: Callable[[], bool]) -> None:
        self._site, self._key, self._closing = site, key, closing
        self._boards = Boards(site)
        self._env = environment()
        names: dict[str, Any] = self._env.globals  # its declared type lists Jinja's own entries only
        names["board"] = site_board
        self._cookie = SessionCookie(secure=False, name=f"murmur-site-{port}")  # cookies know no ports
        self._sessions: dict[str, float] = {}
        self._used: set[str] = set()
        routes = [
            Route("/login", self._answer(self.login, signed_in=False)),
            Route("/", self._answer(self.first)),
            Route("/sent", self._answer(self.sent)),
            Route("/policy", self._answer(self.policy)),
            Route("/receipt", self._answer(self.receipt)),
            Route("/runs/{run}", self._answer(self.run)),
            Route("/live", self._answer(self.live)),
            Route("/stop", self._answer(self.stop), methods=["POST"]),
            Route("/resume", self._answer(self.resume), methods=["POST"]),
            Route("/runs/{run}/{decision}/{terms}", self._answer(self.decide), methods=["POST"]),
            Route("/logout", self._answer(self.logout), methods=["POST"]),
            Route("/language", self._answer(self.choose_language, signed_in=False), methods=["POST"]),
            Mount("/static", static_app()),
        ]
        hosts = (f"127.0.0.1:{port}", f"localhost:{port}")
        middleware = [Middleware(SecurityHeaders), Middleware(OnlyHosts, hosts=hosts)]
        self.app = Starlette(routes=routes, middleware=middleware)

    def _answer(self, work: Callable[[Request], Response], *, signed_in: bool = True) -> Handler:
        """A route: who asks is checked before anything else, errors are pages, nothing is kept by the browser."""

        def once(request: Request) -> Response:
            try:
                if signed_in and not self._known(self._cookie.read(request)):
                    raise NotAuthenticated(_("This page opens with a link that murmur client site prints."))
                if request.method == "POST":
                    check_form(request.headers)
                return work(request)
            except MurmurError as error:
                return self._html(request, "site_problem.html", error.status, error=error, title=_(error.title))

        async def answer(request: Request) -> Response:
            with speaking(language_of(request)):
                response = await run_in_threadpool(once, request)
            response.headers.setdefault("cache-control", "no-store")
            return response

        return answer

    def _html(self, request: Request, template: str, status: int = 200, **values: Any) -> HTMLResponse:
        settings = self._site.settings
        values.setdefault("again", address(request) if request.method == "GET" else "")
        page = self._env.get_template(template).render(
            account=None, now=site_board.now(), path=request.url.path, name=settings.name,
            known=self._known(self._cookie.read(request)), **values,
        )  # fmt: skip
        return HTMLResponse(page, status)

    # Who is there

    def _known(self, token: str | None) -> bool:
        return token is not None and self._sessions.get(_digest(token), 0.0) > time.time()

    def login(self, request: Request) -> Response:
        link = request.query_params.get("link", "")
        if not is_link(link, self._key, time.time()) or link in self._used:
            raise NotAuthenticated(_("This link was used or is too old. murmur client site prints another one."))
        self._used.add(link)
        token = secrets.token_urlsafe(32)
        now = time.time()
        self._sessions = {k: until for k, until in self._sessions.items() if until > now}
        self._sessions[_digest(token)] = now + SESSION_S
        response = self._html(request, "onward.html", target="/", again="")
        self._cookie.put(response, token)
        return response

    def logout(self, request: Request) -> Response:
        self._sessions.pop(_digest(self._cookie.read(request) or ""), None)
        response = RedirectResponse("/", 303)
        self._cookie.clear(response)
        return response

    def choose_language(self, request: Request) -> Response:
        form = from_thread.run(_form, request)
        return choose(str(form.get("language", "")), str(form.get("back", "/")), secure=False)

    # Pages

    def first(self, request: Request) -> Response:
        return self._html(
            request, "site.html", b=self._boards.first(), site=self._site, policy=self._boards.policy(),
            months=self._boards.months(), live="/live?page=site", at=0,
        )  # fmt: skip

    def run(self, request: Request) -> Response:
        return self._html(request, "site_run.html", **self._boards.run(request.path_params["run"]))

    def sent(self, request: Request) -> Response:
        asked = request.query_params.get("page", "1")
        page = int(asked) if asked.isdecimal() and 0 < len(asked) < 7 else 1
        rows, total = self._boards.sent(max(1, page))
        return self._html(
            request, "site_sent.html", rows=rows, total=total, page=max(1, page), counted=self._boards.counted()
        )

    def policy(self, request: Request) -> Response:
        return self._html(request, "site_policy.html", said=self._boards.policy(), settings=self._site.settings)

    def receipt(self, request: Request) -> Response:
        month, site = request.query_params.get("month", ""), self._site
        data = make_receipt(site.settings, site.identity, site.record, site.ledger, month)
        name = f"murmur-receipt-{site.settings.name}-{month or 'all'}.json"
        return Response(data, media_type="application/json",
                        headers={"content-disposition": f'attachment; filename="{name}"'})  # fmt: skip

    # What somebody decides

    def stop(self, request: Request) -> Response:
        self._site.switch.stop(HERE)
        return RedirectResponse("/", 303)

    def resume(self, request: Request) -> Response:
        self._site.switch.resume()
        return RedirectResponse("/", 303)

    def decide(self, request: Request) -> Response:
        run, decision = request.path_params["run"], request.path_params["decision"]
        if decision not in {"approve", "deny"}:
            raise NotFound(_("A run is approved or denied."))
        approved = decision == "approve"
        self._site.record.decide(run, "approved" if approved else "denied", request.path_params["terms"])
        return RedirectResponse(f"/runs/{quote(run, safe='')}", 303)

    # The live stream

    def live(self, request: Request) -> Response:
        token = self._cookie.read(request)
        return StreamingResponse(self._changes(token, language_of(request)), media_type="text/event-stream")

    async def _changes(self, token: str | None, language: str) -> AsyncIterator[bytes]:
        """The parts of the first page, each again when it looks otherwise than before."""
        sent, seen, ping_at = dict[str, str](), object(), time.monotonic() + PING_S
        yield b"retry: 2000\n\n"
        while not self._closing():
            if not self._known(token):
                yield b"event: signed-out\ndata: -\n\n"
                return
            version = await run_in_threadpool(self._boards.version)
            if version != seen:
                seen = version
                for name, html in (await run_in_threadpool(self._parts, language)).items():
                    if sent.get(name) != html:
                        sent[name] = html
                        data = "".join(f"data: {line}\n" for line in html.splitlines())
                        yield f"event: {name}\n{data}\n".encode()
            if time.monotonic() >= ping_at:
                ping_at = time.monotonic() + PING_S
                yield b": ping\n\n"
            await asyncio.sleep(LOOK_S)

    def _parts(self, language: str) -> dict[str, str]:
        board = self._boards.first()
        macros = self._env.get_template("site_parts.html").module
        with speaking(language):
            return {name: str(getattr(macros, name)(board, self._site)) for name in PARTS}


async def _form(request: Request) -> FormData:
    return await request.form()


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
