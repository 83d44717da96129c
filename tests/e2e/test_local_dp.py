"""Local differential privacy end to end: a coordinator, three agents with budgets, masked rounds by DP-SGD."""

import json
import math
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from ..murmur.test_cli import TASK, murmur
from ..waiting import wait_until

NAMES = ("east", "north", "west")
WEST = 2.2  # epsilon of two steps at z = 2 and delta 1e-3: 2.05, of three: 2.63 (PLD; RDP says 2.33 for two)
RECIPE = """
name = "t"
task = "t"
rounds = 4
metrics = ["loss"]
cohort = {min = 3, attempts = 1}
strategy = {weighting = "uniform", max_weight = 1}
train = {batch_size = 2, epochs = 1}
dp = {mode = "local", noise_multiplier = 2.0, delta = 1e-3}
"""


@pytest.mark.slow
def test_three_sites_train_until_the_first_has_spent_its_budget(tmp_path: Path):
    data, task = tmp_path / "coordinator", tmp_path / "task.py"
    task.write_text(TASK)
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
        for name in NAMES:
            folder = tmp_path / name
            join = json.loads(murmur("coordinator", "invite", name, "--data", data, "--json").out)["join"]
            assert (
                murmur("client", "enroll", join, "--name", name, "--dir", folder, "--task", f"t={task}:Line").code == 0
            )
            with (folder / "client.toml").open("a") as settings:
                settings.write(f"\n[policy]\nepsilon = {WEST if name == 'west' else 100.0}\ndelta = 1e-3\n")
            murmur("coordinator", "approve", name, "--data", data)
            begin(name, "client", "join", "--dir", str(folder))
        start = ("run", "start", tmp_path / "recipe.toml", "--task", f"{task}:Line", "--data", data, "--watch")
        subprocess.run(
            [sys.executable, "-m", "murmur", *map(str, start)], capture_output=True, timeout=500, check=False
        )
        (run,) = [row["id"] for row in json.loads(murmur("run", "list", "--data", data, "--json").out)]
        shown = json.loads(murmur("run", "show", run, "--data", data, "--json").out)
        said = "\n".join(f"== {name}\n{path.read_text()[-2000:]}" for name, path in logs.items())
        assert (shown["run"]["state"], shown["run"]["round"]) == ("failed", 2), said
        assert "would have spent an epsilon of 2.629" in logs["west"].read_text(), said
        assert shown["metrics"] == []  # no client told any
        for name in NAMES:
            (found,) = json.loads(murmur("client", "ledger", "--dir", tmp_path / name, "--json").out)
            assert (found["dataset"], found["runs"]) == ("all", [run])
            assert found["trainings"] >= 2 and 0 < found["epsilon"]["value"] < math.inf
            if name == "west":
                assert (found["trainings"], found["reserved"]) == (2, 0)
                assert found["epsilon"]["value"] <= found["budget"] == WEST
