"""The site's ledger: what it adds up to, what it refuses, and what a kill leaves of it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest

from murmur.clients.ledger import FILE, Ledger, best, spent, training_event
from murmur.clients.policy import check_assignment
from murmur.clients.settings import Policy, TaskEntry, parse_settings, write_settings
from murmur.privacy.dp.accounting import Event
from murmur.protocol.errors import OperatorError, PrivacyRefusal
from murmur.protocol.messages import Assignment, Kind
from murmur.protocol.sections import Dp, Train

from ..command import murmur

# 50 uses without sampling at z = 4: epsilon 6.452429 (PLD) and 7.183680 (RDP) at delta 1e-3
HALF = Event(noise_multiplier=4.0, sampling="poisson", rate=1.0, count=25)
BOUND = Policy(epsilon=6.46, delta=1e-3)  # above PLD's, below RDP's
LOCAL = Dp(mode="local")


def assignment(number=1, run="r", **changes):
    values = {
        "id": f"{run}.{number}.1.a", "fence": 1, "run": run, "round": number, "attempt": 1, "kind": Kind.TRAIN,
        "task": "digits", "model": "0" * 64, "model_bytes": 1, "train": Train(), "mu": 0, "weighting": "uniform",
        "max_weight": 1, "metrics": (), "seed": 0, "patience_s": 1, "secure": None, "dp": LOCAL,
    }  # fmt: skip
    return Assignment.model_validate(values | changes)


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / FILE)


def states(ledger):
    return [charge.state for charge in ledger.charges()]


@pytest.mark.parametrize(
    ("z", "batch", "examples", "steps", "delta", "pld"),
    [
        (1.0, 10, 1000, 1000, 1e-5, 1.828244),
        (1.1, 256, 60_000, 14_040, 1e-5, 2.379644),
        (2.0, 20, 200, 200, 1e-6, 3.805876),
        (4.0, 64, 63, 50, 1e-3, 6.452429),
    ],
)
def test_published_epsilons_come_out_of_a_ledger_of_many_rows(z, batch, examples, steps, delta, pld, ledger):
    per_epoch = -(-examples // batch)
    epochs, rest = divmod(steps, per_epoch)
    event = training_event(Train(batch_size=batch), Dp(mode="local", noise_multiplier=z), examples)
    assert (event.count, event.rate) == (per_epoch, min(1, batch / examples))
    for number in range(min(epochs, 3)):  # the first rounds one by one, the others as one long training
        count = per_epoch * (1 if number < 2 else epochs - 2)
        ledger.leaves(ledger.reserve(assignment(number + 1), "all", replace(event, count=count), Policy()), count)
    if rest:
        ledger.reserve(assignment(99), "all", replace(event, count=rest), Policy())
    found = spent(ledger.charges(), delta)
    assert sum(c.event.count for c in ledger.charges()) == steps
    assert found.value == pytest.approx(pld, abs=2e-5)
    assert (found.unit, found.delta, found.accountant) == ("example", delta, "pld")


def test_a_budget_is_refused_before_it_breaks_and_holds_across_runs(ledger, tmp_path):
    ledger.leaves(ledger.reserve(assignment(1, "one"), "all", HALF, BOUND), 25)
    ledger = Ledger(tmp_path / FILE)
    ledger.reserve(assignment(1, "two"), "all", HALF, BOUND)  # 6.4524, though RDP alone says 7.18
    with pytest.raises(PrivacyRefusal, match=r"spent an epsilon of 6\.\d+ at delta 0.001, and this site allows 6.46"):
        ledger.reserve(assignment(2, "two"), "all", replace(HALF, count=1), BOUND)
    assert states(ledger) == ["left", "reserved"]
    ledger.reserve(assignment(2, "two"), "other patients", HALF, BOUND)  # a budget of its own
    with pytest.raises(PrivacyRefusal, match="an epsilon of inf"):
        ledger.reserve(assignment(3), "noiseless", replace(HALF, noise_multiplier=0.0), BOUND)


def test_what_was_reserved_is_settled_for_the_steps_taken_or_given_back(ledger):
    first, second = (ledger.reserve(assignment(n), "all", HALF, Policy()) for n in (1, 2))
    ledger.leaves(first, 20)
    ledger.release(first)  # too late: it has left
    ledger.release(second)
    assert [(c.state, c.event.count) for c in ledger.charges()] == [("left", 20), ("void", 25)]
    assert spent(ledger.charges(), 1e-3).value == best([replace(HALF, count=20)], 1e-3).value
    with pytest.raises(PrivacyRefusal, match="given up"):
        ledger.leaves(second, 25)


def test_the_same_assignment_again_replaces_what_did_not_leave_and_adds_to_what_did(ledger):
    first = ledger.reserve(assignment(), "all", HALF, BOUND)
    second = ledger.reserve(assignment(), "all", replace(HALF, count=30), BOUND)
    assert states(ledger) == ["void", "reserved"] and ledger.charged(assignment()) == second
    with pytest.raises(PrivacyRefusal):  # the first hold is still about and would deliver
        ledger.leaves(first, 25)
    ledger.leaves(second, 30)
    ledger.leaves(second, 30)  # the same update, sent again after a restart
    third = ledger.reserve(assignment(), "all", replace(HALF, count=20), BOUND)  # trained anew: other noise
    assert states(ledger) == ["void", "left", "reserved"] and ledger.charged(assignment()) == third
    with pytest.raises(PrivacyRefusal):
        ledger.reserve(assignment(2), "all", HALF, BOUND)


def test_a_killed_agent_finds_what_it_had_reserved(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path; from murmur.clients.ledger import *\n"
        "from murmur.clients.settings import Policy; from murmur.protocol.messages import Assignment\n"
        "a = Assignment.model_validate_json(sys.argv[2])\n"
        "Ledger(Path(sys.argv[1])).reserve(a, 'all', training_event(a.train, a.dp, 320), Policy())\n"
        "assert not {'torch', 'dp_accounting', 'scipy'} & set(sys.modules)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / FILE, assignment().model_dump_json()], check=False)
    assert done.returncode == -9
    (charge,) = Ledger(tmp_path / FILE).charges()
    assert (charge.state, charge.event.count, charge.event.rate) == ("reserved", 10, 0.1)


def test_a_ledger_that_cannot_be_read_stops_the_agent(tmp_path):
    (tmp_path / FILE).write_bytes(b"not a database" * 100)
    with pytest.raises(OperatorError, match="Restore it"):
        Ledger(tmp_path / FILE)


# The policy


def test_a_site_that_requires_differential_privacy_refuses_runs_without(ledger):
    for policy in (Policy(require_dp=True, require_secure=False), Policy(epsilon=3, require_secure=False)):
        check_assignment(assignment(), me="a", policy=policy, tasks=["digits"])
        for dp in (Dp(), Dp(mode="central"), Dp(mode="distributed")):
            with pytest.raises(PrivacyRefusal) as refused:
                check_assignment(assignment(dp=dp), me="a", policy=policy, tasks=["digits"])
            assert refused.value.reason == "policy_dp"


def test_tasks_share_one_budget_unless_the_site_says_that_their_data_are_others():
    assert TaskEntry(reference="a:B").dataset == TaskEntry(reference="c:D").dataset == "all"


# The command


def command(folder, *options):
    return murmur("client", "ledger", "--dir", folder, *options).out


def test_the_command_prints_each_data_sets_epsilon_with_what_it_rests_on(tmp_path):
    policy = {"epsilon": 8.0, "delta": 1e-3}
    write_settings(parse_settings({"name": "a", "coordinator": "https://x:1", "policy": policy}, tmp_path))
    assert "No training" in command(tmp_path)
    ledger = Ledger(tmp_path / FILE)
    ledger.leaves(ledger.reserve(assignment(1), "xrays", HALF, Policy()), 25)
    ledger.reserve(assignment(2, "s"), "xrays", HALF, Policy())
    ledger.release(ledger.reserve(assignment(3), "xrays", HALF, Policy()))
    ledger.reserve(assignment(4), "bare", replace(HALF, noise_multiplier=0.0), Policy())
    bare, xrays = json.loads(command(tmp_path, "--json"))
    assert (bare["dataset"], bare["epsilon"]["value"]) == ("bare", None)
    assert math.isclose(xrays["epsilon"]["value"], 6.452429, abs_tol=2e-5)
    assert (xrays["epsilon"]["unit"], xrays["epsilon"]["delta"], xrays["budget"]) == ("example", 1e-3, 8.0)
    assert any("present or absent" in said for said in xrays["epsilon"]["assumptions"])
    assert (xrays["trainings"], xrays["reserved"], xrays["steps"], xrays["runs"]) == (2, 1, 50, ["r", "s"])
    text = command(tmp_path)
    assert "6.45" in text and "unbounded" in text and "per training example" in text
