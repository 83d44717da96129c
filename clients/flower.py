"""A Flower `ClientApp` as a task: one job is one or two messages to it.

    version ── Message("arrays", "config") ── ClientApp ── Message(arrays, metrics) ── update, weight, metrics

What is private in flwr is touched here and in `protocol/flower.py` alone; the package is imported when an app is first
loaded, with its telemetry off. The app runs in the trainer's ranks: each is given the same message, and rank 0's answer
counts.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import time
import tomllib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from ..protocol.encoding import sha256_hex
from ..protocol.errors import OperatorError
from ..protocol.flower import HUB, be_somebody, telemetry_off
from ..protocol.messages import TRAIN_LOSS
from ..protocol.sections import Train
from ..protocol.tensors import Layout, map_file, read_layout
from .flower_reply import WEIGHT, Tensors, arrays_of, measured, renamed
from .flower_state import read_state, write_state
from .job import Cancelled, Job, Progress, Result
from .task import find

if TYPE_CHECKING:
    from flwr.app import ArrayRecord, Context, Message
    from flwr.clientapp import ClientApp
    from torch import Tensor

    from .engine.ranks import Ranks

STATISTICS = {"running_mean", "running_var", "num_batches_tracked"}
"""Last names of BatchNorm's buffers, for models that come as arrays and do not say which of them train."""
METRICS = {"loss": "eval_loss", "accuracy": "eval_acc"}  # ours by theirs, as Flower's quickstarts have them
REPORT_EVERY_S = 1.0


