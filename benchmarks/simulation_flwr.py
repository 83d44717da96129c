"""flwr's simulation, Ray with two actors: run by `benchmarks.simulation_peers`, in the environment that has flwr.

A client is written as in its tutorials: nn.Module, torch.optim.SGD, and data that stay in the actor's memory.
"""

# It runs in an environment of its own, beside the modules that it imports.
# pyright: reportMissingImports=false, reportUntypedBaseClass=false

from __future__ import annotations

import json
import sys
from typing import Any, cast

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from safetensors.torch import load_file
from simulated_models import MODELS
from simulation_peer import Rounds, loaded

ASKED = json.loads(sys.argv[1])


def main() -> None:
    client, server, rounds, ended = ClientApp(), ServerApp(), Rounds(), list[dict[str, Any]]()
    asked = ASKED  # what the functions below close over goes to the actors with them

    @client.train()
    def train(message: Message, context: Context) -> Message:
        given: Any = message.content
        k, n = cast(int, context.node_config["partition-id"]), int(given["config"]["server-round"])
        model = MODELS[asked["work"]]()
        model.load_state_dict(given["arrays"].to_torch_state_dict())
        data = loaded(f"{asked['folder']}/data")
        optimizer = torch.optim.SGD(model.parameters(), lr=asked["rate"])
        for batch in data["orders"][n - 1, k].split(asked["batch"]):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(data["x"][k, batch]), data["y"][k, batch]).backward()
            optimizer.step()
        content: Any = {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord({"num-examples": 60})}
        return Message(content=RecordDict(content), reply_to=message)

    class Timed(FedAvg):
        def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Any) -> Any:
            rounds.begin()
            return super().configure_train(server_round, arrays, config, grid)

        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            found = super().aggregate_train(server_round, replies)
            rounds.end()
            return found

    @server.main()
    def serve(grid: Grid, context: Context) -> None:
        strategy = Timed(fraction_train=asked["cohort"] / asked["clients"], fraction_evaluate=0.0)
        first = ArrayRecord(load_file(f"{asked['folder']}/first"))
        result = strategy.start(grid=grid, initial_arrays=first, num_rounds=asked["rounds"])
        ended.append(result.arrays.to_torch_state_dict())

    resources: Any = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": 2}}
    run_simulation(server, client, asked["clients"], backend_config=resources)
    model = MODELS[asked["work"]]()
    model.load_state_dict(ended[0])
    rounds.write(asked, model, "flwr", "ray", "torch")


if __name__ == "__main__":
    main()
