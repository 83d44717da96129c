"""The language that a viewer asks for, and the button that changes it: alike on every page, wherever it is served."""

from __future__ import annotations

from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from ..protocol.errors import BadRequest
from .language import LANGUAGES, _, preferred
from .security import local_path

COOKIE = "murmur-language"  # of who has chosen one; no secret, and shared by all pages of a host
COOKIE_S = 365 * 24 * 3600


def language_of(request: Request) -> str:
    """The language to answer in."""
    return preferred(request.cookies.get(COOKIE), request.headers.get("accept-language", ""))


def choose(language: str, back: str, *, secure: bool) -> Response:
    """Back to where one was, in the language that was chosen; kept in this browser, whoever signs in."""
    if language not in LANGUAGES:
        raise BadRequest(_("Murmur does not speak {language}.", language=language))
    response = RedirectResponse(local_path(back), 303)
    response.set_cookie(COOKIE, language, max_age=COOKIE_S, path="/", secure=secure, httponly=True, samesite="lax")
    return response


def address(request: Request) -> str:
    """Where this page is, to come back to: a path on this host with its query."""
    return local_path(quote(request.url.path) + (f"?{request.url.query}" if request.url.query else ""))
