import json

import pytest

from murmur.clients import memory as memory_module
from murmur.clients.memory import Memory
from murmur.clients.settings import Policy
from murmur.protocol.encoding import b64, fingerprint
from murmur.protocol.errors import OperatorError, PrivacyRefusal
from murmur.protocol.messages import Assignment, Kind
from murmur.protocol.sections import Train

OLD, NEW = bytes(range(32)), bytes(32)


def assignment(round=1, kind=Kind.TRAIN, attempt=1, **changes):
    return Assignment(
        id="x", fence=1, run="r", round=round, attempt=attempt, kind=kind, task="t", model=f"{round:064x}",
        model_bytes=1, train=Train(), mu=0, weighting="uniform", max_weight=1, metrics=(), seed=0, patience_s=1,
        secure=None,
    ).model_copy(update=changes)  # fmt: skip


def test_what_is_remembered_survives_a_restart(tmp_path):
    memory = Memory(tmp_path)
    memory.remember_peers({"beta": OLD})
    memory.join("aa")
    memory.remember_sum(assignment(), ["b", "a"])
    again = Memory(tmp_path)
    assert again.peers == {"beta": OLD} and again.has_joined("aa") and not again.has_joined("bb")
    again.check_sum(assignment(attempt=2), ["a", "b"])
    with pytest.raises(PrivacyRefusal, match="summed over 2 clients"):
        again.check_sum(assignment(attempt=2), ["a", "b", "c"])


def test_other_rounds_are_other_sums(tmp_path):
    memory = Memory(tmp_path)
    memory.remember_sum(assignment(), ["a", "b"])
    memory.check_sum(assignment(round=2), ["a"])
    memory.check_sum(assignment(kind=Kind.EVALUATE), ["a"])


@pytest.mark.parametrize("changes", [{"run": "r2"}, {"run": "r2", "round": 7}, {"run": "r2", "max_weight": 9}], ids=str)
def test_a_second_run_of_the_same_work_is_the_same_update(tmp_path, changes):
    memory = Memory(tmp_path)
    memory.remember_sum(assignment(), ["a", "b", "c"])
    again = assignment(**changes).model_copy(update={"model": assignment().model})
    memory.check_sum(again, ["c", "b", "a"])
    with pytest.raises(PrivacyRefusal, match="on this model with these settings was summed over 3 clients") as refused:
        Memory(tmp_path).check_sum(again, ["a", "b"])
    assert refused.value.reason == "summed_before"


@pytest.mark.parametrize(
    "changes", [{"seed": 1}, {"mu": 0.5}, {"task": "u"}, {"model": "f" * 64}, {"kind": Kind.EVALUATE}], ids=str
)
def test_other_work_is_another_update(tmp_path, changes):
    memory = Memory(tmp_path)
    memory.remember_sum(assignment(), ["a", "b", "c"])
    memory.check_sum(assignment(run="r2").model_copy(update=changes), ["a", "b"])


@pytest.mark.parametrize("changes", [{"seed": 1}, {"model": "f" * 64}], ids=str)
def test_within_a_round_other_settings_are_no_way_around(tmp_path, changes):
    memory = Memory(tmp_path)
    memory.remember_sum(assignment(), ["a", "b", "c"])
    with pytest.raises(PrivacyRefusal, match="update of round 1 was summed over 3 clients"):
        memory.check_sum(assignment(attempt=2, **changes), ["a", "b"])


def test_of_two_runs_at_the_same_time_the_second_is_refused_where_its_sum_would_be_opened(tmp_path):
    memory = Memory(tmp_path)
    one, other = assignment(), assignment(run="r2")
    memory.check_sum(one, ["a", "b", "c"])
    memory.check_sum(other, ["a", "b"])  # nothing was opened yet
    memory.remember_sum(one, ["a", "b", "c"])
    with pytest.raises(PrivacyRefusal):
        memory.remember_sum(other, ["a", "b"])
    Memory(tmp_path).check_sum(one, ["a", "b", "c"])  # what was noted first stands


def test_the_journal_of_release_0_1_0_is_understood(tmp_path):
    (tmp_path / "journal.json").write_text('{"joined": ["aa"], "summed": {"r/1/train": ["a", "b"]}}')
    memory = Memory(tmp_path)
    memory.check_sum(assignment(), ["b", "a"])
    with pytest.raises(PrivacyRefusal, match="summed over 2 clients"):
        memory.check_sum(assignment(), ["a", "c"])
    memory.join("bb")
    with pytest.raises(PrivacyRefusal, match="summed over 2 clients"):
        Memory(tmp_path).check_sum(assignment(), ["a", "c"])


def test_a_large_cohort_takes_one_line_of_the_journal(tmp_path):
    memory = Memory(tmp_path)
    memory.remember_sum(assignment(), [f"client-{i}" for i in range(10_000)])
    assert (tmp_path / "journal.json").stat().st_size < 500


def test_a_key_is_trusted_on_first_use_and_then_for_good(tmp_path):
    memory = Memory(tmp_path)
    memory.check_peers({"beta": OLD}, Policy())
    memory.remember_peers({"beta": OLD})
    memory.check_peers({"beta": OLD, "gamma": NEW}, Policy())
    with pytest.raises(PrivacyRefusal, match=f"beta takes part with the key {fingerprint(NEW)}") as refused:
        memory.check_peers({"beta": NEW}, Policy())
    assert refused.value.reason == "changed_key"


def test_the_policy_file_stands_above_what_was_seen(tmp_path):
    memory = Memory(tmp_path)
    memory.remember_peers({"beta": OLD})
    memory.check_peers({"beta": NEW}, Policy(trusted={"beta": b64(NEW)}))
    with pytest.raises(PrivacyRefusal) as refused:
        memory.check_peers({"beta": OLD}, Policy(trusted={"beta": b64(NEW)}))
    assert refused.value.reason == "untrusted"


def test_a_site_may_take_no_new_keys(tmp_path):
    memory = Memory(tmp_path)
    memory.remember_peers({"beta": OLD})
    memory.check_peers({"beta": OLD}, Policy(accept_new=False))
    with pytest.raises(PrivacyRefusal) as refused:
        memory.check_peers({"beta": OLD, "gamma": NEW}, Policy(accept_new=False))
    assert refused.value.reason == "untrusted" and "gamma" in refused.value.detail


@pytest.mark.parametrize("name", ["peers.json", "journal.json"])
@pytest.mark.parametrize("content", ["{", "[]", '"a"', "\udcff"])
def test_a_damaged_file_stops_the_agent(tmp_path, name, content):
    (tmp_path / name).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(OperatorError, match=name):
        Memory(tmp_path)


@pytest.mark.parametrize("peers", [{"beta": "not base64"}, {"beta": 5}])
def test_a_key_file_with_other_values_stops_the_agent(tmp_path, peers):
    (tmp_path / "peers.json").write_text(json.dumps(peers))
    with pytest.raises(OperatorError, match="peers"):
        Memory(tmp_path)


def test_the_journal_does_not_grow_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(memory_module, "KEPT", 3)
    memory = Memory(tmp_path)
    for i in range(5):
        memory.join(str(i))
        memory.remember_sum(assignment(round=i + 1), ["a"])
    assert [memory.has_joined(str(i)) for i in range(5)] == [False, False, True, True, True]
    journal = json.loads((tmp_path / "journal.json").read_text())
    assert journal["joined"] == ["2", "3", "4"] and list(journal["summed"]) == ["r/3/train", "r/4/train", "r/5/train"]
    assert len(journal["computed"]) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["journal.json"]
