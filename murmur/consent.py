"""`murmur client site | stop | resume | approve | deny | receipt`: what an organization decides of its own client."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from murmur.coordinating import Json
from murmur.output import out, print_json, told

Site = Annotated[Path, typer.Option("--dir", help="the agent's folder")]
Run = Annotated[str, typer.Argument(help="the run's id, as murmur client status shows it")]
HERE = Path("murmur-client")


def site(directory: Site = HERE) -> None:
    """Print a link to this site's own page, which the running agent serves on this machine; it logs in once."""
    from murmur.clients.site_page import new_link

    with told():
        sys.stdout.write(new_link(directory) + "\n")


def stop(directory: Site = HERE) -> None:
    """Take part in nothing from now on: what is under way ends, nothing more leaves, over restarts too."""
    from murmur.clients.settings import load_settings
    from murmur.clients.switch import Switch

    with told():
        name = load_settings(directory).name
        Switch(directory).stop("murmur client stop")
    out.print(f"{name} is stopped. It goes on after: murmur client resume --dir {directory}", soft_wrap=True)


def resume(directory: Site = HERE) -> None:
    """Take part again, after a stop."""
    from murmur.clients.settings import load_settings
    from murmur.clients.switch import Switch

    with told():
        name = load_settings(directory).name
        Switch(directory).resume()
    out.print(f"{name} takes part again, as its policy allows.")


def approve(run: Run, directory: Site = HERE) -> None:
    """Agree to a run that waits for this site's consent ([policy] ask)."""
    _decide(directory, run, approved=True)


def deny(run: Run, directory: Site = HERE) -> None:
    """Say no to a run, also to one that was approved; what is under way of it is delivered, nothing more is begun."""
    _decide(directory, run, approved=False)


def _decide(directory: Path, run: str, *, approved: bool) -> None:
    from murmur.clients.record import FILE, Record
    from murmur.clients.settings import load_settings

    with told():
        load_settings(directory)
        record = Record(directory / FILE)
        try:
            record.decide(run, "approved" if approved else "denied")
        finally:
            record.close()
    out.print(f"{run} is {'approved' if approved else 'denied'} here.")


def receipt(
    directory: Site = HERE,
    month: Annotated[str, typer.Option(help="as in 2026-11, in UTC; all without it")] = "",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="file to write it to")] = None,
    verify: Annotated[Path | None, typer.Option(help="check this receipt in place of making one")] = None,
    key: Annotated[str, typer.Option(help="with --verify: the fingerprint that the client's key must have")] = "",
    json_: Json = False,
) -> None:
    """Write down, signed, all that has left this site; or check such a receipt, on any machine."""
    if verify is not None:
        return _verify(verify, key, as_json=json_)
    from murmur.clients.identity import load_identity
    from murmur.clients.ledger import FILE as LEDGER
    from murmur.clients.ledger import Ledger
    from murmur.clients.receipt import make_receipt
    from murmur.clients.record import FILE, Record
    from murmur.clients.settings import load_settings

    with told():
        settings = load_settings(directory)
        record = Record(directory / FILE)
        try:
            data = make_receipt(settings, load_identity(settings.key_file), record, Ledger(directory / LEDGER), month)
        finally:
            record.close()
    if output is None:
        sys.stdout.write(data.decode())
    else:
        output.write_bytes(data)
        out.print(f"{output}: {len(data):,} bytes. Check it with: murmur client receipt --verify {output}")


def _verify(path: Path, key: str, *, as_json: bool) -> None:
    from murmur.clients.receipt import verify_receipt
    from murmur.protocol.errors import OperatorError

    with told():
        try:
            data = path.read_bytes()
        except OSError as error:
            raise OperatorError(f"cannot read {path}: {error.strerror}") from None
        found = verify_receipt(data)
        if key and key != found["fingerprint"]:
            raise OperatorError(f"it is signed by the key {found['fingerprint']}, and not by {key}")
    sent, runs = found["sent"], sorted({asked["about"]["run"] for asked in found["asked"]})
    facts = {
        "client": found["client"],
        "fingerprint": found["fingerprint"],
        "month": found["month"],
        "made_at": found["made_at"],
        "messages": len(sent),
        "bytes": sum(message["bytes"] for message in [*sent, *found["counted"]]),
        "runs": runs,
    }
    if as_json:
        return print_json(facts)
    of = f"{facts['client']}, {facts['month'] or 'all'}, made at {facts['made_at']}"
    out.print(f"[bold]The signature is right.[/] {of}: {len(sent):,} messages, {len(runs)} runs.", soft_wrap=True)
    compared = "." if key else "; compare it, or let --key FINGERPRINT do so."
    out.print(f"Signed by the key {facts['fingerprint']}{compared}", soft_wrap=True)