class FlowerTask:
    """A Flower app as a task that works by itself: see `task.Worker`."""

    def __init__(
        self,
        app: str | ClientApp,
        *,
        initial: str = "",
        node_config: Mapping[str, Any] | None = None,
        run_config: Mapping[str, Any] | None = None,
        config: Mapping[str, Any] | None = None,
        metrics: Mapping[str, str] | None = None,
    ) -> None:
        """app: "package.module:app", "path/to/file.py:app", or an app's folder, whose pyproject.toml names the rest.

        initial: names what a run starts from, see `first`; by default the ServerApp of the app's folder.
        node_config: of the app's Context. run_config likewise: what is not in it comes from the app's pyproject.toml,
        then from the run's recipe. config: added to each message's ConfigRecord, in place of what the recipe says.
        metrics: our names by the app's, beside the app's own.
        Raises OperatorError for an app that cannot be loaded.
        """
        telemetry_off()
        found, defaults = app, dict[str, Any]()
        if isinstance(app, str) and ":" not in app:
            app, server, defaults = _project(Path(app).expanduser())
            initial = initial or server
        if isinstance(app, str):
            found = find(app)
        from flwr.clientapp import ClientApp

        if not isinstance(found, ClientApp):
            raise OperatorError(f"{app!r} is a {type(found).__name__}, not a flwr.clientapp.ClientApp")
        if getattr(found, "_call", None) is not None:
            raise OperatorError(f"{app!r} is made with client_fn, Flower's old kind: it needs a train function instead")
        self.app, self._initial = found, initial
        self._node_config = dict(node_config or {})
        self._run_config = defaults | dict(run_config or {})
        self._config, self._metrics = dict(config or {}), dict(metrics or {})

    # What a run starts from

    def first(self) -> tuple[dict[str, Tensor], frozenset[str]]:
        """The tensors that a run starts from, by name, and which of them are buffers: from what `initial` names.

        That is a ServerApp (what it sends in its first round), a torch module, a state dict, an ArrayRecord or a list
        of arrays, or a function that gives one of these. Raises OperatorError where there is none.
        """
        import torch
        from flwr.app import ArrayRecord
        from flwr.serverapp import ServerApp

        if not self._initial:
            raise OperatorError(
                "a Flower app does not say what a run starts from: name its ServerApp or its model's class with "
                "--option initial=package.module:name, or give --init"
            )
        found, buffers = find(self._initial), set[str]()
        if callable(found) and not isinstance(found, (ServerApp, torch.nn.Module)):
            try:
                found = found()
            except Exception as error:
                raise OperatorError(f"calling {self._initial!r} failed: {type(error).__name__}: {error}") from error
        if isinstance(found, ServerApp):
            found = _first_arrays(found, self._settings(Train()) | {"num-server-rounds": 1} | self._run_config)
        if isinstance(found, torch.nn.Module):
            buffers = {name for name, _ in found.named_buffers(remove_duplicate=False)}
            found = found.state_dict()
        if isinstance(found, ArrayRecord):
            found = {name: array.numpy() for name, array in found.items()}
        if isinstance(found, list | tuple):
            found = {str(number): array for number, array in enumerate(found)}
        if not isinstance(found, Mapping) or not found:
            raise OperatorError(
                f"{self._initial!r} gave a {type(found).__name__}: a ServerApp, a torch module, a state dict, an "
                "ArrayRecord or a list of arrays is needed"
            )
        tensors = {str(name): torch.as_tensor(value).detach().cpu().clone() for name, value in found.items()}
        buffers |= {name for name in tensors if name.rpartition(".")[2] in STATISTICS}
        return tensors, frozenset(buffers & tensors.keys())

    def with_node(self, **node_config: Any) -> FlowerTask:
        """The same app at a node that has this in its node_config, where it has nothing of that name."""
        other = copy.copy(self)
        other._node_config = node_config | self._node_config
        return other

    # A job

    def work(
        self, job: Job, ranks: Ranks, report: Callable[[Progress], None] | None, stop: Callable[[], bool] | None
    ) -> Result:
        """Have the app evaluate the job's version, where it can, and train from it if asked; rank 0 writes the update.

        A job is stopped at a step of one of torch's optimizers, under several ranks not at all: they are killed.
        What the app raises goes on as it is. Raises OperatorError for answers that no update can be made of.
        """
        started = monotonic()
        if job.dp.mode == "local":
            raise OperatorError(
                'dp.mode = "local" needs the gradient of each example, and a Flower app trains by itself: write a '
                'Task, or take dp.mode = "central" or "distributed"'
            )
        if ranks.world > 1:  # as torchrun has them; the process group is there already
            of_rank = {"RANK": ranks.rank, "LOCAL_RANK": ranks.local, "WORLD_SIZE": ranks.world}
            os.environ.update({name: str(value) for name, value in of_rank.items()})
        layout, context = _layout(job.model), self._context(job)
        examples, metrics = 0, dict[str, tuple[float, float]]()
        with _watched(report, stop if ranks.world == 1 else None) as watch:
            if self._answers("evaluate"):
                # Before the round's training: what is measured is the version that the round before has made.
                reply = self._ask("evaluate", job, layout, context, job.round - 1)
                examples, found = measured(reply, "evaluate")
                metrics = renamed(found, METRICS) | found | renamed(found, self._metrics)
            if job.kind == "train":
                watch.look()
                reply = self._ask("train", job, layout, context, job.round)
                examples, trained = measured(reply, "train")
                if not examples:
                    raise OperatorError(f"the app trained on no example: its {WEIGHT} is 0")
                metrics |= {TRAIN_LOSS: trained[TRAIN_LOSS]} if TRAIN_LOSS in trained else {}
                arrays = arrays_of(reply, layout)
                if ranks.rank == 0:
                    from .engine.state import write_update

                    write_update(Tensors(arrays), job.model, job.update)
        if ranks.rank == 0 and (context.state or job.own):
            write_state(job.own_after, context.state)
        update = job.update if job.kind == "train" else None
        seconds = monotonic() - started
        return Result(update=update, examples=examples, steps=watch.steps, metrics=metrics, seconds=seconds)

    def _answers(self, kind: str) -> bool:
        """Whether the app has a function for such messages; where flwr does not tell, it is asked."""
        named = getattr(self.app, "_registered_funcs", None)
        return named is None or f"{kind}.default" in named

    def _context(self, job: Job) -> Context:
        from flwr.app import Context, RecordDict

        state = read_state(job.own) if job.own else RecordDict()
        run_config = self._settings(job.train, job.mu) | self._run_config
        return Context(_number("run", job.seed), _number("node", job.client), {**self._node_config}, state, run_config)

    def _settings(self, train: Train, mu: float = 0.0) -> dict[str, Any]:
        """What a recipe says, by the names that Flower's examples give it."""
        return {
            "lr": train.lr,
            "learning-rate": train.lr,
            "local-epochs": train.epochs,
            "batch-size": train.batch_size,
            "proximal-mu": mu,
        }

    def _ask(self, kind: str, job: Job, layout: Layout, context: Context, server_round: int) -> Message:
        from flwr.app import DEFAULT_TTL, Array, ArrayRecord, ConfigRecord, Message, Metadata, RecordDict

        arrays, found = ArrayRecord(), map_file(job.model, layout)
        for name in sorted(found, key=_place):
            arrays[name] = Array(found[name])
        config = {"server-round": server_round} | self._settings(job.train, job.mu) | self._config
        metadata = Metadata(
            run_id=context.run_id,
            message_id=f"{job.id}.{kind}",
            src_node_id=HUB,
            dst_node_id=context.node_id,
            reply_to_message_id="",
            group_id=str(server_round),
            created_at=time.time(),
            ttl=DEFAULT_TTL,
            message_type=kind,
        )
        content = RecordDict({"arrays": arrays, "config": ConfigRecord(config)})
        message: Any = Message
        reply: Any = self.app(message(content, metadata=metadata), context)
        if not isinstance(reply, Message):
            raise OperatorError(f"the app's {kind} function gave a {type(reply).__name__}, not a Message")
        if reply.has_error():
            raise OperatorError(f"the app answered {kind} with error {reply.error.code}: {reply.error.reason}")
        return reply


def flower_clients(
    app: str,
    clients: int = 10,
    *,
    initial: str = "",
    node_config: Mapping[str, Any] | None = None,
    run_config: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    metrics: Mapping[str, str] | None = None,
) -> list[FlowerTask]:
    """An app as all the clients of a simulation, told apart by partition-id and num-partitions as in Flower's own."""
    one = FlowerTask(
        app, initial=initial, node_config=node_config, run_config=run_config, config=config, metrics=metrics
    )
    return [one.with_node(**{"partition-id": number, "num-partitions": clients}) for number in range(clients)]


