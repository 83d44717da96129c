"""The demo end to end: real processes, real data, real masks; and the same models from the simulator."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from ..waiting import wait_until

ROUNDS = 3


def demo(folder: Path, *arguments: str) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
    """Run the demo; returns its JSON line and the final model."""
    command = [sys.executable, "-m", "murmur", "demo", "--exit", "--json", "--dir", str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    logs = "\n".join(f"== {p.name}\n{p.read_text()[-1500:]}" for p in sorted((folder / "logs").glob("*.log")))
    assert done.returncode == 0, f"{done.stderr}\n{logs}"
    return json.loads(done.stdout.splitlines()[-1]), load_file(folder / "model.safetensors")


def processes_of(folder: Path) -> list[str]:
    """Command lines of living processes that name the folder."""
    found: list[str] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if str(folder) in line and int(entry.name) != os.getpid():
                found.append(line)
    return found


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
    return demo(tmp_path_factory.mktemp("masked") / "demo", "--rounds", str(ROUNDS))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
    return demo(tmp_path_factory.mktemp("plain") / "demo", "--rounds", str(ROUNDS), "--plain")


def test_the_demo_reports_each_hospital_and_the_mean(masked: tuple[dict[str, Any], Any]):
    result, _ = masked
    assert set(result["hospitals"]) == {"cleveland", "hungarian", "switzerland", "va"}
    for column in ("local", "pooled", "federated"):
        values = [row[column] for row in result["hospitals"].values()]
        assert result["mean"][column] == pytest.approx(sum(values) / 4, abs=1e-3)
        assert 0.5 < result["mean"][column] < 0.95
    assert (result["rounds"], result["secure"]) == (ROUNDS, True)


@pytest.mark.parametrize("secure", ["real", pytest.param(False, marks=pytest.mark.slow)])
def test_the_simulator_ends_in_the_coordinators_model(secure: Any, request: pytest.FixtureRequest):
    import torch

    from murmur import simulate

    torch.set_num_threads(1)  # as the demo's trainers have it: the order of sums inside an operator depends on it
    history = simulate(Path(__file__).parents[2] / "examples" / "hospitals", rounds=ROUNDS, seed=0, secure=secure)
    model = request.getfixturevalue("masked" if secure else "plain")[1]
    found = {name: tensor.numpy() for name, tensor in history.state_dict().items()}
    assert found.keys() == model.keys()
    for name, array in model.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.slow
def test_masked_and_plain_runs_end_in_the_same_model(masked: tuple[Any, Any], plain: tuple[Any, Any]):
    assert masked[1].keys() == plain[1].keys()
    for name, array in plain[1].items():
        np.testing.assert_allclose(masked[1][name], array, atol=1e-4, rtol=0, err_msg=name)
        assert not np.array_equal(masked[1][name], array) or array.size < 2  # fixed point rounds: it really was masked


@pytest.mark.slow
def test_two_training_processes_reach_the_accuracy_of_one(tmp_path: Path, plain: tuple[dict[str, Any], Any]):
    result, model = demo(tmp_path / "demo", "--rounds", str(ROUNDS), "--plain", "--processes", "2")
    for name, array in plain[1].items():
        np.testing.assert_allclose(model[name], array, atol=1e-4, rtol=0, err_msg=name)
    assert result["mean"]["federated"] == pytest.approx(plain[0]["mean"]["federated"], abs=0.01)


@pytest.mark.slow
def test_ctrl_c_ends_every_process_of_the_demo(tmp_path: Path):
    folder = tmp_path / "demo"
    command = [sys.executable, "-m", "murmur", "demo", "--rounds", "500", "--dir", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith("round 1 "):
                break
        assert len(processes_of(folder)) >= 6  # the demo, the coordinator, four agents, their trainers
        os.killpg(child.pid, signal.SIGINT)
        assert child.wait(60) == 130
    wait_until(lambda: not processes_of(folder), 5, "no process of the demo is left")


def test_a_folder_that_is_not_a_demos_is_not_deleted(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("x")
    command = [sys.executable, "-m", "murmur", "demo", "--exit", "--dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "not made by a demo" in done.stderr
    assert (tmp_path / "thesis.tex").exists()
