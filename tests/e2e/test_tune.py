"""A site is checked and then tuned on: the real coordinator over TLS, the real commands, a real agent."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ..murmur.test_cli import murmur
from ..waiting import wait_until

RECIPE = """
name = "planted"
task = "planted"
rounds = 3
metrics = ["loss"]
cohort = {min = 1}
train = {batch_size = 4}
secure = {on = false}
"""
PLANTED = Path(__file__).parents[1] / "murmur" / "planted.py"


@pytest.mark.slow
def test_a_site_is_ready_and_the_best_rate_is_found_by_runs_on_its_coordinator(tmp_path: Path):
    data, folder, recipe = tmp_path / "coordinator", tmp_path / "clinic", tmp_path / "recipe.toml"
    recipe.write_text(RECIPE)
    serve = [sys.executable, "-m", "murmur", "coordinator", "serve", "--data", str(data), "--port", "0"]
    log = (tmp_path / "log").open("wb")
    with log, subprocess.Popen(serve, stdout=log, stderr=log) as server:
        try:
            wait_until((data / "operator.json").exists, 30, "the coordinator", log=tmp_path / "log")
            join = json.loads(murmur("coordinator", "invite", "clinic", "--data", data, "--json").out)["join"]
            task = f"planted={PLANTED}:Planted"
            assert murmur("client", "enroll", join, "--name", "clinic", "--dir", folder, "--task", task).code == 0
            check = ("client", "check", "--dir", folder, "--recipe", recipe, "--json")
            early = {f["subject"]: f["level"] for f in json.loads(murmur(*check, timeout=300).out)["findings"]}
            assert (early["coordinator"], early["policy"]) == (
                "yellow",
                "red",
            )
            with (folder / "client.toml").open("a") as settings:
                settings.write("\n[policy]\nrequire_secure = false\n")
            murmur("coordinator", "approve", "clinic", "--data", data)
            done = murmur(*check, timeout=300)
            found = json.loads(done.out)
            assert done.code == 0 and {f["level"] for f in found["findings"]} == {"green"}, found
            assert found["facts"]["up_bytes_per_s"] > 0 and found["facts"]["round_s"] > 0
            agent_log = (tmp_path / "agent.log").open("wb")
            command = [sys.executable, "-m", "murmur", "client", "join", "--dir", str(folder)]
            with agent_log, subprocess.Popen(command, stdout=agent_log, stderr=agent_log) as agent:
                try:
                    tune = ("tune", recipe, "--federation", data, "--task", f"{PLANTED}:Planted", "--metric", "loss")
                    tune += ("--set", "train.lr=[0.01, 0.3, 1.0, 1.9]", "--pruner", "halving")
                    done = murmur(*tune, "--dir", tmp_path / "search", "--json", timeout=400)
                    assert done.code == 0, done.err + (tmp_path / "agent.log").read_text()
                    best = json.loads(done.out)
                finally:
                    agent.terminate()
                    assert agent.wait(60) == 0
            assert best["best"]["params"] == {"train.lr": 1.0} and best["best"]["value"] == pytest.approx(0, abs=1e-9)
            runs = {r["id"]: r["state"] for r in json.loads(murmur("run", "list", "--data", data, "--json").out)}
            assert {t["run"] for t in best["trials"]} == set(runs) and len(runs) == 4
            for trial in best["trials"]:
                assert runs[trial["run"]] == ("finished" if trial["state"] == "complete" else "stopped")
        finally:
            server.terminate()
            assert server.wait(60) == 0