def _project(folder: Path) -> tuple[str, str, dict[str, Any]]:
    """ClientApp, ServerApp and run config that an app's pyproject.toml names; the folder's modules can be imported."""
    try:
        values = tomllib.loads((folder / "pyproject.toml").read_text())
        about = values["tool"]["flwr"]["app"]
        client, server = about["components"]["clientapp"], about["components"].get("serverapp", "")
    except OSError as error:
        raise OperatorError(
            f"{str(folder)!r} is neither package.module:app nor an app's folder: {error.strerror}"
        ) from None
    except (tomllib.TOMLDecodeError, KeyError, TypeError, AttributeError) as error:
        raise OperatorError(f"the pyproject.toml of {str(folder)!r} names no ClientApp: {error!r}") from None
    if (place := str(folder.resolve())) not in sys.path:
        sys.path.insert(0, place)  # for good: an app's functions may import more of it when they are called
    return client, server, dict(_flat(about.get("config", {})))


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Tables in tables as Flower hands them to an app: by names with dots."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


class _FirstArrays(BaseException):
    """Ends a ServerApp once it has sent a model; not an Exception, which it might catch."""

    def __init__(self, arrays: ArrayRecord) -> None:
        super().__init__("this is no error")
        self.arrays = arrays


def _first_arrays(server: Any, run_config: Mapping[str, Any]) -> ArrayRecord:
    """The arrays that a ServerApp sends first: it is run up to there."""
    from flwr.app import Context, RecordDict
    from flwr.serverapp import Grid

    class FirstRound(Grid):
        nodes = 16

        def get_node_ids(self) -> Sequence[int]:
            """Twice as many as when it was last asked: there are never too few for a strategy."""
            self.nodes *= 2
            return range(HUB + 1, HUB + 1 + self.nodes)

        def push_messages(self, messages: Any) -> list[str]:
            for message in messages:
                for arrays in message.content.array_records.values():
                    raise _FirstArrays(arrays)
            return []

        def pull_messages(self, message_ids: Any) -> list[Any]:
            return []

        def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> list[Any]:
            self.push_messages(messages)
            return []

        def set_run(self, run: Any) -> None: ...

        run: Any = None
        create_message: Any = None

    if getattr(server, "_main", True) is None:
        raise OperatorError("this ServerApp has no main function (it is of Flower's old kind): name the model's class")
    be_somebody()
    try:
        server(FirstRound(), Context(HUB, HUB, {}, RecordDict(), {**run_config}))
    except _FirstArrays as found:
        return found.arrays
    except Exception as error:
        raise OperatorError(
            f"the ServerApp failed before it sent a model: {type(error).__name__}: {error}. What its run_config lacks "
            "is given with --option run_config={...}"
        ) from error
    raise OperatorError("the ServerApp ended without sending a model")


def _layout(model: Path) -> Layout:
    layout = read_layout(model)
    if wide := next((t.name for t in layout.tensors if t.dtype == "BF16"), None):
        raise OperatorError(f"the run's model has {wide!r} in BF16, which Flower's arrays cannot hold: use F32 or F16")
    return layout


def _place(name: str) -> tuple[bool, int, str]:
    """Names in order, and numbers, which are what a list of arrays has for names, by their value."""
    return (False, int(name), name) if name.isdecimal() else (True, 0, name)


def _number(*parts: int | str) -> int:
    """63 bits that belong to these parts, as Flower's ids are numbers."""
    return int(sha256_hex(json.dumps(parts).encode())[:16], 16) >> 1


class _Watch:
    """Counts the steps of torch's optimizers, tells once a second that there were some, and stops where asked to.

    What is told counts these signs and not the steps, whose number says how many examples there are; of how many is
    not known, so `Progress.steps` is 0.
    """

    def __init__(self, report: Callable[[Progress], None] | None, stop: Callable[[], bool] | None) -> None:
        self.steps = self._signs = 0
        self._report, self._stop, self._told_at = report, stop, 0.0

    def look(self) -> None:
        """Raises Cancelled where the job is to be stopped."""
        if self._stop is not None and self._stop():
            raise Cancelled(f"stopped after {self.steps} of the app's steps")
        if self._report is not None and monotonic() - self._told_at >= REPORT_EVERY_S:
            self._signs, self._told_at = self._signs + 1, monotonic()
            self._report(Progress(step=self._signs, steps=0, loss=0.0, examples_per_s=0.0))

    def after_step(self, *_: Any) -> None:
        self.steps += 1
        self.look()


@contextmanager
def _watched(report: Callable[[Progress], None] | None, stop: Callable[[], bool] | None) -> Generator[_Watch]:
    from torch.optim.optimizer import register_optimizer_step_post_hook

    watch = _Watch(report, stop)
    watch.look()
    hook = register_optimizer_step_post_hook(watch.after_step)
    try:
        yield watch
    finally:
        hook.remove()
