"""The pages' routes: what is shown at which address, who may see it, what forms do."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, Literal
from urllib.parse import quote

from fastapi import APIRouter, Depends, Form, Header, Query
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import TypeAdapter, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, RedirectResponse, Response, StreamingResponse

from ..protocol.encoding import DIGEST
from ..protocol.errors import BadRequest, Conflict, MurmurError, NotAuthenticated, NotFound, Unavailable
from ..protocol.mistakes import in_one_line
from ..protocol.roles import Right
from ..protocol.sections import Name
from . import boards, registry
from .audit_page import AuditPage
from .chosen import address, choose, language_of
from .console import Account, Console
from .language import _, speaking, spoken
from .listing import Listing
from .live import Live
from .rendering import Renderer
from .rights import authorize
from .security import SessionCookie, caller, check_form, local_path
from .settings_page import SettingsPage
from .starting import Starting

NO_STORE = {"cache-control": "no-store"}
MOST_ID = (1 << 63) - 1  # the largest event id that SQL takes
CLIENT_NAME: TypeAdapter[str] = TypeAdapter(Name)


def pages(console: Console, *, secure_cookies: bool) -> APIRouter:
    """All pages over one console, to be included without a prefix; `static_app()` belongs at /static beside it.

    secure_cookies: true behind HTTPS; browsers then send the session over nothing else.
    """
    return Site(console, secure_cookies=secure_cookies).router


class Site:
    """The routes with what they share: the console, its renderer, the live streams and the cookie."""

    def __init__(self, console: Console, *, secure_cookies: bool) -> None:
        self.console = console
        self.renderer = Renderer(console)
        self.live = Live(console, self.renderer.fragments)
        self.listing = Listing(console, self._html, self._live_page)
        self.starting = Starting(console, self._html)
        self.cookie = SessionCookie(secure=secure_cookies)
        self.router = APIRouter(route_class=self._route_class(), include_in_schema=False)
        self._add_routes()

    def _add_routes(self) -> None:
        def add(path: str, endpoint: Callable[..., Any], right: Right | None, method: str = "GET") -> None:
            dependencies = [Depends(self.needs(right))] if right else []
            self.router.add_api_route(path, endpoint, methods=[method], dependencies=dependencies, response_model=None)

        viewer, admin, starter, steerer = Right.READ, Right.ADMINISTER, Right.START, Right.STEER
        add("/login", self.login_page, None)
        add("/login", self.login, None, "POST")
        add("/logout", self.logout, None, "POST")
        add("/language", self.choose_language, None, "POST")
        add("/", self.overview, viewer)
        add("/live", self.stream, None)
        add("/runs", self.listing.runs, viewer)
        add("/runs/compare", self.listing.compare, viewer)
        add("/runs/new", self.starting.form, starter)
        add("/runs/new", self.starting.submit, starter, "POST")
        add("/runs/{id}", self.run, viewer)
        add("/runs/{id}/rounds", self.rounds, viewer)
        add("/runs/{id}/rounds/{n:int}", self.round, viewer)
        add("/runs/{id}/metrics.csv", self.metrics, viewer)
        add("/runs/{id}/manifests.jsonl", self.manifests, viewer)
        add("/runs/{id}/rounds/{n:int}/manifest.json", self.manifest, viewer)
        add("/runs/{id}/stop", self.stop, steerer, "POST")
        add("/runs/{id}/pause", self.pause, steerer, "POST")
        add("/runs/{id}/resume", self.resume, steerer, "POST")
        add("/clients", self.clients, viewer)
        add("/clients/{id}", self.client, viewer)
        add("/clients/{id}/approve", self.approve, admin, "POST")
        add("/clients/{id}/revoke", self.revoke, admin, "POST")
        add("/invitations", self.invite, admin, "POST")
        for path, endpoint, method in registry.routes(self.console, self._html):
            add(path, endpoint, admin if method == "POST" else viewer, method)
        add("/privacy", self.privacy, viewer)
        for page in (AuditPage(self.console, self._live_now), SettingsPage(self.console, self._html)):
            for path, endpoint, right, method in page.routes():
                add(path, endpoint, right, method)
        add("/models", self.models, viewer)
        add("/models/{sha256}.safetensors", self.download, viewer)

    # Who is there

    def signed_in(self, request: Request) -> Account:
        """The account of the request's session; raises NotAuthenticated."""
        token = self.cookie.read(request)
        account = self.console.account(token) if token else None
        if account is None:
            raise NotAuthenticated(_("Sign in to see this page."))
        request.state.account = account
        return account

    def needs(self, right: Right) -> Callable[[Request], Account]:
        """The dependency of a route: the account that is signed in, if it may do what the route does."""

        def check(request: Request) -> Account:
            account = self.signed_in(request)
            authorize(self.console, account.name, account.role, right, request.path_params)
            return account

        check.right = right  # pyright: ignore[reportFunctionMemberAccess]
        return check

    def _route_class(self) -> type[APIRoute]:
        site = self

        class PageRoute(APIRoute):
            """Checks where a form comes from before reading it, and answers errors with a page."""

            def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
                handle = super().get_route_handler()

                async def answer(request: Request) -> Response:
                    with speaking(language_of(request)):
                        return await answer_in_words(request)

                async def answer_in_words(request: Request) -> Response:
                    try:
                        if request.method == "POST":
                            check_form(request.headers)
                        response = await handle(request)
                    except NotAuthenticated:
                        response = await run_in_threadpool(site._ask_to_sign_in, request)
                    except MurmurError as error:
                        response = await run_in_threadpool(site._problem, request, error)
                    except RequestValidationError as error:
                        said = BadRequest(in_one_line([e | {"loc": e["loc"][-1:]} for e in error.errors()]))
                        response = await run_in_threadpool(site._problem, request, said)
                    response.headers.setdefault("cache-control", "no-store")
                    return response

                return answer

        return PageRoute

    def _ask_to_sign_in(self, request: Request) -> Response:
        """To the sign-in page; but a link on another site comes without our strict cookie, so first ask from here."""
        target = address(request)
        if request.method != "GET":
            target = "/"
        elif request.headers.get("sec-fetch-site") == "cross-site":
            return self._html(request, "onward.html", target=target)
        return RedirectResponse("/login" + (f"?next={quote(target, safe='')}" if target != "/" else ""), 303)

    def _problem(self, request: Request, error: MurmurError) -> Response:
        return self._html(request, "problem.html", error.status, error=error, title=_(error.title))

    def _html(self, request: Request, template: str, status: int = 200, **values: Any) -> HTMLResponse:
        account = getattr(request.state, "account", None)
        return HTMLResponse(
            self.renderer.page(
                template,
                account=account,
                path=request.url.path,
                again=address(request) if request.method == "GET" else "",
                now=self.console.now(),
                **values,
            ),
            status,
        )

    def _live_page(self, request: Request, name: str, template: str, board: Any, at: int, **values: Any) -> Response:
        run = values.get("run_id", "")
        live = f"/live?page={name}" + (f"&run={quote(run, safe='')}" if run else "")
        return self._html(request, template, b=board, live=live, at=at, **values)

    def _live_now(self, request: Request, name: str, template: str, **values: Any) -> Response:
        """A live page about no single run, as it is now."""
        at = self._at()
        return self._live_page(request, name, template, boards.PAGES[name].read(self.console, ""), at, **values)

    def _at(self) -> int:
        """The newest event, read before a page's board: what comes later is sent again rather than missed."""
        last = self.console.recent_events(None, 1)
        return last[-1].id if last else 0

    # Signing in and out

    def login_page(self, request: Request, link: str = "", next: str = "/") -> Response:
        """The form; or with a one-time link, a session and a page that leads on.

        Not a redirect: coming from another site, the browser would follow it without the strict cookie just set.
        """
        if link:
            token = self.console.redeem(link, caller(request))
            if token is None:
                return self._html(
                    request, "login.html", 401, next="/", said=_("This sign-in link was used or has expired.")
                )
            response = self._html(request, "onward.html", target="/")
            self.cookie.put(response, token)
            return response
        return self._html(request, "login.html", next=local_path(next), said="")

    def login(
        self,
        request: Request,
        user: Annotated[str, Form(max_length=200)],
        password: Annotated[str, Form(max_length=1000)],
        next: Annotated[str, Form(max_length=2000)] = "/",
    ) -> Response:
        try:
            token = self.console.login(user, password, caller(request))
        except Unavailable as error:
            return self._html(request, "login.html", error.status, next=local_path(next), said=error.detail)
        if token is None:
            return self._html(request, "login.html", 401, next=local_path(next), said=_("Name or password is wrong."))
        response = RedirectResponse(local_path(next), 303)
        self.cookie.put(response, token)
        return response

    def logout(self, request: Request) -> Response:
        token = self.cookie.read(request)
        if token:
            self.console.logout(token)
        response = RedirectResponse("/login", 303)
        self.cookie.clear(response)
        return response

    def choose_language(
        self,
        language: Annotated[str, Form(max_length=20)],
        back: Annotated[str, Form(max_length=2000)] = "/",
    ) -> Response:
        return choose(language, back, secure=self.cookie.secure)

    # Pages

    def overview(self, request: Request) -> Response:
        return self._live_now(request, "overview", "overview.html")

    def run(self, request: Request, id: str, scale: Literal["linear", "log"] = "linear") -> Response:
        at, log = self._at(), scale == "log"
        board = boards.run(self.console, id, log_scale=log)
        return self._live_page(request, "run-log" if log else "run", "run.html", board, at, run_id=id)

    def rounds(self, request: Request, id: str, page: Annotated[int, Query(ge=1)] = 1) -> Response:
        detail = self.console.run(id)
        newest = detail.rounds[::-1]
        first = (page - 1) * boards.PAGE_ROWS
        return self._html(
            request,
            "rounds.html",
            run=detail.run,
            rows=newest[first : first + boards.PAGE_ROWS],
            page=page,
            total=len(newest),
            size=boards.PAGE_ROWS,
        )

    def round(self, request: Request, id: str, n: int) -> Response:
        """One round with its timeline."""
        if n > MOST_ID:
            raise NotFound(_("Run {run} has no round {n}.", run=id, n=n))
        return self._html(request, "round.html", run=self.console.run(id).run, r=self.console.round(id, n))

    def metrics(self, request: Request, id: str) -> Response:
        """The run's metrics by version as CSV, one row per value."""
        text = io.StringIO()
        rows = csv.writer(text)
        rows.writerow(("version", "metric", "value", "count"))
        detail = self.console.run(id)
        rows.writerows((m.version, m.name, repr(m.value), m.count) for m in detail.metrics)
        return Response(text.getvalue(), media_type="text/csv", headers={"content-disposition": "attachment"})

    def manifests(self, id: str) -> Response:
        """The manifests of all committed rounds, one a line, as `murmur audit verify` takes them."""
        headers = {"content-disposition": "attachment"}
        return StreamingResponse(self.console.manifest_lines(id), media_type="application/x-ndjson", headers=headers)

    def manifest(self, id: str, n: int) -> Response:
        """One round's manifest, byte for byte as the next one names it."""
        if n > MOST_ID:
            raise NotFound(_("Run {run} has no round {n}.", run=id, n=n))
        headers = {"content-disposition": "attachment"}
        return Response(self.console.manifest(id, n), media_type="application/json", headers=headers)

    def clients(self, request: Request) -> Response:
        return self._live_now(request, "clients", "clients.html", invited=None, problem="")

    def client(self, request: Request, id: str) -> Response:
        client = next((c for c in self.console.clients() if c.id == id), None)
        if client is None:
            raise NotFound(_("There is no client {client}.", client=id))
        return self._html(request, "client.html", client=client)

    def models(self, request: Request, run: str = "", page: Annotated[int, Query(ge=1)] = 1) -> Response:
        at = self._at()
        board = boards.models(self.console, run, page)
        values: dict[str, Any] = {"runs": self.console.runs(), "run_id": run, "page": page, "size": boards.PAGE_ROWS}
        if page > 1:  # older versions do not change
            return self._html(request, "models.html", b=board, live="", at=at, **values)
        return self._live_page(request, "models", "models.html", board, at, **values)

    def download(self, sha256: str) -> Response:
        """The file of a version, under its hash; the link that leads here proposes a friendlier name."""
        if not DIGEST.fullmatch(sha256):
            raise NotFound(_("A version's file is named by the 64 hex digits of its SHA-256."))
        headers = {"content-disposition": "attachment", "etag": f'"{sha256}"'}
        return FileResponse(self.console.version_file(sha256), media_type="application/octet-stream", headers=headers)

    # Actions

    def stop(self, request: Request, id: str) -> Response:
        self.console.stop_run(id, request.state.account.name)
        return RedirectResponse(f"/runs/{quote(id, safe='')}", 303)

    def pause(self, request: Request, id: str) -> Response:
        self.console.pause_run(id, request.state.account.name)
        return RedirectResponse(f"/runs/{quote(id, safe='')}", 303)

    def resume(self, request: Request, id: str) -> Response:
        self.console.resume_run(id, request.state.account.name)
        return RedirectResponse(f"/runs/{quote(id, safe='')}", 303)

    def approve(self, request: Request, id: str) -> Response:
        self.console.approve(id, request.state.account.name)
        return RedirectResponse("/clients", 303)

    def revoke(self, request: Request, id: str) -> Response:
        self.console.revoke(id, request.state.account.name)
        return RedirectResponse("/clients", 303)

    def invite(self, request: Request, name: Annotated[str, Form(max_length=64)]) -> Response:
        """The clients page with the new invitation's line on it: it is never stored where it could be shown again."""
        invited, problem = None, ""
        try:
            invited = self.console.invite(CLIENT_NAME.validate_python(name), request.state.account.name)
        except ValidationError:
            problem = _(
                "Use up to 64 small letters, digits, dots, dashes and underscores, with a letter or digit first."
            )
        except Conflict as error:
            problem = error.detail
        return self._live_now(request, "clients", "clients.html", invited=invited, problem=problem)

    def privacy(self, request: Request) -> Response:
        return self._live_now(request, "privacy", "privacy.html")

    # The live stream

    def stream(
        self,
        request: Request,
        page: str,
        run: str = "",
        after: Annotated[int, Query(ge=0, le=MOST_ID)] = 0,
        last_event_id: Annotated[str, Header()] = "",
    ) -> Response:
        try:
            self.signed_in(request)
        except NotAuthenticated:  # an EventSource cannot see a status, so this is said as a message
            return StreamingResponse(iter((b"event: signed-out\ndata: -\n\n",)), media_type="text/event-stream")
        if page not in boards.PAGES:
            raise NotFound(_("There is no live page {page}.", page=page))
        if boards.PAGES[page].one_run or (run and page == "models"):
            self.console.run(run)
        else:
            run = ""
        start = min(int(last_event_id), MOST_ID) if last_event_id.isdecimal() and len(last_event_id) < 20 else after
        token = self.cookie.read(request) or ""
        return StreamingResponse(
            self.live.stream(page, run, start, lambda: self.console.account(token) is not None, spoken()),
            media_type="text/event-stream",
            headers={"cache-control": "no-store", "x-accel-buffering": "no"},
        )
