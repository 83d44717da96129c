"""What the `run` and `model` commands do: the first model, a run or a version on the terminal."""

from __future__ import annotations

import hashlib
import importlib.util
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from murmur.client import Client
from murmur.output import out, plain, print_json, print_table
from murmur.protocol.errors import NotFound, OperatorError
from murmur.protocol.recipe import Recipe
from murmur.protocol.registry import LineageView
from murmur.protocol.tensors import read_layout
from murmur.protocol.views import PrivacyView, RoundView, RunDetail, VersionView
from murmur.watching import kind, standing
from murmur.web.words import many, size, took


@contextmanager
def first_model(task: str, options: dict[str, Any], recipe: Recipe, init: Path | None) -> Generator[Path]:
    """The file that a run starts from: `init`, or a new model of the task with the recipe's seed."""
    if bool(task) == bool(init):
        raise OperatorError("say where the first model comes from: --task module:Class, or --init model.safetensors")
    if init is not None:
        read_layout(init)
        yield init
        return
    from murmur.clients.engine.state import initial_model
    from murmur.clients.task import load_task

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        initial_model(load_task(task, options), recipe.seed, path)
        yield path


def code_of(reference: str) -> str:
    """SHA-256 of the Python file that a task's reference names; empty where it names none."""
    name = reference.removeprefix("flower:").rpartition(":")[0]
    if not name.endswith(".py"):
        spec = importlib.util.find_spec(name) if name and name.replace(".", "_").isidentifier() else None
        name = spec.origin or "" if spec and spec.has_location else ""
    return hashlib.sha256(Path(name).read_bytes()).hexdigest() if name else ""


def find_version(client: Client, wanted: str) -> VersionView:
    """The version that a name stands for, with who is in it.

    `RUN@N`, `RUN` (its newest), `NAME@ALIAS`, `NAME@N` (where one run of the name has it), `NAME` (the newest run's
    newest), or the start of a SHA-256. Raises NotFound, and OperatorError where several runs have a NAME@N.
    """
    name, _, which = wanted.partition("@")
    if which and not which.isdecimal():
        found = next((a for a in client.aliases(name) if a.alias == which), None)
        if found is None:
            raise NotFound(f"{name!r} has no alias {which!r}: `murmur model history {name}` shows what it had")
        name, which = found.version.run, str(found.version.n)
    of_run = client.versions(name) or _of_name(client, name, which)
    for version in of_run:
        if not which or str(version.n) == which:
            return version
    if not of_run and len(wanted) >= 8:
        for version in client.versions():
            if version.sha256.startswith(wanted):
                return next(v for v in client.versions(version.run) if v.n == version.n)
    raise NotFound(f"no version is named {wanted!r}: `murmur model list` shows them")


def _of_name(client: Client, name: str, which: str) -> list[VersionView]:
    """The versions of the newest run of a name, or of the one that has version `which`."""
    ids = [r.id for r in client.runs() if r.name == name and (not which or int(which) <= r.version)]
    if which and len(ids) > 1:
        listed = ", ".join(f"{id}@{which}" for id in ids)
        raise OperatorError(f"several runs are named {name!r}: say which version is meant, {listed}")
    return client.versions(ids[0]) if ids else []


def show(detail: RunDetail, newest: VersionView) -> None:
    """A run with its rounds, and who is in its newest version."""
    run = detail.run
    about = f"{run.recipe.strategy.name}, {kind(run)}, round {run.round} of {run.rounds}"
    out.print(f"[bold]{run.id}[/]  {about}, {plain(standing(run))}", soft_wrap=True)
    if run.simulation:
        out.print(f"simulated: {many(run.simulation.clients, 'virtual client')}, {run.simulation.backend}")
    if run.privacy:
        show_privacy(run.privacy)
    values = {(m.version, m.name): m.value for m in detail.metrics}
    lived = [r.world for r in detail.rounds if r.world]
    rows = (
        (
            r.n if r.kind == "train" else "final",
            r.state,
            r.attempt,
            sum(a.state == "counted" for a in r.assignments),
            *(_of_world(r) if lived else ()),
            values.get((r.n - 1, "accuracy")),
            values.get((r.n - 1, "loss")),
            r.reason,
        )
        for r in detail.rounds
    )
    of_world = ("after", "took", "late", "lost") if lived else ()
    names = ("round", "state", "attempt", "counted", *of_world, "accuracy before", "loss before", "reason")
    print_table("Rounds", names, rows)
    if lived:
        down, up = size(sum(w.down_bytes for w in lived)), size(sum(w.up_bytes for w in lived))
        out.print(f"{took(lived[-1].ends_s)} in the world, {down} to the clients, {up} from them")
    if detail.rounds and detail.rounds[-1].groups:
        rows = ((g.n, g.clients, g.left, g.reason) for g in detail.rounds[-1].groups)
        print_table(f"Groups of round {detail.rounds[-1].n}", ("group", "clients", "left", "reason"), rows)
    show_contributors(newest)


