"""Conversations about rounds with local differential privacy: what is charged when, and what is not told."""

from __future__ import annotations

import threading
import time

import pytest

from murmur.clients import conversation as conversation_module
from murmur.clients.link import Link
from murmur.protocol.errors import OperatorError, TooLate, Unavailable
from murmur.protocol.messages import Kind
from murmur.protocol.sections import Dp, Train

from .conftest import NAMES, FakeTrainer
from .coordinator_double import CoordinatorDouble

LOCAL = Dp(mode="local", noise_multiplier=1.0)
PLAIN = {"require_secure": False}


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(conversation_module, "PACE_S", 0.02)


@pytest.fixture
def double(tmp_path, identities):
    return lambda **options: CoordinatorDouble(tmp_path / "coordinator", identities, **{"dp": LOCAL} | options)


def charges(party, name="alpha"):
    return [(c.state, c.event.count) for c in party.site(name).ledger.charges()]


def test_a_round_is_charged_by_each_site_and_tells_no_metrics(double, party):
    coordinator = double(train=Train(batch_size=20))
    party.talk(coordinator)
    for name in NAMES:
        inspected, trained = party.trainers[name].jobs
        examples = 100 * (NAMES.index(name) + 1)
        assert (inspected.kind, trained.kind, trained.expected) == ("inspect", "train", examples)
        assert trained.dp == LOCAL
        (charge,) = party.site(name).ledger.charges()
        # The fake says that it took 5 steps, and that is what is settled.
        assert (charge.state, charge.event.count, charge.event.rate) == ("left", 5, 20 / examples)
    _, totals = coordinator.totals()
    assert totals.weight == 1000
    assert all(count == 0 for _, count in totals.metrics.values())


def test_a_site_may_share_metrics(double, party):
    coordinator = double(masked=False)
    party.policies = {"alpha": PLAIN, "beta": PLAIN | {"share_metrics": True}}
    party.talk(coordinator, "alpha", "beta")
    assert coordinator.parts["alpha"].complete.metrics == {}
    assert coordinator.parts["beta"].complete.metrics.keys() == {"train_loss", "loss", "accuracy"}


def test_an_evaluation_that_would_tell_nothing_is_not_made(double, party):
    coordinator = double(masked=False, kind=Kind.EVALUATE)
    party.policies = {"alpha": PLAIN, "beta": PLAIN | {"share_metrics": True}}
    party.talk(coordinator, "alpha", "beta")
    assert party.trainers["alpha"].jobs == [] and len(party.trainers["beta"].jobs) == 1
    assert coordinator.parts["alpha"].complete.metrics == {}
    assert charges(party) == charges(party, "beta") == []


def test_a_training_beyond_the_budget_does_not_begin(double, party):
    # 100 examples in batches of 32: 4 steps with probability 0.32 at z = 1 are an epsilon of 4.98.
    coordinator = double(masked=False)
    party.policies = {"alpha": PLAIN | {"epsilon": 1.0}}
    party.talk(coordinator, "alpha")
    failure = coordinator.parts["alpha"].failure
    assert failure.code == "privacy_refusal:policy_epsilon" and "allows 1" in failure.detail
    assert [job.kind for job in party.trainers["alpha"].jobs] == ["inspect"]
    assert charges(party) == [] and not coordinator.parts["alpha"].received


def test_a_run_without_noise_is_refused_before_the_download(double, party):
    coordinator = double(masked=False, dp=Dp())
    party.policies = {"alpha": PLAIN | {"require_dp": True}}
    party.talk(coordinator, "alpha")
    assert coordinator.parts["alpha"].failure.code == "privacy_refusal:policy_dp"
    assert not [line for line in coordinator.requests if "models" in line]


def test_what_leaves_is_on_the_ledger_before_its_first_byte(double, party, monkeypatch):
    coordinator = double(masked=False)
    party.policies = {"alpha": PLAIN}
    seen = []
    for name in ("upload", "complete"):
        real = getattr(Link, name)

        def watched(self, *arguments, real=real, **options):
            seen.append(charges(party))
            return real(self, *arguments, **options)

        monkeypatch.setattr(Link, name, watched)
    party.talk(coordinator, "alpha")
    assert len(seen) >= 1 and all(found == [("left", 5)] for found in seen)


def test_a_training_that_failed_costs_nothing(double, party):
    coordinator = double(masked=False)
    party.policies = {"alpha": PLAIN}
    trainer = party.trainers["alpha"]
    run = trainer.run

    def fails(job, on_progress):
        if job.kind == "train":
            assert charges(party) == [("reserved", 4)]
            raise OperatorError("the disk with the scans is gone")
        return run(job, on_progress)

    trainer.run = fails
    party.talk(coordinator, "alpha")
    assert charges(party) == [("void", 4)]


def test_a_stopped_agent_keeps_its_reservation_and_the_same_work_is_charged_once(double, party):
    coordinator = double(masked=False)
    party.policies = {"alpha": PLAIN}
    conversation = party.conversation(coordinator, "alpha")
    trainer = party.trainers["alpha"]
    real, training = FakeTrainer.run, threading.Event()

    def slow(self, job, on_progress):
        if job.kind == "train":
            self.hold.clear()
            training.set()
        return real(self, job, on_progress)

    trainer.run = slow.__get__(trainer)
    thread = threading.Thread(target=conversation.run, daemon=True)
    thread.start()
    assert training.wait(60)
    coordinator.parts["alpha"].gone = ""
    conversation._link.fail = _unreachable
    conversation.cancel(Unavailable("the agent is stopping"))
    thread.join(60)
    assert charges(party) == [("reserved", 4)]
    trainer.hold.set()
    del trainer.run, party.sites["alpha"]
    party.talk(coordinator, "alpha")
    assert charges(party) == [("void", 4), ("left", 5)]


def _unreachable(*_, **__):
    raise Unavailable("nobody there")


def test_a_round_that_went_on_without_a_trained_update_costs_nothing(double, party):
    coordinator = double()  # the other three never come, so that nothing can be sent
    conversation = party.conversation(coordinator, "alpha")
    thread = threading.Thread(target=conversation.run, daemon=True)
    thread.start()
    until = time.monotonic() + 60
    while [job.kind for job in party.trainers["alpha"].jobs] != ["inspect", "train"]:
        assert time.monotonic() < until
        time.sleep(0.01)
    conversation.cancel(TooLate("the others did not come"))
    thread.join(60)
    assert charges(party) == [("void", 4)]
