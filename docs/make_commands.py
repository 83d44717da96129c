"""Print docs/commands.md, every command with what it does: python docs/make_commands.py > docs/commands.md"""

from __future__ import annotations

from collections.abc import Iterator

import click
import typer

from murmur.cli import app

HEAD = """# Commands

Every command tells its options with `--help`. Those that read take `--json`; those that follow something print JSON
Lines then. Settings come from flags, then `MURMUR_…` variables, then `murmur.toml`, then defaults
([operations.md](operations.md#settings)). `murmur --install-completion` sets up the shell's completion.

Exit codes: 0 it worked, 1 it failed, 2 the command was used wrongly, 3 it took too long, 4 the coordinator cannot be
reached or does not allow it, 130 Ctrl-C.

| command | what it does |
|---|---|
"""


def commands(found: click.Command, path: str = "murmur") -> Iterator[tuple[str, str]]:
    """Each command that does something, with its arguments, and the first sentence of its help."""
    if isinstance(found, click.Group):
        for name, inner in found.commands.items():
            yield from commands(inner, f"{path} {name}")
        return
    arguments = [p for p in found.params if isinstance(p, click.Argument)]
    words = " ".join(p.make_metavar(click.Context(found)) for p in arguments)
    yield f"{path} {words}".strip(), (found.help or "").split("\n\n")[0].replace("\n", " ")


def page() -> str:
    rows = (f"| `{name}` | {said} |\n" for name, said in commands(typer.main.get_command(app)))
    return HEAD + "".join(row.replace("[OPTIONS]", "") for row in rows)


if __name__ == "__main__":
    typer.echo(page(), nl=False)
