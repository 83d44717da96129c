"""The benchmarks run, and print what they say they print; nothing here is timed."""

import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from murmur.protocol.errors import NotAuthenticated
from murmur.protocol.signatures import verify

ROOT = Path(__file__).parents[1]


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.mark.slow
def test_the_cheap_parts_run_and_print_one_object_with_their_aims(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.coordinator", "--quick", "--json", "--only", "round", "sum"]
    places = [os.environ.get("PYTHONPATH", ""), str(ROOT)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, places))}
    done = subprocess.run([*command, "--dir", str(tmp_path)], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["quick"] is True
    assert [aim["name"] for aim in found["aims"]] == ["round", "round_failed", "sum_plain", "sum_masked"]
    for aim in found["aims"]:
        assert {"name", "value", "unit", "aim", "met"} <= aim.keys()
        assert isinstance(aim["met"], bool)
    assert found["aims"][1]["value"] == 0  # every agent was counted, as the database says
    assert found["machine"]["cores"] >= 1
    assert "python" in found["versions"]
    assert list(tmp_path.iterdir()) == []  # it cleans up after itself


@pytest.mark.slow
def test_secure_aggregation_is_measured_beside_flwrs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.secagg", "--quick", "--json", "--dir", str(tmp_path)]
    places = [os.environ.get("PYTHONPATH", ""), str(ROOT)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, places))}
    command += ["--only", "stream", "flwr", "large", "control"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    figures = {row["name"]: row["value"] for row in found["aims"] + found["figures"]}
    aims = {"stream_rss_growth", "client_vs_flwr", "server_vs_flwr", "bytes_vs_flwr", "error_vs_flwr"}
    aims |= {"server_vs_flwr_dropped", "masks_vs_adds", "control_complete", "control_sparse"}
    assert {row["name"] for row in found["aims"]} == aims
    assert figures["upload_bytes"] == pytest.approx(4, abs=0.01)  # and a header
    assert figures["upload_bytes_flwr"] == pytest.approx(8, abs=0.02)
    # flwr's step is 16 / 2^22 = 3.8e-6 for a weight of 1000; both errors are of means that came out of a whole round
    assert figures["error_flwr"] == pytest.approx(4e-6, rel=0.5)
    assert figures["error"] < figures["error_flwr"] / 100
    assert found["versions"]["flwr"] >= "1.41"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_simulated_rounds_are_measured_beside_a_bare_loop_that_ends_in_the_same_model() -> None:
    command = [sys.executable, "-m", "benchmarks.simulation", "--quick", "--json", "--only", "W2"]
    places = [os.environ.get("PYTHONPATH", ""), str(ROOT)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, places))}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert [row["name"] for row in found["aims"]] == ["W2_vectorized", "W2_sequential_overhead"]
    figures = {row["name"]: row["value"] for row in found["figures"]}
    accuracies = {value for name, value in figures.items() if name.endswith("accuracy")}
    assert max(accuracies) - min(accuracies) < 1e-3  # of noise; a few images lie at the edge


@pytest.mark.usefixtures("benchmarks")
def test_a_peer_that_is_not_installed_is_left_out_and_said_to_be(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks import simulation_peers
    from benchmarks.simulated_work import WORKS

    monkeypatch.setattr(simulation_peers, "PEERS", {"no_such_peer": {"W2": 1.0}})
    monkeypatch.setattr(simulation_peers, "_write", lambda *_: None)
    assert simulation_peers.peers(WORKS[1], 1.0, data="", cohort=4, rounds=2) == []
    assert "no_such_peer is left out" in capsys.readouterr().err
    monkeypatch.setenv("MURMUR_PEER_NO_SUCH_PEER", "/no/python")
    with pytest.raises(SystemExit, match="MURMUR_PEER_NO_SUCH_PEER = /no/python: No such file"):
        simulation_peers.peers(WORKS[1], 1.0, data="", cohort=4, rounds=2)


@pytest.mark.usefixtures("benchmarks")
def test_the_coordinator_takes_the_signatures_that_the_agents_make() -> None:
    from benchmarks.swarm import Agent

    agent = Agent("clinic", Ed25519PrivateKey.generate(), "token")
    url, body = "/v1/assignments/r.1.1.clinic/answers/shares?fence=1", b'{"a":1}'
    headers = dict(line.split(": ", 1) for line in agent.signature("POST", url, body).strip().split("\r\n"))
    public = agent.key.public_key().public_bytes_raw()

    def check(body: bytes) -> str:
        return verify("POST", url, headers, body, public_key_of=lambda _: public, now=time.time()).keyid

    assert check(body) == "clinic"
    with pytest.raises(NotAuthenticated):
        check(body + b" ")


@pytest.mark.usefixtures("benchmarks")
def test_an_aim_is_met_on_its_own_side_of_the_limit_only() -> None:
    from benchmarks.report import Figure

    def met(value: float | None, **limit: float) -> bool | None:
        return Figure(name="f", value=value, unit="s", **limit).met

    assert (met(3.0, at_most=3), met(3.1, at_most=3)) == (True, False)
    assert (met(2.9, below=3), met(3.0, below=3)) == (True, False)
    assert (met(0.9, at_least=0.9), met(0.89, at_least=0.9)) == (True, False)
    assert met(None, below=3) is False  # what could not be measured is not met
    assert met(1.0) is None


@pytest.mark.slow
def test_open_dashboards_are_measured_on_a_run_that_gets_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.dashboard", "--quick", "--json", "--dir", str(tmp_path)]
    places = [os.environ.get("PYTHONPATH", ""), str(ROOT)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, places))}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert [aim["name"] for aim in found["aims"]] == ["dashboards_cpu", "read_p50_ratio", "read_p95_ratio"]
    figures = {row["name"]: row["value"] for row in found["figures"]}
    assert min(figures["events_without"], figures["events_with"]) > 0
    assert figures["updates_least"] > 0  # each of the five was told
    assert figures["sent"] > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("benchmarks")
