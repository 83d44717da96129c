import json
import time
from pathlib import Path

import numpy as np
import pytest

from murmur.clients import conversation as conversation_module
from murmur.clients import memory as memory_module
from murmur.protocol.messages import AnswerKind, Kind
from murmur.protocol.tensors import FLOATS

from .conftest import NAMES, examples_of, update_of
from .coordinator_double import MODEL, CoordinatorDouble


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(conversation_module, "PACE_S", 0.02)


@pytest.fixture
def double(tmp_path, identities):
    return lambda **options: CoordinatorDouble(tmp_path / "coordinator", identities, **options)


def weighted_sum(clients, model: Path):
    """What the unmasked sum must be: floats (D,), integers (I,), from the same updates in clear."""
    parts = []
    for floats in (True, False):
        rows = []
        for name in clients:
            update = update_of(name, model)
            flat = [update[t.name].reshape(-1) for t in MODEL.update().tensors if (t.dtype in FLOATS) is floats]
            rows.append(examples_of(name) * np.concatenate(flat).astype(np.float64 if floats else np.int64))
        parts.append(sum(rows))
    return parts


def failure(coordinator, name):
    found = coordinator.parts[name].failure
    assert found is not None, f"{name} reported nothing"
    return found


def test_a_plain_round_is_refused_before_anything_is_downloaded(double, party):
    coordinator = double(masked=False)
    party.talk(coordinator, "alpha")
    found = failure(coordinator, "alpha")
    assert found.code == "privacy_refusal:policy_plain" and "secure rounds only" in found.detail
    assert [r for r in coordinator.requests if "failure" not in r] == []
    assert party.trainers["alpha"].jobs == []


@pytest.mark.parametrize(
    ("policy", "offered", "reason"),
    [
        ({"min_clients": 5}, {}, "policy_min_clients"),
        ({"min_clients": 4}, {}, "policy_min_clients"),  # four are asked, and a sum of three could be read
        ({"min_threshold": 4}, {}, "policy_threshold"),
        ({}, {"threshold": 2}, "threshold_low"),
        ({}, {"masked": False, "kind": Kind.EVALUATE}, "policy_plain"),
    ],
    ids=str,
)
def test_the_sites_policy_has_the_last_word_before_anything_is_downloaded(double, party, policy, offered, reason):
    party.policies["alpha"] = policy
    coordinator = double(**offered)
    party.talk(coordinator, "alpha")
    assert failure(coordinator, "alpha").code == f"privacy_refusal:{reason}"
    assert [r for r in coordinator.requests if "failure" not in r and "token" not in r] == []
    assert party.trainers["alpha"].jobs == []


def test_a_task_that_is_not_installed_is_refused(double, party):
    coordinator = double(task="other")
    party.talk(coordinator, "alpha")
    assert failure(coordinator, "alpha").code == "not_allowed"
    assert "'other' is not installed at this site (installed: digits)" in failure(coordinator, "alpha").detail
    assert not any("blobs" in r for r in coordinator.requests)


def test_a_peer_whose_key_changed_is_refused_before_shares_are_dealt(double, party, identities):
    coordinator = double()
    party.site("alpha").memory.remember_peers({"beta": identities["gamma"].public_key})
    threads = party.start(coordinator)
    threads["alpha"].join(60)
    assert failure(coordinator, "alpha").code == "privacy_refusal:changed_key"
    assert AnswerKind.SHARES not in coordinator.parts["alpha"].answers
    for thread in threads.values():
        thread.join(60)
    assert coordinator.counted() == ["beta", "delta", "gamma"]


def test_keys_of_peers_are_remembered_from_the_first_round_on(double, party, identities):
    party.talk(double())
    assert party.site("alpha").memory.peers == {n: i.public_key for n, i in identities.items() if n != "alpha"}


@pytest.mark.parametrize("policy", [{"trusted": {"beta": "0000 " * 7 + "0000"}}, {"accept_new": False}], ids=str)
def test_a_peer_that_the_site_does_not_trust_is_refused(double, party, policy):
    party.policies["alpha"] = policy
    coordinator = double()
    party.talk(coordinator)
    assert failure(coordinator, "alpha").code == "privacy_refusal:untrusted"
    assert AnswerKind.SHARES not in coordinator.parts["alpha"].answers


def test_peers_that_the_site_lists_by_fingerprint_are_trusted(double, party, identities):
    trusted = {n: i.fingerprint for n, i in identities.items() if n != "alpha"}
    trusted["beta"] = identities["beta"].public_b64
    party.policies["alpha"] = {"trusted": trusted, "accept_new": False}
    coordinator = double()
    party.talk(coordinator)
    assert coordinator.counted() == sorted(NAMES)


