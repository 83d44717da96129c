"""A site checked before its first round: data, model, one small training in the real processes, disk, coordinator.

Nothing of the data is shown but shapes, dtypes and labels that are numbers; nothing of it leaves the machine.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..protocol.errors import MurmurError
from ..protocol.recipe import Recipe
from ..protocol.sections import Parallel
from .finding import Finding, green, is_own, red, yellow
from .job import Job, Result
from .models import KEPT
from .settings import Settings, TaskEntry
from .trainer import OutOfMemory, Trainer, TrainerFailed, gpu_count

STEPS = 3  # of the small training: the first allocates what later ones find
INSPECTION_S = 900.0  # a task that needs longer to load a few examples trains nobody


@dataclass(frozen=True, kw_only=True)
class Site:
    """What is checked. settings: of an enrolled client; None before, where nothing of a coordinator is known.

    limit: examples of a split that are looked at, where each is loaded by itself. show: also words that may quote data.
    """

    entry: TaskEntry
    recipe: Recipe
    settings: Settings | None = None
    limit: int = 2000
    show: bool = False

    @property
    def parallel(self) -> Parallel:
        """The plan: the site's own in place of the recipe's."""
        return (self.settings and self.settings.parallel) or self.recipe.parallel

    @property
    def processes(self) -> int:
        ranks = self.settings.ranks if self.settings else "auto"
        return (gpu_count() or 1) if ranks == "auto" else ranks


@dataclass
class Report:
    """The findings in their order, and what was measured on the way; `told` hears of each finding at once."""

    told: Callable[[Finding], None] = lambda finding: None
    findings: list[Finding] = field(default_factory=list[Finding])
    facts: dict[str, Any] = field(default_factory=dict[str, Any])

    def add(self, *findings: Finding) -> None:
        for finding in findings:
            self.findings.append(finding)
            self.told(finding)

    @property
    def ok(self) -> bool:
        return all(f.level != "red" for f in self.findings)

    def to_json(self) -> dict[str, Any]:
        return {"ok": self.ok, "findings": [f.to_json() for f in self.findings], "facts": self.facts}


def check(site: Site, report: Report) -> None:
    """Add all findings about a site to the report; later ones are left out where an earlier one makes them moot."""
    from .reach import reach

    place = site.settings.workdir if site.settings and site.settings.workdir.is_dir() else None
    with TemporaryDirectory(prefix="murmur-check-", dir=place) as name:
        folder = Path(name)
        terms(site, report)
        if world(site, report):
            inspect(site, report, folder)
            if report.ok or "memory" in report.facts:
                train(site, report, folder)
    disk(site, report)
    if site.settings is not None:
        reach(site.settings, report)
    predict(site, report)


def terms(site: Site, report: Report) -> None:
    """Whether this site's policy takes part in what the recipe says."""
    if site.settings is None:
        return
    policy, recipe = site.settings.policy, site.recipe
    if policy.require_secure and not recipe.secure.on:
        report.add(red("policy", "this site takes part in secure rounds only, and the recipe's are plain",
                       "set secure.on = true, or [policy] require_secure = false in client.toml"))  # fmt: skip
    elif recipe.secure.on and recipe.cohort.min < policy.min_clients:
        said = f"the recipe sums {recipe.cohort.min} clients, this site asks for {policy.min_clients}"
        report.add(red("policy", said, "raise cohort.min, or lower [policy] min_clients"))
    elif (policy.require_dp or policy.epsilon) and recipe.dp.mode != "local":
        report.add(red("policy", "this site trains with local differential privacy only, the recipe has none",
                       'set dp.mode = "local", or change [policy] require_dp and epsilon'))  # fmt: skip
    else:
        report.add(green("policy", "this site would take part in the recipe's rounds"))


def world(site: Site, report: Report) -> int:
    """How many processes train together; 0 where the plan cannot be had here."""
    try:
        found = site.parallel.world(site.processes)
    except MurmurError as error:
        report.add(red("plan", error.detail, "change the plan, or processes in client.toml"))
        return 0
    report.facts["processes"] = found
    return found


def inspect(site: Site, report: Report, folder: Path) -> None:
    """Look at the task in a process of its own; its model lies in the folder afterwards."""
    question = folder / "question"
    asked = {
        "reference": site.entry.reference,
        "options": site.entry.options,
        "recipe": site.recipe.model_dump(mode="json"),
        "model": str(folder / "model.safetensors"),
        "limit": site.limit,
        "show": site.show,
        "world": report.facts.get("processes", 1),
    }
    question.write_text(json.dumps(asked))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-m", "murmur.clients.engine.inspection", str(question)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=INSPECTION_S)
        how = f"the process ended with {done.returncode}: {done.stderr.strip().splitlines()[-1:]}"
        if done.returncode < 0:
            how = f"the process was ended by signal {-done.returncode}; of 9 the usual reason is memory that ran out"
    except subprocess.TimeoutExpired:
        how = f"it took more than {INSPECTION_S:.0f} s"
    answer: dict[str, Any] = {"findings": [], "facts": {}, "over": False}
    if (told := question.with_name("question.answer")).exists():
        answer = json.loads(told.read_text())
    report.add(*map(Finding.from_json, answer["findings"]))
    report.facts |= answer["facts"]
    if not answer["over"]:
        report.add(red("task", how, "look at the task's own code: what comes after the line above broke the process"))


