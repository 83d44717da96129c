"""`murmur simulate` and `murmur sweep` as processes that are ended in the middle."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from murmur.coordinator.store import Store
from murmur.protocol.views import RunView

from ..command import murmur
from ..waiting import wait_until

pytestmark = pytest.mark.slow
PLANTED = f"{Path(__file__).with_name('planted.py')}:federation"
FAR = ("--set", 'metrics=["loss"]', "--set", "train.batch_size=4", "--plain", "--backend", "sequential")


def runs(data: Path) -> list[RunView]:
    store = Store(f"sqlite:///{data / 'murmur.db'}", clock=time.time)
    try:
        return store.runs.all()
    finally:
        store.close()


def rounds_stored(data: Path) -> int:
    try:
        with closing(sqlite3.connect(f"file:{data / 'murmur.db'}?mode=ro", uri=True)) as database:
            return database.execute("SELECT max(n) FROM version").fetchone()[0] or 0
    except sqlite3.OperationalError:  # there is no database yet
        return 0


def ended_after(rounds: int, by: signal.Signals, data: Path, *arguments: str) -> int:
    """Simulate until so many rounds are stored, send the signal; the exit code."""
    command = [sys.executable, "-m", "murmur", "simulate", PLANTED, *arguments, "--data", str(data), "--json"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as child:
        wait_until(lambda: child.poll() is not None or rounds_stored(data) >= rounds, 60, f"{rounds} rounds")
        child.send_signal(by)
        return child.wait(60)


@pytest.mark.parametrize("world", [(), ("--world", "hospitals", "--set", "world.buffered.size=2")])
def test_a_killed_simulation_goes_on_by_its_id_or_as_the_last_of_its_command(
    tmp_path: Path, world: tuple[str, ...]
) -> None:
    given = (*FAR, *world, "--rounds", "60")
    whole = json.loads(murmur("simulate", PLANTED, *given, "--no-store", "--json").out)
    data = tmp_path / "data"
    assert ended_after(3, signal.SIGKILL, data, *given) == -signal.SIGKILL
    (killed,) = runs(data)
    assert killed.state == "running" and 3 <= killed.round < 60  # nobody could say that it was killed
    assert ended_after(killed.round + 3, signal.SIGTERM, data, *given, "--resume", killed.id) == 128 + signal.SIGTERM
    (held,) = runs(data)
    assert held.state == "paused" and f"murmur simulate --resume {killed.id} goes on" in held.reason
    again = json.loads(murmur("simulate", PLANTED, *given, "--data", data, "--resume", "last", "--json").out)
    assert again["run"] == killed.id and again["versions"] == whole["versions"]
    assert again.get("world") == whole.get("world")
    assert [r.state for r in runs(data)] == ["finished"] and not list((data / "simulations").iterdir())


def test_a_sweep_simulates_what_is_missing(tmp_path: Path) -> None:
    given = (
        "sweep",
        PLANTED,
        *FAR,
        "--rounds",
        "3",
        "--dir",
        tmp_path / "sweep",
        "--data",
        tmp_path / "data",
        "--json",
    )
    first = murmur(*given, "--set", "train.lr=1.0,0.5")
    assert first.code == 0
    more = murmur(*given, "--set", "train.lr=1.0,0.5,0.1")
    found = json.loads(more.out)["trials"]
    assert more.code == 0 and [t["params"]["train.lr"] for t in found] == [1.0, 0.5, 0.1]  # the best first
    done = {t["params"]["train.lr"]: t["run"] for t in found[:2]}
    assert done == {t["params"]["train.lr"]: t["run"] for t in json.loads(first.out)["trials"]}  # not simulated again
    assert len(runs(tmp_path / "data")) == 3
    assert len((tmp_path / "sweep" / "table.csv").read_text().splitlines()) == 4
