"""A round in Flower's records: what a strategy is sent and what it makes of it. Imports flwr: see `flower.py`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import numpy as np
from flwr.app import DEFAULT_TTL, Array, ArrayRecord, ConfigRecord, Message, MessageType, Metadata, MetricRecord
from flwr.app import RecordDict as Records
from flwr.serverapp.strategy import Strategy

from ..protocol.encoding import sha256_hex
from ..protocol.errors import BadUpdate
from ..protocol.flower import HUB
from .flower import Reply

Values = np.ndarray[Any, Any]
WEIGHT = "num-examples"


class Lazy(Array):
    """An array that is read whenever a strategy asks for it, so that not every client's lie in memory at a time."""

    def __init__(self, like: Values, read: Callable[[], Values]) -> None:
        self.dtype, self.shape, self.stype = str(like.dtype), tuple(like.shape), "numpy.ndarray"
        self._read = read

    def numpy(self) -> Values:
        return self._read()

    @property
    def data(self) -> bytes:  # pyright: ignore[reportIncompatibleVariableOverride]  # a field there, for few
        buffer = BytesIO()
        np.save(buffer, self.numpy(), allow_pickle=False)
        return buffer.getvalue()


def begin(strategy: Strategy, round: int, old: Mapping[str, Values]) -> dict[str, Any]:
    """Have a strategy remember the round's model; returns what it would tell the clients beside it.

    Whom it would ask is of no account: a recipe's cohort decides that.
    """
    with quiet():
        grid: Any = _Nodes()
        arrays = _record(old, lambda name: old[name].copy())
        messages = list(strategy.configure_train(round, arrays, ConfigRecord(), grid))
    records = messages[0].content.config_records.values() if messages else ()
    return {key: value for record in records for key, value in record.items()}


def combine(strategy: Strategy, round: int, old: Mapping[str, Values], replies: Sequence[Reply]) -> dict[str, Values]:
    """The model that a strategy makes of the clients' replies; raises BadUpdate where it makes none."""
    told = set[str].intersection(*({name for name, (_, n) in r.metrics.items() if n} for r in replies))
    with quiet():
        arrays, _ = strategy.aggregate_train(round, [_message(round, old, reply, told) for reply in replies])
    if arrays is None:
        raise BadUpdate("the Flower strategy made no model of the round")
    return {name: array.numpy() for name, array in arrays.items()}


def _message(round: int, old: Mapping[str, Values], reply: Reply, told: set[str]) -> Message:
    def read(name: str) -> Values:
        return np.asarray(old[name] + reply.update(name), old[name].dtype)

    means = {name: total / count for name, (total, count) in reply.metrics.items() if name in told}
    metrics = MetricRecord({**means, WEIGHT: reply.weight})
    metadata = Metadata(
        run_id=HUB,
        message_id=f"{round}.{reply.client}",
        src_node_id=int(sha256_hex(reply.client.encode())[:16], 16) >> 1,
        dst_node_id=HUB,
        reply_to_message_id="",
        group_id=str(round),
        created_at=0.0,
        ttl=DEFAULT_TTL,
        message_type=MessageType.TRAIN,
    )
    message: Any = Message
    return message(Records({"arrays": _record(old, read), "metrics": metrics}), metadata=metadata)


def _record(old: Mapping[str, Values], read: Callable[[str], Values]) -> ArrayRecord:
    record = ArrayRecord()
    for name, array in old.items():
        record[name] = Lazy(array, lambda name=name: read(name))
    return record


class _Nodes:
    """As much of a Grid as strategies use: more nodes each time they ask, for they wait until there are enough."""

    count = 16

    def get_node_ids(self) -> Sequence[int]:
        self.count *= 2
        return range(HUB + 1, HUB + 1 + self.count)


@contextmanager
def quiet() -> Generator[None]:
    """Without what Flower logs of each round, of which a coordinator and a simulation tell themselves."""
    log = logging.getLogger("flwr")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
