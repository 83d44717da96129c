"""A task: what an organization writes once, its model, its data and its loss, and how it is found by name."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from functools import partial, reduce
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, cast

from ..protocol.errors import OperatorError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.data import Dataset

    from .engine.ranks import Ranks
    from .job import Job, Progress, Result

GROUP = "murmur.tasks"
PREFIX = "murmur_task_"  # of the names that tasks' files are imported under
FLOWER = "flower:"  # before the reference to a Flower ClientApp


class Task(Protocol):
    """An organization's private code. All clients of a run have the same model; the data never leaves.

    Optional, used when present:
      count(target) -> int                 what `loss` sums over, when it is not examples (tokens, pixels)
      metrics(output, target) -> {name: (sum, count)}
      collate(items) -> (input, target)    in place of torch's own collating
      contract: Contract                 what its data have to be like, which `murmur client check` looks at
      distill(output, teacher_output)      for `train.distill`, a sum over the batch; without it, outputs are logits
      workers: int                         processes that load data; 0 loads between the steps
      mixed = True                         data(split) gives several data sets, and the model gets (name, input), loss,
                                           count and metrics (name, target): the name of the one that a piece is from
      labels(split)                        the class of each example, for train.balanced: whole numbers, or a dict of
                                           them by data set; not needed for a TensorDataset whose targets they are
      examples(split) -> int               how many an epoch reads of a stream that has no length
      local: tuple[str, ...]               name patterns ("head.*", "*.norm.*") of tensors that never leave the site

      train(context), evaluate(context)    a loop of its own in place of the engine's, and of `loss`: docs/training.md

    Parameters that do not require a gradient stay where they are as well: model() builds them, the same at every site.
      blocks(model), tensor_plan(model), stages(model, n)   how it is split over GPUs: docs/training.md
    """

    def model(self) -> nn.Module:
        """A new module on the CPU; its start values only matter where a run begins."""
        ...

    def data(self, split: str) -> Dataset[Any] | Mapping[str, Dataset[Any]] | None:
        """A data set of (input, target), for "train" and for "test"; None where the site has no test data.

        A map-style one, a dict of several by name, which `train.mixture` says how to draw from, or a stream.
        """
        ...

    def loss(self, output: Any, target: Any) -> Tensor:
        """The SUM over the batch, not the mean: only sums add up exactly over pieces, processes and clients."""
        ...


class Worker(Protocol):
    """A task that does a job by itself, in place of the engine's loop; `clients.flower` makes one of a Flower app."""

    def first(self) -> tuple[Mapping[str, Tensor], frozenset[str]]:
        """The tensors that a run starts from, by name, and which of them are buffers."""
        ...

    def work(
        self, job: Job, ranks: Ranks, report: Callable[[Progress], None] | None, stop: Callable[[], bool] | None
    ) -> Result:
        """Do the job, on every rank; rank 0 writes the update. report and stop as `run_job` has them."""
        ...


def is_task(value: object) -> bool:
    """Whether this is a task, of either kind, and not the class of one."""
    return not isinstance(value, type) and not _missing(value)


def _missing(value: object) -> list[str]:
    if callable(getattr(value, "work", None)):
        return []
    missing = [name for name in ("model", "data", "loss") if not callable(getattr(value, name, None))]
    return [name for name in missing if name != "loss" or not callable(getattr(value, "train", None))]


def load_task(reference: str, options: Mapping[str, Any]) -> Task:
    """The task that a reference names, made by calling what it names with `options`.

    reference: "package.module:Name", "path/to/file.py:Name", or the name of an entry point in the group murmur.tasks;
    with "flower:" in front, a Flower ClientApp, see `clients.flower`.
    A file is imported under a private name; modules beside it can be imported while it loads and, `at_home`, while it
    is used, and its folder is not left on sys.path. Raises OperatorError, which says what to change, for everything
    that can be wrong with it.
    """
    target = find(reference)
    reference = reference.removeprefix(FLOWER)
    if not callable(target):
        raise OperatorError(
            f"{reference!r} is a {type(target).__name__}: name a class or a function that makes the task"
        )
    try:
        inspect.signature(target).bind(**options)
    except TypeError as error:
        accepted = ", ".join(p for p in inspect.signature(target).parameters) or "none"
        raise OperatorError(f"the options of {reference!r} do not fit: {error}. It takes: {accepted}") from None
    except ValueError:
        pass  # a callable without a signature, some written in C: calling it will tell
    with _beside(_folder(reference)):
        try:
            task = target(**options)
        except OperatorError:
            raise
        except Exception as error:
            raise OperatorError(f"making the task {reference!r} failed: {_last_words(error)}") from error
    if missing := _missing(task):
        raise OperatorError(f"{reference!r} gave a {type(task).__name__} without {', '.join(missing)}: see murmur.Task")
    return cast(Task, task)


