"""kill -9 of the real coordinator, again and again within a run: it ends in the model of an undisturbed one."""

import json
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
from safetensors.numpy import load_file

from murmur import simulate
from murmur.client import Client, find_access
from murmur.clients.engine.state import initial_model
from murmur.clients.enrolment import enrol
from murmur.clients.settings import Policy, TaskEntry
from murmur.clients.task import load_task
from murmur.processes import Children
from murmur.protocol.errors import Unavailable
from murmur.protocol.recipe import load_recipe

EXAMPLE = Path(__file__).parents[2] / "examples" / "hospitals"
HOSPITALS = ("cleveland", "hungarian", "switzerland", "va")
T = TypeVar("T")
ROUNDS, KILLS, SEED = 6, 4, 20261121


def serve(data: Path, port: int) -> subprocess.Popen[bytes]:
    """Start the coordinator and wait until it answers."""
    (data / "operator.json").unlink(missing_ok=True)
    where = ["--data", str(data), "--port", str(port), "--insecure-http"]
    with (data.parent / "coordinator.log").open("ab") as log:
        command = [sys.executable, "-m", "murmur", "coordinator", "serve", *where]
        server = subprocess.Popen(command, stdout=log, stderr=log)
    until = time.monotonic() + 30
    while not (data / "operator.json").exists():
        assert server.poll() is None and time.monotonic() < until, (data.parent / "coordinator.log").read_text()[-3000:]
        time.sleep(0.02)
    return server


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "masked"])
def test_a_coordinator_killed_at_random_instants_ends_in_the_same_model(tmp_path: Path, secure: bool):
    draw = random.Random(SEED)
    print(f"seed {SEED}")
    data, port = tmp_path / "coordinator", free_port()
    data.mkdir()
    server = serve(data, port)
    # nobody is dropped here: the model depends on who is in the sum, and so would differ for a good reason
    changes = {"rounds": ROUNDS, "secure__on": secure, "cohort__patience_s": 300.0, "cohort__min": 4}
    recipe = load_recipe(EXAMPLE / "recipe.toml", **changes)
    history = simulate(str(EXAMPLE), recipe, secure=secure)
    with Children(tmp_path / "logs") as children:
        for name in HOSPITALS:
            folder = tmp_path / name
            folder.mkdir()
            shutil.copy(EXAMPLE / "data" / f"processed.{name}.data", folder / "patients.csv")
            task = TaskEntry(reference=f"{EXAMPLE / 'task.py'}:Heart", options={"data": str(folder / "patients.csv")})
            policy = Policy(require_secure=secure)
            join = ask(data, lambda c, name=name: c.invite(name).join)
            enrol(join, folder, name=name, tasks={"heart": task}, processes=1, policy=policy)
            ask(data, lambda c, name=name: c.approve(name))
            one = {"OMP_NUM_THREADS": "1"}
            children.start(name, "murmur.clients.agent", "--dir", str(folder), environment=one)
        first = tmp_path / "first.safetensors"
        initial_model(load_task(f"{EXAMPLE / 'task.py'}:Heart", {"data": str(folder / "patients.csv")}), 0, first)
        run = ask(data, lambda c: c.start_run(recipe, first))
        kills = 0
        until = time.monotonic() + 150
        while (view := ask(data, lambda c: c.run(run).run)).state == "running" or kills < KILLS:
            assert time.monotonic() < until, (view, (tmp_path / "coordinator.log").read_text()[-3000:])
            assert view.state == "running", f"{view.state} after {kills} kills: {view.reason}"
            time.sleep(draw.uniform(0.0, 1.2))
            if kills < KILLS:
                server.kill()
                server.wait()
                server = serve(data, port)
                kills += 1
        newest = ask(data, lambda c: c.versions(run)[0])
        ask(data, lambda c: c.pull(newest.sha256, tmp_path / "model.safetensors"))
        attempts = [r.attempt for r in ask(data, lambda c: c.run(run)).rounds]
    server.terminate()
    assert server.wait(20) == 0
    assert newest.n == ROUNDS
    print(json.dumps({"kills": kills, "attempts": attempts}))
    found = {name: tensor.numpy() for name, tensor in history.state_dict().items()}
    for name, array in load_file(tmp_path / "model.safetensors").items():
        np.testing.assert_array_equal(array, found[name], err_msg=name)


def ask(data: Path, question: Callable[[Client], T]) -> T:
    """Ask the coordinator, again if it is just being killed."""
    while True:
        try:
            with Client(find_access(data)) as client:
                return question(client)
        except Unavailable:
            time.sleep(0.1)
