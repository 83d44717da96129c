"""A task of ours as a Flower `ClientApp`: trained by our engine, in Flower's runtimes and under its strategies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from ..protocol.errors import OperatorError
from ..protocol.flower import telemetry_off
from ..protocol.sections import Train
from ..protocol.tensors import Layout, write_file
from .flower_reply import WEIGHT
from .job import Job
from .task import Task, is_task

if TYPE_CHECKING:
    from flwr.app import ArrayRecord, Context, Message
    from flwr.clientapp import ClientApp

KEYS = {"lr": "lr", "learning-rate": "lr", "local-epochs": "epochs", "batch-size": "batch_size"}  # Flower's by ours


def flower_app(
    task: Task | Callable[[Context], Task],
    *,
    train: Train | Mapping[str, Any] | None = None,
    metrics: Sequence[str] = ("loss", "accuracy"),
    seed: int = 0,
) -> ClientApp:
    """A Flower ClientApp that trains and evaluates a task with our engine.

    task: one, or a function from Flower's Context, whose node_config says which part of the data a node has.
    train: as in a recipe; where the run_config or a message's config has lr (or learning-rate), local-epochs or
    batch-size, that is taken. proximal-mu is FedProx's term, which the engine adds. metrics: of the task's, those that
    `evaluate` answers beside the loss. seed: with server-round and node, of every random choice.
    A ServerApp starts it from ArrayRecord(task.model().state_dict()).
    """
    telemetry_off()
    from flwr.clientapp import ClientApp

    app = ClientApp()
    node = _Node(task, train if isinstance(train, Train) else Train(**(train or {})), tuple(metrics), seed)
    app.train()(node.train)
    app.evaluate()(node.evaluate)
    return app


class _Node:
    """What one process of Flower's keeps: the model, which is built once."""

    def __init__(self, task: Any, train: Train, metrics: tuple[str, ...], seed: int) -> None:
        from .engine.session import Session

        self._task, self._train, self._metrics, self._seed = task, train, metrics, seed
        self._session, self._layout = Session(), Layout(())

    def train(self, message: Message, context: Context) -> Message:
        return self._answer("train", message, context)

    def evaluate(self, message: Message, context: Context) -> Message:
        return self._answer("evaluate", message, context)

    def _answer(self, kind: Literal["train", "evaluate"], message: Message, context: Context) -> Message:
        from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict

        from .engine.loop import run_job

        task = self._task if is_task(self._task) else self._task(context)
        arrays: ArrayRecord = next(iter(message.content.array_records.values()))
        config: dict[str, Any] = {}
        for record in message.content.config_records.values():
            config |= record
        with TemporaryDirectory(prefix="murmur-flower-") as folder:
            job = Job(
                id="flower",
                kind=kind,
                model=Path(folder, "model"),
                update=Path(folder, "update"),
                train=self._settings(context.run_config | config),
                mu=float(config.get("proximal-mu", 0.0)),
                metrics=self._metrics,
                seed=self._seed,
                round=int(config.get("server-round", 1)),
                client=str(context.node_config.get("partition-id", context.node_id)),
            )
            self._write(task, arrays, job.model)
            result = run_job(task, job, session=self._session)
        means = {name: total / count for name, (total, count) in result.metrics.items() if count}
        content = RecordDict()
        if kind == "train":
            means = {name: mean for name, mean in means.items() if name == "train_loss"}
            state = self._session.module.state_dict()
            content["arrays"] = ArrayRecord({name: state[name] for name in arrays})
        content["metrics"] = MetricRecord({**means, WEIGHT: result.examples})
        return Message(content, reply_to=message)

    def _settings(self, config: Mapping[str, Any]) -> Train:
        return self._train.model_validate(
            self._train.model_dump() | {ours: config[theirs] for theirs, ours in KEYS.items() if theirs in config}
        )

    def _write(self, task: Task, arrays: ArrayRecord, path: Path) -> None:
        if not self._layout.tensors:
            from .engine.state import layout_of

            self._layout = layout_of(task.model())
        if missing := [t.name for t in self._layout.tensors if t.name not in arrays]:
            raise OperatorError(f"the message's arrays lack {missing[0]!r} of the task's model: start from its own")
        write_file(path, {t.name: arrays[t.name].numpy() for t in self._layout.tensors}, self._layout)