def find(reference: str) -> Any:
    """What a reference names, not yet called; raises OperatorError that says what to do."""
    if reference.startswith(FLOWER):
        from .flower import FlowerTask

        return partial(FlowerTask, reference.removeprefix(FLOWER))
    where, colon, name = reference.rpartition(":")
    if not colon:
        return _entry_point(reference)
    if not where or not name:
        raise OperatorError(f"{reference!r} is not a task: write package.module:Name or path/to/file.py:Name")
    module = _import_file(Path(where).expanduser()) if where.endswith(".py") else _import_module(where)
    try:
        return reduce(getattr, name.split("."), module)
    except AttributeError:
        made_here = (n for n, v in vars(module).items() if getattr(v, "__module__", None) == module.__name__)
        offered = ", ".join(n for n in made_here if not n.startswith("_")) or "nothing"
        raise OperatorError(f"there is no {name!r} in {where}; it has: {offered}") from None


def _entry_point(name: str) -> Any:
    found = {e.name: e for e in entry_points(group=GROUP)}
    if name not in found:
        known = ", ".join(sorted(found)) or "none"
        raise OperatorError(
            f"no installed task is called {name!r} (installed: {known}); "
            "other tasks are named as package.module:Name or path/to/file.py:Name"
        )
    try:
        return found[name].load()
    except Exception as error:
        raise OperatorError(f"the installed task {name!r} cannot be loaded: {_last_words(error)}") from error


def _import_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise OperatorError(
                f"there is no module {error.name!r}: install it into this environment, or name its file, {name}.py:Name"
            ) from None
        raise OperatorError(f"importing {name!r} failed: it needs {error.name!r}, which is not installed") from error
    except Exception as error:
        raise OperatorError(f"importing {name!r} failed: {_last_words(error)}") from error


def _import_file(path: Path) -> ModuleType:
    file = path.resolve()
    if not file.is_file():
        raise OperatorError(f"there is no file {path} (looked in {Path.cwd()})")
    name = PREFIX + hashlib.sha256(str(file).encode()).hexdigest()[:16]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None, "a .py file always has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses and pickling look their module up there
    with _beside(file.parent):
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[name]
            raise OperatorError(f"importing {path} failed: {_last_words(error)}") from error
    return module


@contextmanager
def at_home(task: Task) -> Generator[None]:
    """Let the task import modules beside its file inside the block, and processes that it starts in there."""
    module = type(task).__module__
    file = getattr(sys.modules.get(module), "__file__", None)
    with _beside(Path(file).parent if file and module.startswith(PREFIX) else _siblings.get(module)):
        yield


def _folder(reference: str) -> Path | None:
    where = reference.rpartition(":")[0]
    return Path(where).expanduser().resolve().parent if where.endswith(".py") else None


_siblings: dict[str, Path] = {}
"""Modules imported from beside a task's file, with that folder: the `helpers` of another task is another module."""


@contextmanager
def _beside(folder: Path | None) -> Generator[None]:
    """Let modules of this folder be imported inside the block; its path is gone afterwards."""
    if folder is None:
        yield
        return
    for name, other in [*_siblings.items()]:
        if other != folder:
            sys.modules.pop(name, None)
            del _siblings[name]
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        _siblings.update({name: folder for name in set(sys.modules) - before if _lies_in(folder, name)})


def _lies_in(folder: Path, name: str) -> bool:
    """Whether a module is folder/name.py or part of the package folder/name; a .venv in that folder is neither."""
    file = getattr(sys.modules[name], "__file__", None)
    top = folder / name.partition(".")[0]
    return bool(file) and (Path(file).resolve() == top.with_suffix(".py") or top in Path(file).resolve().parents)


def _last_words(error: BaseException) -> str:
    """The error with the line that raised it, for people who do not see the traceback."""
    text = f"{type(error).__name__}: {error}".strip().rstrip(":")
    if frames := traceback.extract_tb(error.__traceback__):
        text += f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})"
    return text


def optional(task: Task, name: str) -> Callable[..., Any] | None:
    """The method of that name where the task has one."""
    method = getattr(task, name, None)
    return method if callable(method) else None