def train(site: Site, report: Report, folder: Path) -> None:
    """Train a few steps in processes as a round has them: that it works, how fast, in how much memory."""
    facts, recipe = report.facts, site.recipe
    batch = recipe.train.batch_size
    few, test = min(facts["train_examples"], STEPS * batch), min(facts["test_examples"], STEPS * batch)
    sampled = {"reference": site.entry.reference, "options": site.entry.options, "train": few, "test": test,
               "memory": str(folder / "memory")}  # fmt: skip
    log = folder / "ranks.log"
    reference = "murmur.clients.engine.dryrun:Sampled"
    with Trainer(reference, sampled, processes=site.processes, workdir=folder, log_file=log) as trainer:

        def job(name: str, kind: Any) -> Result:
            once = recipe.train.model_copy(update={"epochs": 1})
            return trainer.run(
                Job(id=name, kind=kind, model=folder / "model.safetensors", update=folder / "update", train=once,
                    mu=recipe.strategy.mu, metrics=recipe.metrics, seed=recipe.seed, round=1, client="check",
                    dp=recipe.dp_of_round(), parallel=site.parallel)
            )  # fmt: skip

        try:
            job("first", "train")
            result, evaluated = job("second", "train"), job("third", "evaluate")
        except OutOfMemory:
            report.add(red("training", "memory ran out", "lower train.micro_batch: it takes fewer examples at a time"))
            return
        except MurmurError as error:
            shown = error.detail if site.show or not isinstance(error, TrainerFailed) else _place(error.detail)
            report.add(red("training", shown, "correct the task, or the recipe's [train] and [parallel]"))
            return
        peaks = [_peak_rss(pid) for pid in trainer.pids]
    trained_s = max(result.seconds - evaluated.seconds, result.seconds / 10)
    facts |= {
        "examples_per_s": few / trained_s,
        "evaluated_per_s": test / max(evaluated.seconds, 1e-6) if test else 0.0,
        "peak_rss_bytes": peaks,
        "peak_gpu_bytes": [int(p.read_text()) for p in sorted(folder.glob("memory.*"))],
    }
    if result.steps == 0:
        report.add(yellow("training", "no step was taken: fp16 overflowed in each", 'set train.precision = "bf16"'))
    memory = ", ".join(f"{peak / 2**20:,.0f} MiB" for peak in peaks)
    gpu = ", ".join(f"{peak / 2**20:,.0f} MiB" for peak in facts["peak_gpu_bytes"])
    said = f"{result.steps} steps in {len(peaks)} process{'es' * (len(peaks) > 1)}, {facts['examples_per_s']:,.0f} "
    said += f"examples/s; memory {memory}" + (f", on the GPU {gpu}" if gpu else "")
    report.add(green("training", said))
    _memory(report, sum(peaks))


def _memory(report: Report, peak: int) -> None:
    try:
        installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return
    if peak > 0.8 * installed:
        said = f"training takes {peak / 2**30:.1f} GiB of this machine's {installed / 2**30:.1f} GiB"
        report.add(yellow("memory", said, "lower train.micro_batch, or leave the machine to the agent"))


def _place(detail: str) -> str:
    """A trainer's error without its words: the kind, and the innermost line of the task's own code."""
    kind = detail.partition("\n")[0].split(": ")[:2]
    lines = [line.strip() for line in detail.splitlines()]
    frames = [i for i, line in enumerate(lines) if line.startswith('File "')]
    own = [i for i in frames if is_own(Path(lines[i].split('"')[1]))]
    if not own:
        return ": ".join(kind)
    file, _, place = lines[own[-1]].removeprefix('File "').partition('", ')
    code = lines[own[-1] + 1] if own[-1] + 1 < len(lines) else ""
    return f"{': '.join(kind)} at {Path(file).name}, {place}: `{code}` (--show-values shows its words)"


def _peak_rss(pid: int) -> int:
    """The most memory that a living process has had at a time, in bytes; what it shares with others counts too."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = next((line.split()[1] for line in text.splitlines() if line.startswith("VmHWM:")), "0")
    return int(found) * 1024


def disk(site: Site, report: Report) -> None:
    """Whether there is room for the models, the update and the checkpoints of a round."""
    facts = report.facts
    if "model_bytes" not in facts:
        return
    place = site.settings.workdir if site.settings else Path.cwd()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    state = facts.get("memory", {}).get("optimizer", 0) + facts["model_bytes"]
    needed = (KEPT + 1) * facts["model_bytes"] + 2 * facts["update_bytes"] + 2 * state
    facts |= {"disk_free_bytes": free, "disk_needed_bytes": needed}
    said = f"{size_text(free)} free, a round needs {size_text(needed)} for models, update and checkpoints"
    if free < needed:
        report.add(red("disk", said, f"make room in {place}, or set workdir in client.toml"))
    elif free < 3 * needed:
        report.add(yellow("disk", said, f"make room in {place}: two runs at a time would fill it"))
    else:
        report.add(green("disk", said))


def predict(site: Site, report: Report) -> None:
    """How long this site's part of a round will take."""
    facts, recipe = report.facts, site.recipe
    if "examples_per_s" not in facts:
        return
    train_s = recipe.train.epochs * facts["train_examples"] / facts["examples_per_s"]
    test_s = facts["test_examples"] / facts["evaluated_per_s"] if facts["evaluated_per_s"] else 0.0
    parts = {"training": train_s, "evaluation": test_s}
    if "down_bytes_per_s" in facts:
        parts["download"] = facts["model_bytes"] / facts["down_bytes_per_s"]
        parts["upload"] = facts["update_bytes"] / facts["up_bytes_per_s"]
    facts["round_s"] = sum(parts.values())
    said = f"about {_time(facts['round_s'])} at this site: " + ", ".join(f"{k} {_time(v)}" for k, v in parts.items())
    report.add(green("round", said))


def size_text(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:,.1f} GiB"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
