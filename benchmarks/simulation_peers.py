"""Other simulators on the work of `benchmarks.simulation`, each by the Python of an environment of its own.

    python -m venv peer && peer/bin/pip install pfl==0.6.0 torch && export MURMUR_PEER_PFL=$PWD/peer/bin/python

Without the variable this Python is tried. A peer that is not installed there is left out, and said to be.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from murmur.clients.engine.drawing import order_of

from .report import Figure, median, note
from .simulated_work import BATCH, CLIENTS, IMAGES, RATE, Work, read

PEERS = {"flwr": {"W2": 100.0}, "pfl": {"W2": 30.0}}  # by how much we aim to be faster
HERE = Path(__file__).parent


def peers(work: Work, ours_s: float, *, data: str, cohort: int, rounds: int) -> list[Figure]:
    """Seconds and CPU seconds of a peer's rounds after its first, and how many of our rounds its fastest one takes.

    ours_s: seconds of our own fastest round.
    """
    found: list[Figure] = []
    with tempfile.TemporaryDirectory() as folder:
        _write(Path(folder), work, data, rounds)
        for peer, aims in PEERS.items():
            asked = {"work": work.name, "folder": folder, "cohort": cohort, "rounds": rounds, "clients": CLIENTS}
            measured = _run(peer, asked | {"batch": BATCH, "rate": RATE})
            if measured is None:
                continue
            seconds, cpu_s = measured["seconds"][1:], measured["cpu_s"][1:]
            said = ", ".join(f"{name} {number}" for name, number in measured["versions"].items())
            name = f"{work.name}_{peer}"
            times = min(seconds) / ours_s
            at_least = aims.get(work.name)
            found += [
                Figure(name=f"{name}_vs_vectorized", value=times, unit="x our round", at_least=at_least, note=said),
                Figure(name=f"{name}_min", value=min(seconds), unit="s"),
                Figure(name=f"{name}_median", value=median(seconds), unit="s"),
                Figure(name=f"{name}_cpu_min", value=min(cpu_s), unit="CPU s", note="of all its processes"),
                Figure(name=f"{name}_accuracy", value=read(data).accuracy(_model(work, measured["model"])), unit=""),
            ]
            note(f"{work.name} {peer}: {min(seconds):.4g} s, {said}")
    return found


def _write(folder: Path, work: Work, data: str, rounds: int) -> None:
    """What a peer needs: images and classes, the order of each client's images in each round, the first weights."""
    x, y = (t[: CLIENTS * IMAGES] for t in read(data).train)
    width = len(str(CLIENTS - 1))
    orders = [order_of(0, n, f"client-{k:0{width}d}", 0, IMAGES) for n in range(1, rounds + 1) for k in range(CLIENTS)]
    torch.manual_seed(0)
    held = {"x": x.reshape(CLIENTS, IMAGES, *x.shape[1:]), "y": y.reshape(CLIENTS, IMAGES)}
    held["orders"] = torch.stack(orders).reshape(rounds, CLIENTS, IMAGES)
    save_file({name: t.contiguous() for name, t in held.items()}, folder / "data")
    save_file(work.model().state_dict(), folder / "first")


def _run(peer: str, asked: dict[str, Any]) -> dict[str, Any] | None:
    python = os.environ.get(f"MURMUR_PEER_{peer.upper()}", sys.executable)
    try:
        there = subprocess.run([python, "-c", f"import {peer}"], capture_output=True).returncode == 0
    except OSError as error:
        raise SystemExit(f"MURMUR_PEER_{peer.upper()} = {python}: {error.strerror}") from None
    if not there:
        note(f"{peer} is left out: {python} has none; MURMUR_PEER_{peer.upper()} names another Python")
        return None
    result = Path(asked["folder"], f"{peer}.json")
    asked = asked | {"result": str(result), "model": str(result.with_suffix(".model"))}
    environment = os.environ | {"PYTHONPATH": str(HERE), "FLWR_TELEMETRY_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    command = [python, str(HERE / f"simulation_{peer}.py"), json.dumps(asked)]
    done = subprocess.run(command, env=environment, cwd=asked["folder"], capture_output=True, text=True)
    if not result.exists():
        raise RuntimeError(f"{peer} failed:\n{done.stderr[-3000:]}")
    return json.loads(result.read_text()) | {"model": asked["model"]}


def _model(work: Work, path: str) -> torch.nn.Module:
    from safetensors.torch import load_file

    module = work.model()
    module.load_state_dict(load_file(path))
    return module