def test_an_agent_that_restarted_does_not_take_part_a_second_time(double, party):
    coordinator = double()
    party.trainers["alpha"].hold.clear()
    party.start(coordinator)
    while AnswerKind.ADVERT not in coordinator.parts["alpha"].answers:
        time.sleep(0.01)
    coordinator.parts["alpha"].fence = 2
    coordinator.assignments["alpha"] = coordinator.assignments["alpha"].model_copy(update={"fence": 2})
    del party.sites["alpha"]  # what only lay in memory is gone
    party.talk(coordinator, "alpha")
    assert failure(coordinator, "alpha").code == "privacy_refusal:joined_before"


def test_the_same_update_is_not_summed_over_other_clients(double, party):
    party.talk(double())
    second = double(attempt=2)
    party.trainers["delta"].hold.clear()
    threads = party.start(second)
    while AnswerKind.SHARES not in second.parts["delta"].answers:
        time.sleep(0.01)
    second.leave("delta")
    for name in ("alpha", "beta", "gamma"):
        threads[name].join(60)
        assert failure(second, name).code == "privacy_refusal:summed_before"
    assert second.said(AnswerKind.AGREE) == {}


@pytest.mark.parametrize("kind", [Kind.TRAIN, Kind.EVALUATE])
@pytest.mark.parametrize("changes", [{"attempt": 2}, {"run": "run2"}, {"run": "run2", "round": 3}], ids=str)
def test_it_is_not_even_sent_where_others_would_be_in_the_sum(tmp_path, double, party, identities, kind, changes):
    """A second attempt, or a second run of the same recipe, over all but delta: the difference would be delta's."""
    party.talk(double(kind=kind))
    fewer = {name: identity for name, identity in identities.items() if name != "delta"}
    attempt = changes.get("attempt", 1)
    second = CoordinatorDouble(tmp_path / "coordinator", fewer, kind=kind, **{"attempt": attempt} | changes)
    threads = party.start(second)
    for name, thread in threads.items():
        thread.join(60)
        assert failure(second, name).code == "privacy_refusal:summed_before"
    assert second.counted() == [] and not any("complete" in r for r in second.requests)


def test_another_recipe_on_the_same_model_is_another_update(tmp_path, double, party, identities):
    party.talk(double())
    fewer = {name: identity for name, identity in identities.items() if name != "delta"}
    second = CoordinatorDouble(tmp_path / "coordinator", fewer, run="run2", seed=8)
    party.talk(second)
    assert second.totals()[1].clients == 3


def test_an_update_that_was_never_opened_may_be_summed_over_others(tmp_path, double, party, identities):
    first = double()
    first.step = lambda name, after: (  # type: ignore[method-assign]
        None if after == "survivors" else CoordinatorDouble.step(first, name, after)
    )
    threads = party.start(first)
    while len(first.said(AnswerKind.AGREE)) < 4:
        time.sleep(0.01)
    for name in threads:
        first.end(name, "the attempt was given up")
    del first.step
    for thread in threads.values():
        thread.join(60)
    fewer = {name: identity for name, identity in identities.items() if name != "delta"}
    second = CoordinatorDouble(tmp_path / "coordinator", fewer, attempt=2)
    party.talk(second)
    assert second.totals()[1].clients == 3


def test_the_journal_is_on_disk_before_the_reveal_leaves(double, party):
    coordinator, seen = double(), []

    def take(name, kind, text):
        if kind is AnswerKind.REVEAL:
            seen.append(name)
            on_disk = json.loads((party.site(name).settings.workdir / "journal.json").read_text())
            assert list(on_disk["summed"]) == ["run1/1/train"]
        CoordinatorDouble._take_answer(coordinator, name, kind, text)

    coordinator._take_answer = take
    party.talk(coordinator)
    assert sorted(seen) == sorted(NAMES) and coordinator.totals()[1].clients == 4


def test_what_cannot_be_noted_is_not_revealed(double, party, monkeypatch):
    def write(path, values):
        if values.get("summed"):
            raise OSError(28, "No space left on device")
        (path).write_text(json.dumps(values))

    monkeypatch.setattr(memory_module, "_write", write)
    coordinator = double()
    party.talk(coordinator)
    assert len(coordinator.said(AnswerKind.AGREE)) == 4 and coordinator.said(AnswerKind.REVEAL) == {}


def test_the_same_update_may_be_summed_again_over_the_same_clients(double, party):
    party.talk(double())
    second = double(attempt=2)
    party.talk(second)
    assert second.totals()[1].clients == 4
