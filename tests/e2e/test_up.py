"""`murmur up`: one's own task on this machine, a run, Ctrl-C, and on again."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ..murmur.test_cli import RECIPE, TASK, murmur
from ..waiting import wait_until
from .test_hospitals import processes_of


@contextmanager
def begun(folder: Path, *arguments: str) -> Iterator[list[str]]:
    """`murmur up` from when its client is there until Ctrl-C, which must leave nothing; what it said."""
    command = [sys.executable, "-m", "murmur", "up", *arguments, "--dir", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as child:
        assert child.stdout is not None
        said: list[str] = []
        while not said or "murmur run start" not in said[-1]:
            said.append(child.stdout.readline())
            assert said[-1], child.wait()
        yield said
        os.killpg(child.pid, signal.SIGINT)
        assert child.wait(60) == 0
    wait_until(lambda: not processes_of(folder), 5, "no process is left")


@pytest.mark.slow
def test_a_task_is_tried_on_this_machine_and_the_next_up_goes_on(tmp_path: Path):
    folder, task = tmp_path / "up", tmp_path / "task.py"
    task.write_text(TASK)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    data = ("--data", folder / "coordinator")
    with begun(folder, f"{task}:Line", "--port", port) as said:
        name, *start = shlex.split(said[-1])  # what it says to type
        command = [sys.executable, "-m", name, *start, *map(str, data)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    with begun(folder, "--port", port):
        (run,) = json.loads(murmur("run", "list", *data, "--json").out)
        assert run["state"] == "finished"


def test_up_says_which_task_is_missing_and_leaves_a_client_that_is_there(tmp_path: Path):
    done = murmur("up", "--dir", tmp_path)
    assert done.code == 1 and "murmur up task.py:Class" in done.err
    (tmp_path / "client").mkdir()
    (tmp_path / "client" / "client.toml").write_text("mine")
    done = murmur("up", "task.py:Mine", "--dir", tmp_path)
    assert done.code == 1 and "leave the task out" in " ".join(done.err.split())
