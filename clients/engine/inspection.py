"""A task looked at in a process of its own, before its first round: model, data, loss, metrics, and what they need.

    python -m murmur.clients.engine.inspection FILE

FILE: JSON of what to look at; the answer is written beside it as FILE.answer. What the task prints goes to stderr. A
task that crashes the process takes nobody with it.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from ...protocol.errors import OperatorError
from ...protocol.recipe import Recipe, parse_recipe
from ..contract import contract_of
from ..finding import Finding, green, red, words, yellow
from ..job import Job
from ..task import Task, at_home, load_task, optional
from .batches import load
from .contents import Contents, look, numbered
from .footprint import footprint
from .own_training import trains_by_itself
from .ranks import Ranks
from .session import Session
from .state import initial_model

TRIED = 512  # examples that the loss is tried with
FEW = 12  # labels that are not simply counted from 0 and are shown none the less
T = TypeVar("T")


class Stop(Exception):
    """What comes next needs what has just failed."""


class Inspection:
    """The findings about one task, in their order; `facts` are numbers for whoever goes on from them."""

    def __init__(self, asked: Mapping[str, Any], told: Callable[[], None] = lambda: None) -> None:
        self.asked, self.told = asked, told
        self.show: bool = asked["show"]
        self.recipe: Recipe = parse_recipe(asked["recipe"])
        self.model = Path(asked["model"])
        self.findings: list[Finding] = []
        self.facts: dict[str, Any] = {}

    def run(self) -> None:
        try:
            task = self._try("task", "correct the task, its reference or its options", self._task)
            with at_home(task):
                self._look(task)
        except Stop:
            pass

    def _look(self, task: Task) -> None:
        session = self._try("model", "correct the task's model()", lambda: self._model(task))
        train = self._split(session, "train")
        test = self._split(session, "test")
        if test and train and test.targets.labels and train.targets.labels is not None:
            self._strange_labels(train, test)
        if train is None:
            raise Stop
        if trains_by_itself(task):
            self._add(green("loss", "the task trains by itself: a training shows the rest"))
            return
        self._try("loss", "correct the task's loss()", lambda: self._loss(session, train))
        self._metrics(session, test)
        self._try("memory", "correct what the line says", lambda: self._memory(task))

    def _try(self, subject: str, todo: str, call: Callable[[], T]) -> T:
        try:
            return call()
        except Stop:
            raise
        except Exception as error:
            self._add(red(subject, words(error, show=self.show), todo))
            raise Stop from None

    def _add(self, finding: Finding) -> None:
        self.findings.append(finding)
        self.told()

    # What is looked at

    def _task(self) -> Task:
        task = load_task(self.asked["reference"], self.asked["options"])
        extras = [n for n in ("count", "metrics", "collate", "contract") if getattr(task, n, None) is not None]
        self._add(green("task", f"{type(task).__name__} is made" + (f", with {', '.join(extras)}" if extras else "")))
        return task

    def _model(self, task: Task) -> Session:
        layout = initial_model(task, self.recipe.seed, self.model)
        session = Session(Ranks.alone("cpu"))
        session.load(task, self._job())
        trained, whole = sum(p.numel() for p in session.parameters), sum(p.numel() for p in session.module.parameters())
        self.facts |= {
            "numbers": whole,
            "trained": trained,
            "model_bytes": layout.file_bytes,
            "update_bytes": layout.update(self.recipe.train.wire).file_bytes,
        }
        part = "" if trained == whole else f", {trained:,} of them train"
        self._add(green("model", f"{whole:,} parameters{part}; its file has {layout.file_bytes:,} bytes"))
        return session

    def _job(self) -> Job:
        r, folder = self.recipe, self.model.parent
        return Job(id="check", kind="train", model=self.model, update=folder / "update", train=r.train,
                   mu=r.strategy.mu, metrics=r.metrics, seed=r.seed, round=1, client="check")  # fmt: skip

    def _split(self, session: Session, split: str) -> Contents | None:
        """Look at a split; what is wrong with its examples is said, and the rest still looked at."""
        subject = f"data {split}"
        dataset = self._try(subject, f'correct the task\'s data("{split}")', lambda: session.data(split))
        size: int = len(dataset) if dataset is not None else 0  # pyright: ignore[reportArgumentType]: data() checks it
        self.facts[f"{split}_examples"] = size
        if not size or dataset is None:
            if split == "train":
                self._add(red(subject, "there is no example", "point the task's options at this site's data"))
                raise Stop
            todo = "give the task test data, unless this site is not to report metrics"
            self._add(yellow(subject, "none: this site reports no metrics", todo))
            return None
        contract = self._try("contract", "correct the task's contract", lambda: contract_of(session.task))
        found = self._try(
            subject, f'correct the task\'s data("{split}")', lambda: look(dataset, self.asked["limit"], contract)
        )
        self._describe(subject, found, collated=getattr(session.task, "collate", None) is not None)
        columns: Any = getattr(dataset, "columns", None)
        if contract and contract.columns and columns is not None and tuple(columns) != tuple(contract.columns):
            order = "in another order" if set(columns) == set(contract.columns) else "others"
            self._add(red("contract", f"{split}: the data's columns are {order} than the contract's", "align the data"))
        for what, rows in sorted(found.outside.items()):
            self._add(red("contract", f"{split}: {what}: {numbered(rows)}", "correct these examples, or the contract"))
        if contract and not found.outside:
            self._add(green("contract", f"{split}: what was looked at is as the task declares it"))
        return found

    def _describe(self, subject: str, found: Contents, *, collated: bool) -> None:
        looked = "" if found.seen == found.examples else f", {found.seen:,} of them looked at"
        shape = f"{found.examples:,} examples{looked}; input {found.inputs.described()}, target "
        self._add(green(subject, shape + found.targets.described() + self._labels(found)))
        ragged = max(len({s for p, _, s in side.shapes if p == path}) for side in (found.inputs, found.targets)
                     for path in {p for p, _, _ in side.shapes} or {""})  # fmt: skip
        if ragged > 1 and not collated:
            self._add(red(subject, "examples differ in shape", "give the task a collate(items), or make them alike"))
        for name, side in (("input", found.inputs), ("target", found.targets)):
            if side.not_finite:
                said = f"NaN or infinity in the {name} of {numbered(side.not_finite)}"
                self._add(red(subject, said, "fill these values in or leave the examples out"))

    def _labels(self, found: Contents) -> str:
        labels = found.targets.labels
        if not labels:
            return ""
        if found.targets.words and not self.show:
            return f"; {len(labels)} labels in words (--show-values shows them)"
        numbers = sorted(labels, key=lambda v: (str(type(v)), v))
        if not found.targets.words and numbers == list(range(len(numbers))) and len(numbers) > 2:
            return f"; labels 0 to {len(numbers) - 1}"
        if not self.show and (len(numbers) > FEW or found.seen < 2 * len(numbers)):
            return f"; {len(numbers)} different whole numbers"  # they may be ages, or what a single person has
        return "; labels " + ", ".join(f"{v:g}" if isinstance(v, int | float) else str(v) for v in numbers)

    def _strange_labels(self, train: Contents, test: Contents) -> None:
        new = (test.targets.labels or set()) - (train.targets.labels or set())
        if new and train.seen == train.examples:
            said = f"{len(new)} of its labels do not occur in the training data"
            self._add(yellow("data test", said, "see whether both splits are of the same classes"))

    def _loss(self, session: Session, train: Contents) -> None:
        """The loss takes each of these examples, gives a finite scalar, and is a sum."""
        refused, first = self._refused(session, train)
        if refused:
            said = f"it is not finite for {numbered(refused)}"
            if first:
                said = f"it cannot take {numbered(refused)}: {words(first, show=self.show)}"
            self._add(red("loss", said, "correct these examples or the task's loss()"))
            raise Stop
        dataset = session.data("train")
        assert dataset is not None, "it was looked at"
        session.prepare_training(dataset, self._job())  # raises where the loss is a mean
        tried = min(train.seen, TRIED)
        self._add(
            green("loss", f"a scalar that is a sum over the batch, finite for the {tried} examples it was tried on")
        )

    def _refused(self, session: Session, found: Contents) -> tuple[list[int], Exception | None]:
        """The examples that the loss raises an error for, with the first error, or is not finite for."""
        width = min(self.recipe.train.piece, 64)
        step = max(1, found.seen // TRIED)
        numbers = found.indices[::step][:TRIED]
        refused: list[int] = []
        first: Exception | None = None
        for at in range(0, len(numbers), width):
            piece = numbers[at : at + width]
            if self._taken(session, piece) is True:
                continue
            alone = [(number, self._taken(session, [number])) for number in piece]
            bad = [(number, taken) for number, taken in alone if taken is not True]
            if not bad:  # each by itself is fine: what is wrong is how they come together
                whole = self._taken(session, piece)
                raise whole if isinstance(whole, Exception) else OperatorError("the loss of a batch is not finite")
            for number, taken in bad:
                refused.append(number)
                first = first or (taken if isinstance(taken, Exception) else None)
        return refused, first

    @torch.no_grad()
    def _taken(self, session: Session, numbers: list[int]) -> bool | Exception:
        """Whether the loss of these examples is a finite number; the error where it is none at all."""
        session.module.eval()
        try:
            losses = [session.loss(session.module(i), t) for i, t in self._batches(session, "train", numbers)]
        except OperatorError:
            raise  # not a scalar, not a pair: of no example's making
        except Exception as error:
            return error
        return all(math.isfinite(float(loss)) for loss in losses)

    def _batches(self, session: Session, split: str, numbers: list[int]) -> Iterator[tuple[Any, Any]]:
        """These examples as one batch; as one of each data set where the task gives several."""
        dataset: Any = session.data(split)
        rows = torch.tensor(numbers)
        pieces = dataset.by_set(rows) if hasattr(dataset, "by_set") else [rows]
        collate = optional(session.task, "collate") if session.task else None
        return load(dataset, iter(pieces), collate=collate)  # without the task's workers: a start each is too long

    def _metrics(self, session: Session, test: Contents | None) -> None:
        measure = optional(session.task, "metrics") if session.task else None
        wanted = [n for n in self.recipe.metrics if n != "loss"]
        if measure is None or test is None:
            if wanted and test is not None:
                todo = "give the task metrics(output, target), or ask for the loss only"
                self._add(yellow("metrics", f"the recipe asks for {', '.join(wanted)}, the task has none", todo))
            return

        def check() -> None:
            numbers = test.indices[:64]
            halves = [numbers[: len(numbers) // 2], numbers[len(numbers) // 2 :]]
            found = [self._measured(session, measure, part) for part in (numbers, *halves) if part]
            whole, *parts = found
            if missing := [n for n in wanted if n not in whole]:
                todo = f"it gives {', '.join(whole) or 'nothing'}: name these in the recipe, or compute the others"
                self._add(yellow("metrics", f"the recipe asks for {', '.join(missing)} as well", todo))
            mean = [n for n, (total, count) in whole.items() if len(parts) == 2 and not _adds(total, count, n, parts)]
            if mean:
                todo = "give the sum over the batch and what it is divided by: (correct.sum(), len(target))"
                self._add(yellow("metrics", f"{', '.join(mean)} does not add up over two halves of a batch", todo))
            elif not missing:
                self._add(green("metrics", f"pairs (sum, count) that add up: {', '.join(whole)}"))

        self._try("metrics", "metrics(output, target) gives a dict of pairs: {name: (sum, count)}", check)

    @torch.no_grad()
    def _measured(self, session: Session, measure: Any, numbers: list[int]) -> dict[str, tuple[float, float]]:
        added: dict[str, tuple[float, float]] = {}
        for inputs, target in self._batches(session, "test", numbers):
            found: Any = measure(session.module.eval()(inputs), target)
            if not isinstance(found, Mapping) or any(
                not isinstance(v, (tuple, list)) or len(v) != 2 for v in found.values()
            ):
                raise OperatorError(f"it gave a {type(found).__name__} that is no dict of pairs")
            for name, (total, count) in found.items():
                before = added.get(str(name), (0.0, 0.0))
                added[str(name)] = before[0] + float(total), before[1] + float(count)
        return added

    def _memory(self, task: Task) -> None:
        session = Session(Ranks.alone())
        session.load(task, self._job())
        train = self.recipe.train
        share = -(-train.batch_size // self.asked["world"])
        examples = min(train.piece, share, self.facts["train_examples"])
        batch = next(self._batches(session, "train", list(range(examples))))
        self.facts["memory"] = footprint(session, self.recipe, batch)


def _adds(total: float, count: float, name: str, parts: list[dict[str, tuple[float, float]]]) -> bool:
    sums = (sum(p[name][0] for p in parts if name in p), sum(p[name][1] for p in parts if name in p))
    return all(math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-6) for a, b in zip((total, count), sums, strict=True))


def main(path: Path) -> None:
    """Answer the question in a file; the answer grows with each finding, so that a crash leaves those before it."""
    os.dup2(2, 1)  # what the task prints is no answer
    asked = json.loads(path.read_text())
    answer = path.with_name(path.name + ".answer")

    def tell(over: bool = False) -> None:
        told = {"findings": [f.to_json() for f in inspection.findings], "facts": inspection.facts, "over": over}
        answer.write_text(json.dumps(told))

    inspection = Inspection(asked, tell)
    inspection.run()
    tell(over=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
