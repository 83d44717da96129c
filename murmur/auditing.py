"""`murmur audit …`: keep the manifests of a run's rounds, and check them without asking the coordinator."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from murmur import completion
from murmur.coordinating import Data, Json, connected
from murmur.output import FAILED, USAGE, err, fail, out, plain, print_json, print_table, told

if TYPE_CHECKING:
    from murmur.privacy.verification import Chain, Finding, Report

audit = typer.Typer(
    help="Check what a coordinator says of its rounds, and what is claimed of a run.", no_args_is_help=True
)


@audit.command()
def fetch(
    run_id: Annotated[str, typer.Argument(metavar="RUN", autocompletion=completion.run_ids)],
    folder: Annotated[Path | None, typer.Option("--out", help="folder to write to \\[default: RUN-manifests]")] = None,
    client: Annotated[
        Path | None, typer.Option("--client", help="ask as this agent (its folder), for runs that it takes part in")
    ] = None,
    data: Data = None,
    json_: Json = False,
) -> None:
    """Keep the manifests of a run, one file a round; one that differs from what was kept before is a finding."""
    folder = folder or Path(f"{run_id}-manifests")
    with told():
        texts = _of_agent(run_id, client) if client else _of_admin(run_id, data)
        new, other = keep(texts, folder)
    if json_:
        print_json({"run": run_id, "folder": str(folder), "manifests": len(texts), "new": new, "other": other})
    elif not texts:
        out.print(f"no round of {run_id} has a manifest yet")
    else:
        out.print(f"{len(texts)} manifests of {run_id} are in [bold]{folder}[/], {new} of them new", soft_wrap=True)
        for name in other:
            err.print(f"[bold red]{name}[/] is another one than what was kept of this round before", soft_wrap=True)
        out.print(f"check them: murmur audit verify {folder}", soft_wrap=True)
    if other:
        raise typer.Exit(FAILED)


@audit.command()
def verify(
    paths: Annotated[list[Path], typer.Argument(metavar="FILE_OR_FOLDER...", help="manifests")],
    trusted: Annotated[
        Path | None,
        typer.Option(help="keys to compare with: an agent's folder, or a JSON file of names and keys or fingerprints"),
    ] = None,
    models: Annotated[Path | None, typer.Option(help="model files to compare with (.safetensors, or a folder)")] = None,
    json_: Json = False,
) -> None:
    """Check manifests: signatures, terms, and that each round follows from the one before it. Asks nobody.

    Takes what `murmur audit fetch` wrote and what the run's page gives: .json, or .jsonl with one a line.

    Exit code 0 where everything holds, 1 where something does not.
    """
    from murmur.privacy.verification import verify as verify_manifests

    texts = read_manifests(paths)
    with told():
        listed = trusted_keys(trusted) if trusted else None
    files = model_hashes(models) if models else None
    report = verify_manifests(texts, identities=listed, models=files)
    if json_:
        print_json(_as_json(report))
    else:
        show(report)
    if not report.ok:
        raise typer.Exit(FAILED)


# Fetching


def _of_admin(run_id: str, data: Path | None) -> dict[int, str]:
    with connected(data) as c:
        return {view.round: c.manifest(run_id, view.round) for view in c.manifests(run_id)}


def _of_agent(run_id: str, folder: Path) -> dict[int, str]:
    from murmur.clients.identity import load_identity
    from murmur.clients.link import Link
    from murmur.clients.record import FILE, Record
    from murmur.clients.settings import load_settings

    settings = load_settings(folder)
    link = Link(
        settings.coordinator,
        name=settings.name,
        identity=load_identity(settings.key_file),
        ca=settings.ca_file if settings.ca_file.exists() else None,
        proxy=settings.proxy,
    )
    record = Record(settings.directory / FILE)
    link.before_sending = record.leaves
    try:
        return {_round_of(text): text for text in link.manifests(run_id)}
    finally:
        link.close()
        record.close()


def _round_of(text: str) -> int:
    from murmur.privacy.manifest import read

    return read(text).round


def keep(texts: dict[int, str], folder: Path) -> tuple[int, list[str]]:
    """Write manifests as round-0001.json and so on; how many are new, and the files that differ from kept ones.

    What was kept before stays: the other one is written beside it, so that there is something to show.
    """
    new, other = 0, list[str]()
    if texts:
        folder.mkdir(parents=True, exist_ok=True)
    for n, text in sorted(texts.items()):
        path = folder / f"round-{n:04}.json"
        if path.exists():
            if path.read_text() == text:
                continue
            path = folder / f"round-{n:04}-other.json"
            other.append(str(path))
        temporary = path.with_name(f".{path.name}.part")
        temporary.write_text(text)
        temporary.replace(path)
        new += 1
    return new, other


# Reading


def read_manifests(paths: Iterable[Path]) -> dict[str, str]:
    """The texts in files (one a line) and in the .json and .jsonl files of folders, by where they stand."""
    found: dict[str, str] = {}
    for path in paths:
        files = sorted(f for f in path.iterdir() if f.suffix in (".json", ".jsonl")) if path.is_dir() else [path]
        if not files:
            fail(f"there are no manifests (.json, .jsonl) in {path}", USAGE)
        for file in files:
            try:
                lines = file.read_bytes().decode("utf-8", "replace").split("\n")
            except OSError as error:
                fail(f"cannot read {file}: {error.strerror}", USAGE)
            texts = [(i, line) for i, line in enumerate(lines, 1) if line] or [(1, "")]
            for i, line in texts:
                found[f"{file}:{i}" if len(texts) > 1 else str(file)] = line
    return found


def trusted_keys(path: Path) -> dict[str, str]:
    """Keys or fingerprints by client: of an agent's folder those that it knows, its policy's and its own."""
    from murmur.clients.identity import load_identity
    from murmur.clients.memory import Memory
    from murmur.clients.settings import load_settings
    from murmur.protocol.encoding import b64

    if path.is_dir():
        settings = load_settings(path)
        known = {name: b64(key) for name, key in Memory(settings.workdir).peers.items()}
        return known | settings.policy.trusted | {settings.name: load_identity(settings.key_file).public_b64}
    try:
        values: Any = json.loads(path.read_text())
    except OSError as error:
        fail(f"cannot read {path}: {error.strerror}", USAGE)
    except ValueError:
        values = None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values.values()):
        fail(f'{path} is not a JSON object of names and keys: {{"hospital-a": "4f0c … or base64"}}', USAGE)
    return values


def model_hashes(path: Path) -> dict[str, str]:
    """The SHA-256 of each model file, by its name."""
    from hashlib import file_digest

    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        fail(f"there are no models (.safetensors) in {path}", USAGE)
    found: dict[str, str] = {}
    for file in files:
        try:
            with file.open("rb") as opened:
                found[file.name] = file_digest(opened, "sha256").hexdigest()
        except OSError as error:
            fail(f"cannot read {file}: {error.strerror}", USAGE)
    return found


# Showing


def show(report: Report) -> None:
    """What was checked, what does not hold, and what was not checked."""
    for chain in report.chains:
        first = next((f for f in report.broken if f.run == chain.run), None)
        out.print(f"[bold]{plain(chain.run)}[/]  {_covered(chain)}", soft_wrap=True)
        if first is None:
            signed = ", and every signature holds" if chain.masked else ""
            out.print(f"  every round follows from the one before it{signed}")
        else:
            out.print(f"  [bold red]round {first.round} is the first that does not hold[/]")
    if report.broken:
        rows = ((f.run or "–", f.round or "–", f.sentence, f.detail) for f in report.broken)
        print_table("What does not hold", ("run", "round", "what", "detail"), rows)
    for note in report.notes:
        out.print(f"[yellow]note[/]: {plain(_note(note))}", soft_wrap=True)
    rounds = sum(chain.last - chain.first + 1 for chain in report.chains)
    out.print(f"[bold green]good[/]: {rounds} rounds hold" if report.ok else "[bold red]broken[/]: do not rely on this")


def _covered(chain: Chain) -> str:
    kinds = [f"{count} {kind}" for count, kind in ((chain.masked, "masked"), (chain.plain, "plain")) if count]
    version = f", newest version {chain.version[:16]}" if chain.version else ""
    return f"rounds {chain.first} to {chain.last} ({', '.join(kinds)}), {len(chain.clients)} clients{version}"


def _note(note: Finding) -> str:
    options = {"identities_unchecked": " (--trusted)", "models_unchecked": " (--models)"}
    detail = f" ({note.detail})" if note.detail else ""
    return (f"{note.run}: " if note.run else "") + note.sentence + options.get(note.code, "") + detail


def _as_json(report: Report) -> dict[str, Any]:
    def row(finding: Finding) -> dict[str, Any]:
        about = {"run": finding.run, "round": finding.round, "detail": finding.detail}
        return {"code": finding.code, "sentence": finding.sentence, **about}

    from dataclasses import asdict

    return {
        "ok": report.ok,
        "broken": [row(f) for f in report.broken],
        "notes": [row(f) for f in report.notes],
        "runs": [asdict(chain) for chain in report.chains],
    }
