"""Flower's own FedAvg over nodes in this process: what a run of the same app must come to.

`flwr.simulation.run_simulation` needs ray, which is not among our dependencies. All of Flower's but its transport is
here: `FedAvg.start` configures, samples and aggregates, and each message goes straight to the ClientApp.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from murmur.protocol.flower import be_somebody


class LocalGrid(Grid):
    """Nodes 2, 3, … with partition-id 0, 1, …, and a Context for each that lives as long as the run."""

    run: Any = None
    create_message: Any = None

    def __init__(self, app: ClientApp, nodes: int, run_config: Mapping[str, Any]) -> None:
        be_somebody()
        self._app, self.sent = app, list[Message]()
        self.contexts = {
            number + 2: Context(
                1, number + 2, {"partition-id": number, "num-partitions": nodes}, RecordDict(), dict(run_config)
            )
            for number in range(nodes)
        }

    def set_run(self, run: Any) -> None: ...

    def get_node_ids(self) -> Iterable[int]:
        return self.contexts

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        self.sent = sorted(messages, key=lambda m: m.metadata.dst_node_id)
        return [self._app(m, self.contexts[m.metadata.dst_node_id]) for m in self.sent]


def fedavg(
    app: ClientApp,
    initial: Mapping[str, torch.Tensor],
    *,
    nodes: int,
    rounds: int,
    train_config: Mapping[str, Any],
    run_config: Mapping[str, Any] = {},
) -> tuple[dict[str, torch.Tensor], dict[int, dict[str, float]], LocalGrid]:
    """The final model, the metrics of each version from 1 on, and the grid with the nodes' contexts."""
    grid = LocalGrid(app, nodes, run_config)
    result = FedAvg().start(
        grid=grid,
        initial_arrays=ArrayRecord({k: v.clone() for k, v in initial.items()}),
        train_config=ConfigRecord(dict(train_config)),
        num_rounds=rounds,
    )
    metrics = {n: dict(record) for n, record in result.evaluate_metrics_clientapp.items()}
    return dict(result.arrays.to_torch_state_dict()), metrics, grid