def _of_world(r: RoundView) -> tuple[object, ...]:
    """When a simulated round was over in its world, what it took, and who was late or lost there."""
    if r.world is None:
        return ("",) * 4
    late = sum(a.late for a in r.assignments)
    return took(r.world.ends_s), took(r.world.seconds), late, sum(a.lost for a in r.assignments) - late


def show_privacy(privacy: PrivacyView) -> None:
    """An epsilon with all that it rests on."""
    out.print(f"[bold]{privacy.text}[/], spent by {privacy.spent} sums", soft_wrap=True)
    out.print(plain(privacy.meaning), soft_wrap=True)
    out.print(plain("assumed: " + "; ".join(privacy.assumptions)), soft_wrap=True)


def show_version(version: VersionView) -> None:
    """A version with its hash, its metrics, who is in it and who is missing."""
    metrics = "".join(f", {name} {value:.4g}" for name, value in sorted(version.metrics.items()))
    out.print(
        f"[bold]{version.run}@{version.n}[/]  {version.bytes} bytes{metrics}, made {version.created_at:%F %T} UTC"
    )
    if version.aliases:
        out.print(f"[bold]{', '.join(version.aliases)}[/] of {version.run_name}")
    out.print(f"sha256 {version.sha256}" + (f", made from {version.parent}" if version.parent else ""), soft_wrap=True)
    show_contributors(version)


def show_lineage(lineage: LineageView) -> None:
    """What made a version, and what it cost its contributors' privacy."""
    if lineage.origin:
        out.print(f"its run started from {lineage.origin}")
    known = {"recipe": lineage.recipe, "code": lineage.code, "manifest of its round": lineage.manifest}
    for what, digest in known.items():
        if digest:
            out.print(f"[dim]{what}[/] {digest}", soft_wrap=True)
    if lineage.privacy:
        show_privacy(lineage.privacy)


def show_contributors(version: VersionView) -> None:
    if not version.n:
        return out.print("version 0 is what the run started from: no client is in it")
    asked = version.contributors + len(version.missing)
    count = f"{version.contributors} of {asked} clients"
    out.print(f"version {version.n} is made from {count}: {plain(', '.join(version.who))}", soft_wrap=True)
    if version.missing:
        rows = ((m.client, m.reason) for m in version.missing)
        print_table(f"Missing from version {version.n}", ("client", "reason"), rows)


def show_comparison(
    details: Sequence[RunDetail], versions: Sequence[Sequence[VersionView]], metric: str, as_json: bool
) -> None:
    """Runs side by side: what differs in their recipes, and what the value that all of them reached has cost each."""
    from murmur.web.comparing import MOST, compared, costs, differing, names

    if not 2 <= len(details) <= MOST:
        raise OperatorError(f"{len(details)} runs: from two to {MOST} are compared")
    runs = compared(details, versions)
    known = names(runs)
    if metric and metric not in known:
        raise OperatorError(f"no run has the metric {metric!r}; there are {', '.join(known) or 'none'}")
    metric = metric or next(iter(known), "")
    target, found = costs(runs, metric) or (None, [])
    differ = differing(runs)
    if as_json:
        rows = [
            {"run": cost.run.detail.run.id, "best": cost.best, "epsilon": cost.run.epsilon}
            | {name: getattr(cost.first, name) if cost.first else None for name in ("version", "seconds", "bytes")}
            for cost in found
        ]
        settings = {key: dict(zip([d.run.id for d in details], values, strict=True)) for key, values in differ}
        return print_json({"metric": metric, "reached_by_all": target, "runs": rows, "settings": settings})
    print_table("Settings that differ", ("setting", *(d.run.id for d in details)), ((k, *v) for k, v in differ))
    if target is None:
        return out.print("none of them has measured anything yet")
    costly = (
        (c.run.detail.run.id, c.best, c.first and c.first.version, c.first and took(c.first.seconds),
         c.first and size(c.first.bytes), c.run.epsilon)
        for c in found
    )  # fmt: skip
    columns = ("run", f"best {metric}", "version", "seconds", "moved", "epsilon of the run")
    print_table(f"What it took to reach {metric} {target:.4g}, which all of them did", columns, costly)
