"""Who takes part in a simulation: tasks by client id, made when a client is first asked."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

from ..clients.task import FLOWER, Task, find, is_task
from ..protocol.errors import OperatorError
from ..protocol.recipe import Recipe, load_recipe

_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")  # as the coordinator takes them


class Tasks(Protocol):
    """A sequence of tasks, or of functions that make them; each client's number is its place."""

    def __len__(self) -> int: ...
    def __getitem__(self, number: int, /) -> Task | Callable[[], Task]: ...


Clients = Mapping[str, Task] | Mapping[str, Callable[[], Task]] | Tasks


class Federation:
    """The clients of a simulation: `ids` in order, and each one's task, which is made once and kept."""

    def __init__(self, clients: Clients) -> None:
        """clients: by id, or in a sequence, whose places then become the ids client-0, client-1, …

        Raises OperatorError for no clients, or an id that a coordinator would not take.
        """
        count = len(clients)
        if not count:
            raise OperatorError("the federation has no clients")
        if isinstance(clients, Mapping):
            keys: dict[str, Any] = {str(name): name for name in sorted(clients)}
        else:
            width = len(str(count - 1))  # so that the order of ids is the order of numbers
            keys = {f"client-{number:0{width}d}": number for number in range(count)}
        if wrong := [name for name in keys if not _NAME.fullmatch(name)]:
            raise OperatorError(f"{wrong[0]!r} is no client's name: lower-case letters, digits, '.', '-' and '_' only")
        self._clients, self._keys = cast(Any, clients), keys
        self._made: dict[str, Task] = {}
        self.ids = tuple(keys)

    def __len__(self) -> int:
        return len(self.ids)

    def of(self, clients: Iterable[str]) -> Federation:
        """A federation of some of its clients, under the same names."""
        part = copy(self)
        part.ids = tuple(sorted(clients))
        return part

    def task(self, client: str) -> Task:
        """The client's task; what goes wrong in making it is an OperatorError that names the client."""
        if client not in self._made:
            given = self._clients[self._keys[client]]
            made = given if is_task(given) else given()
            if not is_task(made):
                raise OperatorError(f"the federation gave {client} a {type(made).__name__}, not a task")
            self._made[client] = made
        return self._made[client]


def as_federation(source: Any, clients: int | None = None, options: Mapping[str, Any] | None = None) -> Federation:
    """A federation from what a user has: one, a mapping or sequence of tasks, or a function that makes either.

    clients, options: handed to the function; `clients` only where it takes such an argument. Of what is no function,
    `clients` must be the length, as nothing else could be meant.
    """
    if callable(source) and not is_task(source):
        given = dict(options or {})
        parameters = inspect.signature(source).parameters
        if clients is not None and "clients" in parameters:
            given["clients"] = clients
        try:
            inspect.signature(source).bind(**given)
        except TypeError as error:
            accepted = ", ".join(parameters) or "none"
            raise OperatorError(f"the federation's options do not fit: {error}. It takes: {accepted}") from None
        return as_federation(source(**given))
    if options:
        raise OperatorError("options are for a function that makes a federation, and this is one already")
    if is_task(source):
        raise OperatorError("one task is one client: give a mapping of names to tasks, or a sequence of them")
    federation = source if isinstance(source, Federation) else Federation(cast(Clients, source))
    if clients is not None and clients != len(federation):
        raise OperatorError(f"the federation has {len(federation)} clients, {clients} were asked for")
    return federation


def find_federation(
    target: str, clients: int | None = None, options: Mapping[str, Any] | None = None
) -> tuple[Federation, Recipe | None]:
    """The federation that a target names, with the recipe beside it, if any.

    target: a folder with task.py, whose function `federation` makes it, and perhaps recipe.toml; or
    "package.module:function" or "path/to/file.py:function"; or "flower:" and what names a Flower ClientApp.
    Raises OperatorError, which says what to change.
    """
    if target.startswith(FLOWER):
        from ..clients.flower import flower_clients

        return as_federation(partial(flower_clients, target.removeprefix(FLOWER)), clients, options), None
    folder = Path(target).expanduser()
    if not folder.is_dir():
        return as_federation(find(target), clients, options), None
    if not (folder / "task.py").is_file():
        raise OperatorError(f"{folder} has no task.py with a function federation()")
    recipe = load_recipe(folder / "recipe.toml") if (folder / "recipe.toml").is_file() else None
    return as_federation(find(f"{folder / 'task.py'}:federation"), clients, options), recipe
