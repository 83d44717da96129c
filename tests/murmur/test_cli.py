"""The commands against a coordinator of their own, as somebody would type them."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..command import murmur
from ..waiting import wait_until

ROOT = Path(__file__).parents[2]
RECIPE = 'name = "t"\ntask = "t"\nrounds = 2\n[cohort]\nmin = 3\n'
TASK = """
import torch
class Line:
    def model(self): return torch.nn.Linear(1, 1)
    def data(self, split): return [(torch.ones(1), torch.ones(1))]
    def loss(self, output, target): return ((output - target) ** 2).sum()
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The data folder of a coordinator that is running."""
    folder = tmp_path_factory.mktemp("coordinator")
    command = [sys.executable, "-m", "murmur", "coordinator", "serve", "--data", str(folder), "--port", "0", "--json"]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen([*command, "--insecure-http"], stdout=log, stderr=log)
    wait_until((folder / "operator.json").exists, 30, "the coordinator", log=folder / "log")
    yield folder
    server.terminate()
    assert server.wait(60) == 0


def test_an_organization_is_invited_enrolled_approved_and_revoked(data: Path, tmp_path: Path):
    join = json.loads(murmur("coordinator", "invite", "clinic", "--data", data, "--json").out)["join"]
    task = tmp_path / "task.py"
    task.write_text(TASK)
    folder = tmp_path / "clinic"
    arguments = ("client", "enroll", join, "--name", "clinic", "--dir", folder, "--task", f"t={task}:Line", "--json")
    enrolled = json.loads(murmur(*arguments).out)
    assert enrolled["state"] == "pending"
    assert (folder / "identity.pem").stat().st_mode & 0o777 == 0o600
    shown = json.loads(murmur("coordinator", "clients", "--data", data, "--json").out)
    assert [(c["id"], c["fingerprint"]) for c in shown] == [("clinic", enrolled["fingerprint"])]
    assert murmur("coordinator", "approve", "clinic", "--data", data).out == "clinic is active\n"
    assert murmur("coordinator", "revoke", "clinic", "--data", data).out == "clinic is revoked\n"
    again = murmur("coordinator", "approve", "clinic", "--data", data)
    assert again.code == 1 and "enrols anew" in again.err


def test_a_run_is_started_shown_listed_and_stopped_and_its_first_model_pulled(data: Path, tmp_path: Path):
    (tmp_path / "task.py").write_text(TASK)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    start = ("run", "start", tmp_path / "recipe.toml", "--task", f"{tmp_path / 'task.py'}:Line", "--data", data)
    run = json.loads(murmur(*start, "--set", "train.lr=0.25", "--json").out)["id"]
    shown = json.loads(murmur("run", "show", run, "--data", data, "--json").out)
    assert shown["run"]["recipe"]["train"]["lr"] == 0.25
    assert shown["current"]["state"] == "selecting"
    listed = json.loads(murmur("run", "list", "--data", data, "--json").out)
    assert [r["id"] for r in listed if r["state"] == "running"] == [run]
    assert run in murmur("run", "list", "--data", data).out
    pulled = murmur("model", "pull", f"{run}@0", "--to", tmp_path / "m.safetensors", "--data", data, "--json")
    assert json.loads(pulled.out)["version"] == 0
    from safetensors.numpy import load_file

    assert set(load_file(tmp_path / "m.safetensors")) == {"weight", "bias"}
    small = tmp_path / "small.safetensors"
    exported = murmur("model", "export", f"{run}@0", "--int8", "--out", small, "--data", data, "--json")
    assert json.loads(exported.out)["version"] == f"{run}@0"
    assert set(load_file(small)) == {"weight", "weight.scale", "bias"}
    assert murmur("run", "stop", run, "--data", data).code == 0
    assert murmur("run", "watch", run, "--data", data).code == 1  # a run that did not finish
    lines = murmur("run", "watch", run, "--data", data, "--json").out.splitlines()
    assert json.loads(lines[-1])["data"]["state"] == "stopped"


@pytest.fixture
def run(data: Path, tmp_path: Path) -> Iterator[str]:
    """A run that waits for clients; it is stopped in the end."""
    (tmp_path / "task.py").write_text(TASK)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    start = ("run", "start", tmp_path / "recipe.toml", "--task", f"{tmp_path / 'task.py'}:Line", "--data", data)
    run = json.loads(murmur(*start, "--json").out)["id"]
    yield run
    murmur("run", "stop", run, "--data", data)


def test_a_run_is_paused_resumed_and_stopped_while_somebody_watches(data: Path, run: str):
    watch = [sys.executable, "-m", "murmur", "run", "watch", run, "--data", str(data), "--json"]
    with subprocess.Popen(watch, stdout=subprocess.PIPE, text=True) as watching:
        try:
            assert murmur("run", "pause", run, "--data", data).out == f"run {run} is paused by admin\n"
            assert (
                f"{run}  fedavg, masked, round 0 of 2, paused by admin\n"
                in murmur("run", "show", run, "--data", data).out
            )
            assert json.loads(murmur("run", "pause", run, "--data", data, "--json").out)["state"] == "paused"
            resumed = json.loads(murmur("run", "resume", run, "--data", data, "--json").out)
            assert (resumed["id"], resumed["state"], resumed["paused_by"]) == (run, "running", None)
            assert murmur("run", "stop", run, "--data", data).out == f"run {run} is stopped by admin\n"
            lines, _ = watching.communicate(timeout=60)
        finally:
            watching.kill()
    said = [e["data"]["state"] for e in map(json.loads, lines.splitlines()) if e["kind"] == "run"]
    assert said == ["running", "paused", "running", "stopped"]
    again = murmur("run", "pause", run, "--data", data)
    assert again.code == 1 and "the run is stopped" in again.err


def test_a_run_that_goes_on_longer_than_one_waits_is_exit_code_three(data: Path, run: str):
    done = murmur("run", "watch", run, "--timeout", "0.3", "--data", data)
    assert done.code == 3 and "has not ended after 0.3 s" in done.err


def test_runs_are_compared_by_what_differs(data: Path, run: str, tmp_path: Path):
    start = ("run", "start", tmp_path / "recipe.toml", "--task", f"{tmp_path / 'task.py'}:Line", "--data", data)
    other = json.loads(murmur(*start, "--set", "train.lr=0.25", "--json").out)["id"]
    found = json.loads(murmur("run", "compare", run, other, "--data", data, "--json").out)
    assert found["settings"] == {"train.lr": {run: "0.01", other: "0.25"}} and found["runs"] == []
    assert "train.lr" in murmur("run", "compare", run, other, "--data", data).out
    assert "from two to 4" in murmur("run", "compare", run, "--data", data).err
    assert "no run has the metric" in murmur("run", "compare", run, other, "--metric", "f1", "--data", data).err
    murmur("run", "stop", other, "--data", data)


def test_the_log_of_a_run_is_told_in_words_and_as_json_lines(data: Path, run: str):
    said = murmur("run", "logs", run, "--data", data).out
    assert "Run t started by admin" in said
    kinds = [json.loads(line)["kind"] for line in murmur("run", "logs", run, "--data", data, "--json").out.splitlines()]
    assert kinds[0] == "run" and "phase" in kinds
    assert murmur("run", "logs", "none", "--data", data).code == 1


def test_a_run_and_a_model_tell_who_is_in_them(data: Path, run: str):
    shown = json.loads(murmur("run", "show", run, "--data", data, "--json").out)
    assert shown["newest"]["n"] == 0 and shown["newest"]["who"] == shown["newest"]["missing"] == []
    assert "version 0 is what the run started from" in murmur("run", "show", run, "--data", data).out
    model = json.loads(murmur("model", "show", f"{run}@0", "--data", data, "--json").out)
    lineage = model.pop("lineage")
    assert model == shown["newest"]
    assert lineage["code"] == hashlib.sha256(TASK.encode()).hexdigest() and len(lineage["recipe"]) == 64
    assert model["sha256"] in murmur("model", "show", run, "--data", data).out
    assert "missing" in murmur("model", "list", "--run", run, "--data", data).out
    assert murmur("model", "show", f"{run}@1", "--data", data).code == 1


def test_an_alias_is_promoted_pulled_by_name_and_rolled_back(data: Path, run: str, tmp_path: Path):
    (tmp_path / "task.py").write_text(TASK)
    (tmp_path / "recipe.toml").write_text(RECIPE.replace('name = "t"', 'name = "line"'))
    start = ("run", "start", tmp_path / "recipe.toml", "--task", f"{tmp_path / 'task.py'}:Line", "--data", data)
    first, second = (json.loads(murmur(*start, "--set", f"seed={n}", "--json").out)["id"] for n in (1, 2))
    promoted = murmur("model", "promote", f"{first}@0", "--as", "production", "--data", data)
    assert promoted.out.startswith(f"line@production points at {first}@0, ")
    moved = json.loads(murmur("model", "promote", second, "--as", "production", "--data", data, "--json").out)
    assert (moved["n"], moved["version"], moved["before"]) == (2, {"run": second, "n": 0}, {"run": first, "n": 0})
    assert f"{second}@0  production" in murmur("model", "list", "--run", second, "--data", data).out
    pull = ("model", "pull", "line@production", "--to", tmp_path / "m.safetensors", "--data", data, "--json")
    pulled = json.loads(murmur(*pull).out)
    assert (pulled["run"], pulled["sha256"]) == (second, moved["sha256"])
    assert hashlib.sha256((tmp_path / "m.safetensors").read_bytes()).hexdigest() == moved["sha256"]
    assert murmur("model", "rollback", "line", "production", "--data", data).code == 0
    assert json.loads(murmur(*pull).out)["run"] == first
    assert murmur("model", "rollback", "line", "production", "--data", data).code == 1  # nothing before
    assert "line@production is removed" in murmur("model", "unalias", "line", "production", "--data", data).out
    assert murmur(*pull).code == 1 and murmur("model", "unalias", "line", "production", "--data", data).code == 1
    told = json.loads(murmur("model", "history", "line", "--data", data, "--json").out)
    assert [(a["action"], a["version"]["run"]) for a in told] == [
        ("removed", first), ("rolled_back", first), ("promoted", second), ("promoted", first)
    ]  # fmt: skip
    assert "rolled back" in murmur("model", "history", "line", "--data", data).out
    unclear = murmur("model", "show", "line@0", "--data", data)
    assert unclear.code == 1 and f"{second}@0, {first}@0" in unclear.err
    assert json.loads(murmur("model", "show", "line", "--data", data, "--json").out)["run"] == second
    wrong = murmur("model", "promote", first, "--as", "37", "--data", data)
    assert wrong.code == 1 and "with a letter first" in wrong.err
    for id in (first, second):
        murmur("run", "stop", id, "--data", data)


def test_a_card_is_printed_or_written(data: Path, run: str, tmp_path: Path):
    printed = murmur("model", "card", f"{run}@0", "--license", "mit", "--data", data)
    assert printed.code == 0 and printed.out.startswith("---\nlicense: mit\n")
    assert murmur("model", "card", f"{run}@0", "--out", tmp_path / "README.md", "--data", data).code == 0
    assert "license: unknown\n" in (tmp_path / "README.md").read_text()
    wrong = murmur("model", "card", run, "--license", "no licence", "--data", data)
    assert wrong.code == 1 and "apache-2.0" in wrong.err


def test_manifests_are_fetched_by_those_who_may_read_them(data: Path, run: str, tmp_path: Path):
    out = ("--out", tmp_path / "manifests")
    fetched = murmur("audit", "fetch", run, "--data", data, *out)
    assert (fetched.code, fetched.out) == (0, f"no round of {run} has a manifest yet\n") and not out[1].exists()
    assert murmur("audit", "fetch", "none", "--data", data, *out).code == 1
    join = json.loads(murmur("coordinator", "invite", "outsider", "--data", data, "--json").out)["join"]
    murmur("client", "enroll", join, "--name", "outsider", "--dir", tmp_path / "outsider")
    murmur("coordinator", "approve", "outsider", "--data", data)
    refused = murmur("audit", "fetch", run, "--client", tmp_path / "outsider", *out)
    assert refused.code == 4 and "no run that you were asked to take part in" in refused.err


def test_models_lie_in_the_folder_that_blobs_names(tmp_path: Path):
    (tmp_path / "task.py").write_text(TASK)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    data, blobs = tmp_path / "data", tmp_path / "elsewhere"
    serve = ("coordinator", "serve", "--data", str(data), "--blobs", str(blobs), "--port", "0", "--insecure-http")
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen([sys.executable, "-m", "murmur", *serve], stdout=log, stderr=log)
    try:
        wait_until((data / "operator.json").exists, 30, "the coordinator", log=tmp_path / "log")
        start = ("run", "start", tmp_path / "recipe.toml", "--task", f"{tmp_path / 'task.py'}:Line", "--data", data)
        assert murmur(*start).code == 0
    finally:
        server.terminate()
        assert server.wait(60) == 0
    assert len([p for p in (blobs / "sha256").rglob("*") if p.is_file()]) == 1 and not (data / "blobs").exists()


def test_the_help_of_serve_gives_the_defaults():
    said = " ".join(murmur("coordinator", "serve", "--help").out.split())
    assert "s3://bucket/prefix" in said and "[default: 8443]" in said


def test_an_unknown_setting_is_refused_by_name(data: Path, tmp_path: Path):
    (tmp_path / "recipe.toml").write_text(RECIPE + "[train]\nlearning_rate = 1\n")
    done = murmur("run", "start", tmp_path / "recipe.toml", "--task", "x:Y", "--data", data)
    assert done.code == 1 and "train.learning_rate" in done.err


def test_secure_aggregation_of_two_is_refused_when_the_run_is_submitted(data: Path, tmp_path: Path):
    (tmp_path / "recipe.toml").write_text(RECIPE.replace("min = 3", "min = 2"))
    done = murmur("run", "start", tmp_path / "recipe.toml", "--task", "x:Y", "--data", data)
    assert done.code == 1 and "3 or more" in done.err


def test_a_coordinator_that_is_not_there_is_exit_code_four(tmp_path: Path):
    away = {"MURMUR_URL": "http://127.0.0.1:9", "MURMUR_TOKEN": "x" * 20}
    done = murmur("run", "list", environment=away)
    assert done.code == 4 and "cannot be reached" in done.err


def test_a_wrong_token_is_exit_code_four(data: Path):
    url = json.loads((data / "operator.json").read_text())["url"]
    assert murmur("run", "list", environment={"MURMUR_URL": url, "MURMUR_TOKEN": "wrong"}).code == 4


def test_no_coordinator_in_the_folder_says_what_to_give(tmp_path: Path):
    done = murmur("run", "list", "--data", tmp_path)
    assert done.code == 1 and "MURMUR_URL" in done.err


def test_a_token_made_by_the_operator_acts_for_its_account(data: Path):
    url = json.loads((data / "operator.json").read_text())["url"]
    token = murmur("coordinator", "token", "admin", "--data", data).out.strip()
    assert murmur("run", "list", environment={"MURMUR_URL": url, "MURMUR_TOKEN": token}).code == 0


def test_the_operators_file_is_readable_by_its_owner_only(data: Path):
    assert (data / "operator.json").stat().st_mode & 0o777 == 0o600


def test_wrong_usage_is_exit_code_two():
    assert murmur("run", "start").code == 2
    assert murmur("demo", "--strategy", "fedsgd").code == 2


def test_plain_http_is_refused_off_loopback(tmp_path: Path):
    done = murmur("coordinator", "serve", "--data", tmp_path, "--host", "0.0.0.0", "--insecure-http")
    assert done.code == 1 and "loopback only" in done.err


def test_settings_come_from_the_environment_and_flags_override_them(monkeypatch: pytest.MonkeyPatch):
    from murmur.coordinator.settings import Settings

    monkeypatch.setenv("MURMUR_PORT", "9000")
    monkeypatch.setenv("MURMUR_HOST", "::1")
    settings = Settings.model_validate({"port": 9001})
    assert (settings.host, settings.port) == ("::1", 9001)
