"""pfl-research in one process of one thread: run by `benchmarks.simulation_peers`, in the environment that has pfl."""

# It runs in an environment of its own, beside the modules that it imports.
# pyright: reportMissingImports=false, reportUntypedBaseClass=false

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByUser
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from safetensors.torch import load_file
from simulated_models import MODELS
from simulation_peer import Rounds


def main(asked: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    data, rounds = load_file(f"{asked['folder']}/data"), Rounds()
    module: Any = MODELS[asked["work"]]()
    module.load_state_dict(load_file(f"{asked['folder']}/first"))
    # what pfl asks of a module: a loss of a user's data, and metrics, which nobody looks at here
    module.loss = lambda x, y: torch.nn.functional.cross_entropy(module(x), y)
    module.metrics = lambda x, y: {}
    model = PyTorchModel(module, torch.optim.SGD, torch.optim.SGD(module.parameters(), lr=1.0))
    draw = np.random.RandomState(0)

    def user(k: int) -> Dataset:
        order = data["orders"][len(rounds.seconds), k]
        return Dataset([data["x"][k, order], data["y"][k, order]], user_id=str(k))

    class Timed(TrainingProcessCallback):
        def on_train_begin(self, *, model: Any) -> Metrics:
            rounds.begin()
            return Metrics()

        def after_central_iteration(self, *given: Any, **named: Any) -> tuple[bool, Metrics]:
            rounds.end()
            rounds.begin()
            return False, Metrics()

    users = FederatedDataset(user, lambda: int(draw.randint(asked["clients"])))
    params = NNAlgorithmParams(
        central_num_iterations=asked["rounds"],
        evaluation_frequency=asked["rounds"] + 1,  # only the first round, which is not counted
        train_cohort_size=asked["cohort"],
        val_cohort_size=0,
    )
    train = NNTrainHyperParams(local_num_epochs=1, local_learning_rate=asked["rate"], local_batch_size=asked["batch"])
    FederatedAveraging().run(
        params,
        SimulatedBackend(users, users, postprocessors=[WeightByUser()]),
        model,
        train,
        callbacks=[Timed()],
        send_metrics_to_platform=False,
    )
    rounds.write(asked, module, "pfl", "torch")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
