"""The same masked round through the SecAgg+ of flwr 1.41: its own workflow and its own client mod, without a network.

Timed are the stage in which a client masks, and the two stages in which the server adds up and unmasks. Not timed are
what surrounds them there: copies of messages between the two, the strategy's own averaging, the training.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Collection, Iterable
from typing import Any, cast

import numpy as np

from murmur.privacy.masks import Array

from .masked_round import Spent, Stopwatch

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"


def play(updates: list[Array], weights: list[int], *, dropped: Collection[int] = ()) -> Spent:
    """A round of its defaults: clipping_range 8, quantization_range 2**22, modulus_range 2**32, max_weight 1000."""
    from flwr.app import ConfigRecord, Context, RecordDict
    from flwr.common import ndarrays_to_parameters, parameters_to_ndarrays
    from flwr.compat.common import recorddict_compat as compat
    from flwr.server.compat.legacy_context import LegacyContext
    from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD, Key
    from flwr.server.workflow.secure_aggregation.secaggplus_workflow import SecAggPlusWorkflow, WorkflowState
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1 << 20, 1  # who we are in its messages
    logging.getLogger("flwr").setLevel(logging.ERROR)
    n, threshold = len(weights), 2 * len(weights) // 3 + 1
    grid: Any = _Grid(updates, weights, dropped)  # it has all of a flwr Grid that the workflow uses
    context = LegacyContext(
        Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config={}),
        strategy=_strategy(n),
        client_manager=_manager(n),
    )
    empty = ndarrays_to_parameters([np.zeros(1, np.float32)])  # what clients start from does not matter here
    context.state.config_records[MAIN_CONFIGS_RECORD] = ConfigRecord({Key.CURRENT_ROUND: 1})
    context.state.array_records[MAIN_PARAMS_RECORD] = compat.parameters_to_arrayrecord(empty, keep_input=True)
    workflow, state = SecAggPlusWorkflow(num_shares=n, reconstruction_threshold=threshold), WorkflowState()
    server = Stopwatch()
    stages = (workflow.setup_stage, workflow.share_keys_stage)
    if not all(stage(grid, context, state) for stage in stages):
        raise RuntimeError("flwr's set-up was given up")
    grid.aside_s = 0.0
    for stage in (workflow.collect_masked_vectors_stage, workflow.unmask_stage):
        if not server(lambda stage=stage: stage(grid, context, state)):
            raise RuntimeError("flwr's sum was given up")
    result = compat.arrayrecord_to_parameters(context.state.array_records[MAIN_PARAMS_RECORD], keep_input=True)
    return Spent(
        mask_s=grid.masking.spent_s / (n - len(dropped)),
        server_s=server.spent_s - grid.aside_s,
        upload_bytes=grid.upload_bytes / (n - len(dropped)),
        mean=parameters_to_ndarrays(result)[0],
    )


class _Grid:
    """Brings the server's messages to the clients' mod and their answers back, and keeps both times apart."""

    def __init__(self, updates: list[Array], weights: list[int], dropped: Collection[int]) -> None:
        from flwr.app import Context, RecordDict

        self._updates, self._weights, self._dropped = updates, weights, dropped
        self._contexts = [
            Context(run_id=1, node_id=i + 1, node_config={}, state=RecordDict(), run_config={})
            for i in range(len(weights))
        ]
        self.masking, self._all = Stopwatch(), Stopwatch()
        self.upload_bytes = 0.0

    @property
    def aside_s(self) -> float:
        """CPU seconds outside the server, since it was last set to 0."""
        return self._all.spent_s

    @aside_s.setter
    def aside_s(self, value: float) -> None:
        self._all.spent_s = value

    def send_and_receive(self, messages: Iterable[Any], *, timeout: float | None = None) -> list[Any]:
        return self._all(lambda: [self._one(message) for message in messages])

    def _one(self, message: Any) -> Any:
        from flwr.app import Error, Message
        from flwr.client.mod.secure_aggregation.secaggplus_mod import secaggplus_mod
        from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS
        from flwr.common.secure_aggregation.secaggplus_constants import Key as SecKey

        i = message.metadata.dst_node_id - 1
        message = copy.deepcopy(message)  # as a network would
        stage = message.content.config_records[RECORD_KEY_CONFIGS][SecKey.STAGE]
        masks = stage == _stages()[2]
        if masks and i in self._dropped:
            return Message(Error(code=1, reason="dropped out"), reply_to=message)
        training = Stopwatch()

        def train(asked: Any, _: Any) -> Any:
            return training(lambda: self._trained(asked, i))

        timed = self.masking if masks else Stopwatch()
        found = timed(lambda: secaggplus_mod(message, self._contexts[i], train))
        timed.spent_s -= training.spent_s
        if masks:
            sent = found.content.config_records[RECORD_KEY_CONFIGS][SecKey.MASKED_PARAMETERS]
            self.upload_bytes += sum(map(len, cast("list[bytes]", sent)))
        return found

    def _trained(self, asked: Any, i: int) -> Any:
        from flwr.app import Message
        from flwr.common import Code, FitRes, Status, ndarrays_to_parameters
        from flwr.compat.common import recorddict_compat as compat

        parameters = ndarrays_to_parameters([self._updates[i % len(self._updates)]])
        done = FitRes(status=Status(Code.OK, ""), parameters=parameters, num_examples=self._weights[i], metrics={})
        return Message(compat.fitres_to_recorddict(done, keep_input=True), reply_to=asked)


def _stages() -> tuple[str, ...]:
    from flwr.common.secure_aggregation.secaggplus_constants import Stage

    return Stage.all()


def _manager(n: int) -> Any:
    """A client manager of n clients that are asked for nothing but their ids."""
    from flwr.server.client_manager import SimpleClientManager
    from flwr.server.client_proxy import ClientProxy

    def unused(*_: Any, **__: Any) -> Any:
        raise NotImplementedError

    names = ("get_properties", "get_parameters", "fit", "evaluate", "reconnect")
    proxy: Callable[[str], Any] = type("Proxy", (ClientProxy,), dict.fromkeys(names, unused))
    manager = SimpleClientManager()
    for i in range(n):
        made = proxy(str(i + 1))
        made.node_id = i + 1
        manager.register(made)
    return manager


def _strategy(n: int) -> Any:
    """FedAvg that asks everybody and takes the workflow's mean as it is, instead of averaging n copies of it."""
    from flwr.server.strategy import FedAvg

    class Taken(FedAvg):
        def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> Any:
            return results[0][1].parameters, {}

    return Taken(fraction_fit=1.0, min_fit_clients=n, min_available_clients=n)
