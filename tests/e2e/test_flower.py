"""A Flower app on a real coordinator: three agents of one command each, masked, and the model of the simulator."""

import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from murmur.protocol.recipe import load_recipe
from murmur.simulation import simulate

from ..murmur.test_cli import murmur
from ..waiting import wait_until

APP = Path(__file__).parents[2] / "examples" / "flower"
NAMES = ("client-0", "client-1", "client-2")  # as the simulator calls them
RECIPE = """
name = "blobs"
task = "flower"
rounds = 3
metrics = ["loss", "accuracy", "rounds"]
cohort = {min = 3}
strategy = {max_weight = 64}
train = {lr = 0.1, batch_size = 16}
"""


@pytest.mark.slow
def test_a_flower_app_ends_in_the_simulators_model(tmp_path: Path):
    data, model = tmp_path / "coordinator", tmp_path / "model.safetensors"
    (tmp_path / "recipe.toml").write_text(RECIPE)
    with ExitStack() as stack:
        logs = {name: tmp_path / f"{name}.log" for name in ("server", *NAMES)}

        def begin(name: str, *command: str) -> None:
            log = stack.enter_context(logs[name].open("wb"))
            process = subprocess.Popen([sys.executable, "-m", "murmur", *command], stdout=log, stderr=log)
            stack.callback(process.wait, 60)
            stack.callback(process.terminate)

        begin("server", "coordinator", "serve", "--data", str(data), "--port", "0")
        wait_until((data / "operator.json").exists, 30, "the coordinator", log=logs["server"])
        for number, name in enumerate(NAMES):
            folder = tmp_path / name
            join = json.loads(murmur("coordinator", "invite", name, "--data", data, "--json").out)["join"]
            assert murmur("client", "enroll", join, "--name", name, "--dir", folder).code == 0
            murmur("coordinator", "approve", name, "--data", data)
            place = ("--node-config", f"partition-id={number}", "--node-config", f"num-partitions={len(NAMES)}")
            begin(name, "client", "join", "--dir", str(folder), "--flower", str(APP), *place)
        start = ("run", "start", tmp_path / "recipe.toml", "--task", f"flower:{APP}", "--data", data, "--watch")
        done = subprocess.run([sys.executable, "-m", "murmur", *map(str, start)], capture_output=True, timeout=300)
        said = "\n".join(f"== {name}\n{path.read_text()[-2000:]}" for name, path in logs.items())
        assert done.returncode == 0, f"{done.stderr.decode()}\n{said}"
        (run,) = [row["id"] for row in json.loads(murmur("run", "list", "--data", data, "--json").out)]
        shown = json.loads(murmur("run", "show", run, "--data", data, "--json").out)
        assert murmur("model", "pull", run, "--to", model, "--data", data).code == 0
    torch.set_num_threads(1)
    history = simulate(f"flower:{APP}", load_recipe(tmp_path / "recipe.toml"), clients=3, secure="real")
    found, simulated = load_file(model), history.state_dict()
    assert found.keys() == simulated.keys()
    for name, tensor in simulated.items():
        assert torch.equal(found[name], tensor), name
    measured = {(row["version"], row["name"]): row["value"] for row in shown["metrics"]}
    for version, metrics in enumerate(history.versions):
        assert measured[version, "rounds"] == version
        assert measured[version, "loss"] == pytest.approx(metrics["loss"], abs=1e-6)
