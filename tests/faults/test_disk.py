"""A disk that fills up while a run goes on: nothing is lost, it says what to do, and goes on when there is room."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .federation import Coordinator, Federation, check_exact, finish, recipe, wait_until

SIZE = "192m"  # of which 5 %, 9.6 MB, are kept for the database: its log may grow to 4 MB before it is folded in


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if os.getuid() != 0:
        pytest.skip("mounting a tmpfs takes root; tests/coordinator/test_janitor.py has the injected form")
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(path: Path, leave: int) -> None:
    """Write a file until so many bytes are free."""
    with path.open("wb") as file:
        try:
            found = os.statvfs(path)
            file.write(bytes(max(0, found.f_bavail * found.f_frsize - leave)))
        except OSError:
            print("not a byte is free")


RESERVE, NOTHING = 8 << 20, 0  # bytes that are left free


@pytest.mark.parametrize(
    ("secure", "leave"),
    [
        pytest.param(False, RESERVE, id="plain, the reserve is touched", marks=pytest.mark.slow),
        pytest.param(True, NOTHING, id="masked, not a byte is free", marks=pytest.mark.slow),
        pytest.param(True, RESERVE, id="masked, the reserve is touched", marks=pytest.mark.slow),
        pytest.param(False, NOTHING, id="plain, not a byte is free", marks=pytest.mark.slow),
    ],
)
def test_a_run_waits_for_room_and_goes_on_by_itself(
    coordinator: Callable[..., Coordinator], federation: Federation, small_disk: Path, leave: int, secure: bool
):
    one, rounds = coordinator("disk/data"), 40  # more than go by while the disk is being filled
    one.log_file = small_disk.parent / "disk.log"
    one.start()
    federation.open_doors(one)
    run = federation.start_run(one, recipe(rounds, secure=secure))
    wait_until(lambda: one.run(run).round >= 1, 60, "a round")
    fill(small_disk / "filler", leave)
    status, said = wait_until(lambda: (found := one.ready())[0] == 503 and found, 60, "not ready")
    assert status == 503 and any("disk" in trouble and "Free some space" in trouble for trouble in said["troubles"])
    if leave:
        view = wait_until(lambda: (v := one.run(run)).state == "paused" and v, 60, "the run is paused")
        assert "Free some space or move the blobs to a larger disk" in view.reason
        assert one.run(run).round < rounds
    (small_disk / "filler").unlink()
    wait_until(lambda: one.ready()[0] == 200, 60, "ready again")
    finish(one, run)
    check_exact(one, run, rounds, secure=secure)
    assert "Traceback" not in one.log, one.log
    assert one.end() == 0