def test_a_dashboards_updates_are_counted_wherever_the_network_cuts_them() -> None:
    from benchmarks.dashboard import Viewer

    said = b"HTTP/1.1 200 OK\r\n\r\n8\r\n: murmur\n\r\n30\r\nevent: log\ndata: event: 7\n\n\r\n20\r\nevent: run_now\n"

    async def counted(cut: int) -> tuple[int, int, bool]:
        viewer = Viewer()
        viewer.data_received(said[:cut])
        viewer.data_received(said[cut:])
        return viewer.updates, viewer.bytes, viewer.live.done()

    for cut in range(len(said)):
        assert asyncio.run(counted(cut)) == (2, len(said), True), cut


@pytest.mark.slow
def test_the_engine_is_measured_beside_a_loop_written_by_hand(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.engine", "--quick", "--json", "--dir", str(tmp_path)]
    places = [os.environ.get("PYTHONPATH", ""), str(ROOT)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, places)), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    rows = {row["name"]: row for row in found["aims"] + found["figures"]}
    aims = ["overhead", "overhead_ddp", "prox_cost", "prox_vs_loss", "between_rounds"]
    aims += ["memory_gathered", "memory_most"]
    assert [row["name"] for row in found["aims"]] == aims
    assert all(isinstance(rows[name]["value"], float) for name in aims)
    assert rows["gpu"] == {"name": "gpu", "value": None, "unit": "", "note": rows["gpu"]["note"]}
    assert "no CUDA device" in rows["gpu"]["note"] and "no CUDA device" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.usefixtures("benchmarks")
def test_no_process_holds_a_sharded_model_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import engine_memory

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(ROOT)]))
    found = {f.name: f.value or 0.0 for f in engine_memory.measure(tmp_path, layers=25)}  # 100 MB over two
    assert 0.4 < found["memory_loaded"] < 0.8
    assert found["memory_gathered"] < 1.0 and found["memory_most"] < 1.5


@pytest.mark.usefixtures("benchmarks")
def test_what_the_engine_is_measured_with_has_the_published_sizes() -> None:
    from benchmarks import engine_tasks

    def parameters(task: engine_tasks.SmallCnn) -> int:
        return sum(p.numel() for p in task.model().parameters())

    assert parameters(engine_tasks.SmallCnn()) == 421_642
    assert parameters(engine_tasks.ResNet50()) == 25_557_032  # as torchvision's resnet50
    assert parameters(engine_tasks.Gpt2Small()) == 124_439_808  # as Hugging Face's gpt2


@pytest.mark.usefixtures("benchmarks")
def test_the_loop_by_hand_takes_the_engines_steps(tmp_path: Path) -> None:
    import torch

    from benchmarks import engine, engine_tasks
    from murmur.clients.engine.loop import run_job
    from murmur.clients.engine.ranks import Ranks
    from murmur.clients.engine.state import map_tensors, read_model
    from murmur.protocol.tensors import read_layout

    task, alone = engine_tasks.SmallCnn(40), Ranks.alone("cpu")
    job = engine.make_job(task, tmp_path, steps=4, batch_size=16, lr=0.1)  # 16, 16, 8, and 16 of the next epoch
    run_job(task, job)
    model, start = task.model(), task.model()
    read_model(model, job.model), read_model(start, job.model)
    engine.bare_loop(model, task.data("train").tensors, job, alone)
    for name, delta in map_tensors(job.update, read_layout(job.update)).items():
        assert torch.allclose(delta, model.state_dict()[name] - start.state_dict()[name], atol=1e-6), name
