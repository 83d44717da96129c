"""`murmur client check` and `murmur client plan`: what a site would meet in its first round, before it."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from murmur.clients.check import Report, Site, check, inspect, size_text, world
from murmur.clients.finding import Finding
from murmur.clients.settings import FILE, TaskEntry, absolute_reference, load_settings
from murmur.output import FAILED, out, plain, print_json, print_table
from murmur.protocol.errors import OperatorError
from murmur.protocol.recipe import load_recipe, parse_recipe

MARKS = {"green": "[green]ok[/]  ", "yellow": "[yellow]look[/]", "red": "[bold red]bad[/] "}


def find_site(
    directory: Path, task: str, recipe: Path | None, options: dict[str, Any], *, limit: int, show: bool
) -> Site:
    """What is checked: a task of an enrolled client, or one that is named as file.py:Class with its options."""
    given = load_recipe(recipe) if recipe else None
    settings = load_settings(directory) if (directory / FILE).exists() else None
    if ":" in task:
        entry = TaskEntry(reference=absolute_reference(task, Path.cwd()), options=options)
    elif settings is None:
        raise OperatorError(
            f"there is no {directory / FILE}: name an enrolled client's folder with --dir, or a task with "
            "--task file.py:Class and its options with --option key=value"
        )
    else:
        known = ", ".join(sorted(settings.tasks)) or "none"
        named = task or (given.task if given else "") or (known if len(settings.tasks) == 1 else "")
        if named not in settings.tasks:
            what = f"there is no task {named!r}" if named else "say which task: --task NAME"
            raise OperatorError(f"{directory / FILE}: {what} (installed: {known})")
        entry = settings.tasks[named]
        entry = entry.model_copy(update={"options": entry.options | options})
        task = named
    found = given or parse_recipe({"name": "check", "task": task if ":" not in task else "check"})
    return Site(entry=entry, recipe=found, settings=settings, limit=limit, show=show)


def show_finding(finding: Finding) -> None:
    """One line of a check, and below it what to do."""
    width = 20
    out.print(f"{MARKS[finding.level]}  [bold]{finding.subject:<{width}}[/] {plain(finding.said)}", soft_wrap=True)
    if finding.todo:
        out.print(f"{'':{width + 7}}[dim]→ {plain(finding.todo)}[/]", soft_wrap=True)


def check_command(site: Site, *, as_json: bool) -> int:
    """Check a site and print each finding as it comes; 1 where one is red."""
    report = Report((lambda finding: None) if as_json else show_finding)
    with out.status("checking") if not as_json and out.is_terminal else nullcontext():
        check(site, report)
    if as_json:
        print_json(report.to_json())
    elif report.ok:
        doubts = sum(f.level == "yellow" for f in report.findings)
        out.print("[bold green]ready[/] for a round" + (f", {doubts} to look at" if doubts else ""))
    else:
        out.print(f"[bold red]not ready[/]: {sum(f.level == 'red' for f in report.findings)} to correct first")
    return 0 if report.ok else FAILED


def plan_command(site: Site, *, as_json: bool) -> int:
    """Print what the recipe and this site come to: processes, steps, precision, memory; 1 where it cannot be had."""
    report = Report()
    with TemporaryDirectory(prefix="murmur-plan-") as name:
        if world(site, report):
            inspect(site, report, Path(name))
    found = resolved(site, report)
    bad = [f for f in report.findings if f.level == "red"]
    if as_json:
        print_json({"ok": not bad, "plan": found, "findings": [f.to_json() for f in bad]})
        return FAILED if bad else 0
    print_table(f"{site.recipe.task}, as this machine would train it", ("what", "is"), _rows(found))
    for finding in bad:
        out.print(f"{MARKS['red']}  [bold]{finding.subject}[/] {plain(finding.said)}", soft_wrap=True)
        out.print(f"      [dim]→ {plain(finding.todo)}[/]", soft_wrap=True)
    return FAILED if bad else 0


def resolved(site: Site, report: Report) -> dict[str, Any]:
    """The plan with all that is "auto" or 0 in it settled; memory in bytes, of the whole model in one process."""
    facts, train = report.facts, site.recipe.train
    processes = facts.get("processes", 0)
    replicas = processes // _model_parallel(site) if processes else 0
    mine = -(-train.batch_size // replicas) if replicas else 0
    micro = min(train.piece, mine)
    examples = facts.get("train_examples", 0)
    found: dict[str, Any] = {
        "processes": processes,
        "of the site": site.processes,
        "plan from": "client.toml" if site.settings and site.settings.parallel else "the recipe",
        "parallel": {name: getattr(site.parallel, name) for name in type(site.parallel).model_fields},
        "batch_size": train.batch_size,
        "examples of a process in a step": mine,
        "micro_batches of a step": -(-mine // micro) if micro else 0,
        "examples of a micro_batch": micro,
        "steps of a round": train.steps_over(examples),
        "optimizer": train.optimizer,
        "precision": train.precision,
    }
    if memory := dict(facts.get("memory", {})):
        found |= {"precision": memory.pop("precision"), "device": memory.pop("device")}
        found["memory"] = memory | {"sum": sum(memory.values())}
    return found


def _model_parallel(site: Site) -> int:
    """Processes that hold one replica together, whatever the plan has besides `data`."""
    return int(getattr(site.parallel, "model", 1))


def _rows(found: dict[str, Any]) -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in found.items():
        if name == "memory":
            rows += [(f"memory: {part}", size_text(count)) for part, count in value.items()]
        elif isinstance(value, dict):
            rows += [(f"{name}.{key}", _auto(key, inner)) for key, inner in value.items()]
        else:
            rows.append((name, value))
    return rows


def _auto(key: str, value: Any) -> Any:
    return "0 (all of the site)" if key == "data" and value == 0 else value
