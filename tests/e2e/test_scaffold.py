"""SCAFFOLD end to end: a coordinator and three agents, masked, end in the simulator's model; sites keep their own."""

import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from ..murmur.test_cli import murmur
from ..waiting import wait_until

NAMES = ("site-0", "site-1", "site-2")
TASKS = Path(__file__).parents[1] / "simulation" / "tasks.py"
RECIPE = """
name = "t"
task = "t"
rounds = 3
cohort = {size = 3, min = 3}
strategy = {name = "scaffold", population = 3, max_weight = 8}
train = {epochs = 2, batch_size = 3, lr = 0.1}
"""


Arrays = dict[str, np.ndarray]


def both(tmp_path: Path, recipe: str) -> tuple[Arrays, Arrays]:
    """The final models of a masked run of three rounds: by a coordinator and three agents, and by the simulator."""
    data = tmp_path / "coordinator"
    (tmp_path / "recipe.toml").write_text(recipe)
    with ExitStack() as stack:
        logs = {name: tmp_path / f"{name}.log" for name in ("server", *NAMES)}

        def begin(name: str, *command: str) -> None:
            log = stack.enter_context(logs[name].open("wb"))
            process = subprocess.Popen([sys.executable, "-m", "murmur", *command], stdout=log, stderr=log)
            stack.callback(process.wait, 60)
            stack.callback(process.terminate)

        begin("server", "coordinator", "serve", "--data", str(data), "--port", "0")
        wait_until((data / "operator.json").exists, 30, "the coordinator", log=logs["server"])
        for k, name in enumerate(NAMES):
            folder = tmp_path / name
            join = json.loads(murmur("coordinator", "invite", name, "--data", data, "--json").out)["join"]
            task = ("--task", f"t={TASKS}:Line", "--option", f"t.seed={k}", "--option", f"t.rows={6 + k}")
            done = murmur("client", "enroll", join, "--name", name, "--dir", folder, *task)
            assert done.code == 0, done.err
            murmur("coordinator", "approve", name, "--data", data)
            begin(name, "client", "join", "--dir", str(folder))
        start = ("run", "start", tmp_path / "recipe.toml", "--task", f"{TASKS}:Line", "--data", data, "--watch")
        options = ("--option", "seed=0", "--option", "rows=6")
        told = [sys.executable, "-m", "murmur", *map(str, start), *options]
        subprocess.run(told, capture_output=True, timeout=500, check=False)
        (run,) = json.loads(murmur("run", "list", "--data", data, "--json").out)
        said = "\n".join(f"== {name}\n{path.read_text()[-2000:]}" for name, path in logs.items())
        assert run["state"] == "finished", said
        assert murmur("model", "pull", run["id"], "--to", tmp_path / "model.safetensors", "--data", data).code == 0
    script = (
        "import sys; from pathlib import Path; import torch; torch.set_num_threads(1)\n"
        "sys.path.insert(0, sys.argv[1]); import tasks\n"
        "from murmur import simulate; from murmur.protocol.recipe import load_recipe\n"
        "simulate(tasks.lines(clients=3), load_recipe(Path(sys.argv[2])), secure='real', folder=sys.argv[3])\n"
    )
    arguments = [str(TASKS.parent), str(tmp_path / "recipe.toml"), str(tmp_path / "simulated")]
    subprocess.run([sys.executable, "-c", script, *arguments], check=True, timeout=200)
    return load_file(tmp_path / "model.safetensors"), load_file(tmp_path / "simulated" / "version-3.safetensors")


@pytest.mark.slow
def test_three_sites_and_the_simulator_end_in_the_same_model(tmp_path: Path):
    pulled, simulated = both(tmp_path, RECIPE)
    for name in NAMES:
        assert sorted(p.suffixes[0] for p in (tmp_path / name / "work" / "own").iterdir()) == [".2", ".3"]
    assert pulled.keys() == simulated.keys() == {"0.weight", "control/0.weight"}
    for name, array in pulled.items():
        np.testing.assert_allclose(array, simulated[name], atol=1e-6, rtol=0, err_msg=name)
    assert np.abs(pulled["control/0.weight"]).max() > 0.05
