"""`murmur audit log` and `verify-log`: who did what at a coordinator, and whether all of it is still there."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from murmur.coordinating import Data, Json, connected
from murmur.output import FAILED, USAGE, err, fail, out, print_json, print_table, told

if TYPE_CHECKING:
    from murmur.protocol.audit import AuditView


def log(
    by: Annotated[str, typer.Option(help="only what this account or client did")] = "",
    what: Annotated[str, typer.Option(help="only where the action or what it was done to has this in it")] = "",
    limit: Annotated[int, typer.Option(min=1, max=1000, help="the newest so many")] = 50,
    export: Annotated[
        bool, typer.Option("--export", help="print the whole log as JSON Lines, the oldest entry first")
    ] = False,
    data: Data = None,
    json_: Json = False,
) -> None:
    """Show who did what: clients admitted, runs started and stopped, aliases moved, users and tokens changed."""
    with told(), connected(data) as c:
        if export:
            sys.stdout.write(c.audit_log())
            return
        found = c.audit(by=by, what=what, limit=limit)
    if json_:
        return print_json([entry.model_dump(mode="json") for entry in found])
    rows = ((e.n, f"{e.at:%Y-%m-%d %H:%M:%S}", e.by, e.action, e.subject) for e in found)
    print_table("Audit log", ("no.", "when, UTC", "by", "action", "what"), rows)


def verify_log(
    file: Annotated[
        Path | None, typer.Argument(help="an exported log \\[default: the coordinator's, as it is now]")
    ] = None,
    kept: Annotated[
        Path | None, typer.Option(help="an earlier export: its entries must be in the log as they were")
    ] = None,
    data: Data = None,
    json_: Json = False,
) -> None:
    """Check the audit log: no entry missing, none changed, each following from the one before it.

    Exit code 0 where everything holds, 1 where something does not.
    """
    from murmur.protocol.audit import verify_log as verify

    earlier = {entry.n: entry.sha256 for entry in _read(_text(kept), str(kept))} if kept else {}
    if file:
        entries = _read(_text(file), str(file))
    else:
        with told(), connected(data) as c:
            entries = _read(c.audit_log(), "the coordinator's answer")
    report = verify(entries, earlier)
    if json_:
        print_json(report.model_dump(mode="json") | {"ok": report.ok})
    else:
        for wrong in report.wrong:
            err.print(f"[bold red]{wrong}[/]", soft_wrap=True)
        if report.ok:
            out.print(
                f"{report.entries} entries hold; the newest one's hash is {report.head or 'none'}", soft_wrap=True
            )
    if not report.ok:
        raise typer.Exit(FAILED)


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace")
    except OSError as error:
        fail(f"cannot read {path}: {error.strerror}", USAGE)


def _read(text: str, where: str) -> list[AuditView]:
    from pydantic import ValidationError

    from murmur.protocol.audit import AuditView

    found: list[AuditView] = []
    for i, line in enumerate(text.split("\n"), 1):
        if line:
            try:
                found.append(AuditView.model_validate_json(line))
            except ValidationError:
                fail(f"line {i} of {where} is no entry of an audit log: it was changed, or it is another file")
    return found
