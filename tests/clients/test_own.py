import os
import time

from murmur.clients.own import KEPT_S, Own


def left(folder):
    return sorted(path.name for path in folder.iterdir())


def keep(own, tmp_path, run, round):
    path = tmp_path / "new"
    path.write_text(f"{run} after {round}")
    own.adopt(run, round, path)


def test_a_round_begins_with_what_the_clients_last_one_left(tmp_path):
    own = Own(tmp_path / "own")
    assert own.before("r", 1) is None
    keep(own, tmp_path, "r", 1)
    keep(own, tmp_path, "r", 4)
    assert own.before("r", 5).read_text() == "r after 4"
    assert own.before("r", 4).read_text() == "r after 1"  # tried again: as its first attempt
    assert own.before("r", 1) is None and own.before("q", 9) is None


def test_runs_whose_names_begin_alike_are_two(tmp_path):
    own = Own(tmp_path / "own")
    keep(own, tmp_path, "r.2", 1)
    keep(own, tmp_path, "r", 10)
    assert own.before("r", 5) is None
    assert own.before("r", 20).read_text() == "r after 10"
    assert own.before("r.2", 20).read_text() == "r.2 after 1"


def test_two_rounds_of_a_run_are_kept_and_runs_nobody_asks_for_go_at_the_next_start(tmp_path):
    own = Own(tmp_path / "own")
    for round in (1, 2, 11):
        keep(own, tmp_path, "r", round)
    keep(own, tmp_path, "old", 3)
    assert left(tmp_path / "own") == ["old.3.safetensors", "r.11.safetensors", "r.2.safetensors"]
    long_ago = time.time() - KEPT_S - 60
    os.utime(tmp_path / "own" / "old.3.safetensors", (long_ago, long_ago))
    Own(tmp_path / "own")
    assert left(tmp_path / "own") == ["r.11.safetensors", "r.2.safetensors"]
