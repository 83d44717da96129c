"""Options of the form key=value, as several commands take them."""

from __future__ import annotations

import tomllib
from typing import Any

import click
from typer.core import TyperCommand

from murmur.output import USAGE, fail

SECURE = ("real", "ideal", "off")


def pairs(given: list[str] | None) -> dict[str, str]:
    """Each key with its value, as text."""
    found: dict[str, str] = {}
    for item in given or ():
        key, equals, value = item.partition("=")
        if not equals:
            fail(f"{item!r} is not key=value", USAGE)
        found[key] = value
    return found


def values(given: list[str] | None) -> dict[str, Any]:
    """Pairs whose values are TOML; what is not TOML is text."""

    def value(text: str) -> Any:
        try:
            return tomllib.loads(f"v = {text}")["v"]
        except tomllib.TOMLDecodeError:
            return text

    return {key: value(text) for key, text in pairs(given).items()}


def changes(given: list[str] | None) -> dict[str, Any]:
    """`--set train.lr=0.1` as load_recipe takes it."""
    return {key.replace(".", "__"): value for key, value in values(given).items()}


class SecureCommand(TyperCommand):
    """A command whose `--secure` may stand alone, for `--secure real`, and whose `--plain` is `--secure off`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        given: list[str] = []
        for arg, following in zip(args, [*args[1:], ""], strict=False):
            if arg == "--plain":
                given += ["--secure", "off"]
            elif arg == "--secure" and following not in SECURE:
                given += ["--secure", "real"]
            else:
                given.append(arg)
        return super().parse_args(ctx, given)
