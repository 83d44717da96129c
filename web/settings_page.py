"""The settings page: users and roles, one's API tokens and sessions, one's password."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, Any

from fastapi import Form
from pydantic import TypeAdapter, ValidationError
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from ..protocol.errors import MurmurError
from ..protocol.roles import ROLES, Right, Role
from ..protocol.sections import Name
from .console import Account, Console
from .language import _
from .reasons import told

USER_NAME: TypeAdapter[str] = TypeAdapter(Name)
NAME_RULE = "Use up to 64 small letters, digits, dots, dashes and underscores, with a letter or digit first."
DAYS = (7, 30, 90, 365)  # that a token may be made for


class SettingsPage:
    """html: renders a template for a request."""

    def __init__(self, console: Console, html: Callable[..., Response]) -> None:
        self._console, self._html = console, html

    def routes(self) -> Iterator[tuple[str, Callable[..., Any], Right, str]]:
        yield "/settings", self.page, Right.READ, "GET"
        yield "/settings/password", self.password, Right.CREDENTIAL, "POST"
        yield "/settings/tokens", self.make_token, Right.CREDENTIAL, "POST"
        yield "/settings/credentials/{credential}/withdraw", self.withdraw, Right.CREDENTIAL, "POST"
        yield "/settings/users", self.add_user, Right.ADMINISTER, "POST"
        yield "/settings/users/{user}/role", self.set_role, Right.ADMINISTER, "POST"
        yield "/settings/users/{user}/remove", self.remove_user, Right.ADMINISTER, "POST"

    def page(self, request: Request) -> Response:
        return self._page(request)

    def _page(self, request: Request, *, status: int = 200, **said: Any) -> Response:
        """said: what an action has to show once (`made`, `welcome`), or what was wrong, by the form it was wrong in."""
        account: Account = request.state.account
        everybody = account.may("ADMINISTER")
        held = self._console.credentials(None if everybody else account.name)
        values: dict[str, Any] = {"made": None, "welcome": None, "wrong": {}, "done": ""} | said
        return self._html(
            request,
            "settings.html",
            status,
            users=self._console.users(),
            tokens=[c for c in held if c.kind == "api"],
            sessions=[c for c in held if c.kind == "session"],
            roles=ROLES,
            lesser=ROLES[: ROLES.index(account.role) + 1],
            days=DAYS,
            everybody=everybody,
            **values,
        )

    def make_token(
        self,
        request: Request,
        name: Annotated[str, Form(max_length=64)],
        role: Annotated[Role, Form()],
        days: Annotated[float, Form(ge=0.01, le=3650)],
    ) -> Response:
        """The page with the new token on it: it is kept nowhere that it could be shown from again."""
        account: Account = request.state.account
        made = self._console.make_token(account.name, account.role, label=name.strip(), days=days, role=role)
        return self._page(request, made=made)

    def withdraw(self, request: Request, credential: str) -> Response:
        self._console.withdraw(credential, request.state.account.name)
        return RedirectResponse("/settings", 303)

    def password(
        self,
        request: Request,
        password: Annotated[str, Form(max_length=1000)],
        before: Annotated[str, Form(max_length=1000)] = "",
    ) -> Response:
        try:
            self._console.set_password(request.state.account.name, password, before)
        except MurmurError as error:  # a wrong password is no reason to be signed out
            return self._page(request, status=400, wrong={"password": told(error.detail)})
        return self._page(request, done=_("Your password is changed."))

    def add_user(
        self, request: Request, name: Annotated[str, Form(max_length=64)], role: Annotated[Role, Form()]
    ) -> Response:
        """The page with the new account's one-time link, which is not shown again."""
        try:
            token = self._console.add_user(USER_NAME.validate_python(name), role, request.state.account.name)
        except ValidationError:
            return self._page(request, status=400, wrong={"user": _(NAME_RULE)})
        except MurmurError as error:
            return self._page(request, status=error.status, wrong={"user": told(error.detail)})
        link = f"{request.url.scheme}://{request.url.netloc}/login?link={token}"
        return self._page(request, welcome={"name": name, "role": role, "link": link})

    def set_role(self, request: Request, user: str, role: Annotated[Role, Form()]) -> Response:
        self._console.set_role(user, role, request.state.account.name)
        return RedirectResponse("/settings", 303)

    def remove_user(self, request: Request, user: str) -> Response:
        self._console.remove_user(user, request.state.account.name)
        return RedirectResponse("/settings", 303)
