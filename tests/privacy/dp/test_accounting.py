"""The accounting against published figures, and against what must hold of any accountant."""

import json
import math
import random
import subprocess
import sys

import pytest

from murmur.privacy.dp.accounting import Accountant, Epsilon, Event, epsilon, rounds_within
from murmur.protocol.errors import OperatorError


def value(events: list[Event], delta: float = 1e-5, accountant: Accountant = "rdp") -> float:
    return epsilon(events, delta, accountant, unit="client").value


@pytest.mark.parametrize(
    ("event", "delta", "pld", "rdp"),
    [  # dp-accounting 0.6; Opacus' PRV accountant agrees on the Poisson ones to three digits
        (Event(noise_multiplier=1.0, sampling="poisson", rate=0.01, count=1000), 1e-5, 1.828244, 2.101367),
        (Event(noise_multiplier=2.0, sampling="poisson", rate=0.1, count=200), 1e-6, 3.805876, 4.117568),
        (Event(noise_multiplier=1.0), 1e-5, 4.377178, 4.728507),
        (Event(noise_multiplier=10.0, count=100), 1e-5, 4.377178, 4.728507),
        (Event(noise_multiplier=4.0, count=50), 1e-3, 6.452429, 7.183680),
    ],
)
def test_epsilon_is_the_published_one(event: Event, delta: float, pld: float, rdp: float):
    assert value([event], delta, "pld") == pytest.approx(pld, abs=2e-4)  # one bin of the loss, and its rounding
    assert value([event], delta) == pytest.approx(rdp, abs=2e-6)


@pytest.mark.slow
def test_the_long_mnist_example_is_the_published_one():
    event = Event(noise_multiplier=1.1, sampling="poisson", rate=256 / 60000, count=14040)
    assert value([event], 1e-5, "pld") == pytest.approx(2.379644, abs=2e-4)
    assert value([event]) == pytest.approx(2.594363, abs=2e-6)


def test_a_fixed_choice_costs_what_twice_its_sensitivity_does():
    event = Event(
        noise_multiplier=2.0, sampling="without_replacement", taken=100, of=10_000, relation="replace", count=1000
    )
    assert value([event]) == pytest.approx(3.576111, abs=2e-6)  # the published one of noise 1 relative to 2 C


def test_both_accountants_mean_the_same_by_replacing_one():
    event = Event(noise_multiplier=10.0, count=100, relation="replace")
    half = Event(noise_multiplier=5.0, count=100)
    assert value([event]) == pytest.approx(value([half]))
    assert value([event], accountant="pld") == pytest.approx(value([half], accountant="pld"), abs=2e-4)
    assert value([event], accountant="pld") == pytest.approx(9.9973, abs=2e-3)


def test_without_sampling_pld_is_the_closed_form():
    """delta(eps) = Phi(mu/2 - eps/mu) - e^eps Phi(-mu/2 - eps/mu): Balle and Wang 2018, theorem 8."""

    def normal(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    for z, count in ((0.8, 1), (3.0, 20), (20.0, 7)):
        mu = math.sqrt(count) / z
        found = value([Event(noise_multiplier=z, count=count)], accountant="pld")
        delta = normal(mu / 2 - found / mu) - math.exp(found) * normal(-mu / 2 - found / mu)
        assert delta == pytest.approx(1e-5, rel=2e-3)


def test_epsilon_grows_with_use_and_rate_and_falls_with_noise():
    base = {"noise_multiplier": 2.0, "sampling": "poisson", "rate": 0.1, "count": 100}
    for name, rising in {
        "count": (50, 100, 200),
        "rate": (0.05, 0.1, 0.2),
        "noise_multiplier": (4.0, 2.0, 1.0),
    }.items():
        found = [value([Event(**(base | {name: v}))]) for v in rising]
        assert found == sorted(found) and len(set(found)) == 3, name


def test_pld_is_never_above_rdp():
    for event in (Event(noise_multiplier=3.0, count=9), Event(noise_multiplier=1.5, sampling="poisson", rate=0.2)):
        assert value([event], accountant="pld") <= value([event])


def test_a_ledger_in_any_order_and_any_cut_is_one_composition():
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rows = [Event(noise_multiplier=z) for z in (1.5, 2.0, 2.0, 3.0)]
    rows += [Event(noise_multiplier=1.5, sampling="poisson", rate=q) for q in (0.1, 0.1, 0.3)]
    whole = value(rows)
    random.Random(seed).shuffle(rows)
    assert value(rows) == whole
    joined = [Event(noise_multiplier=2.0, count=2), Event(noise_multiplier=1.5, sampling="poisson", rate=0.1, count=2)]
    joined += [Event(noise_multiplier=z) for z in (3.0, 1.5)]
    joined += [Event(noise_multiplier=1.5, sampling="poisson", rate=0.3)]
    assert value(joined) == pytest.approx(whole, rel=1e-12)


def test_without_sampling_only_uses_over_squared_noise_count():
    assert value([Event(noise_multiplier=2.0, count=4)]) == pytest.approx(value([Event(noise_multiplier=1.0)]))
    mixed = [Event(noise_multiplier=2.0, count=2), Event(noise_multiplier=4.0, count=8)]  # 2/4 + 8/16 = 1
    assert value(mixed) == pytest.approx(value([Event(noise_multiplier=1.0)]))


def test_poisson_at_rate_one_is_no_sampling():
    assert value([Event(noise_multiplier=2.0, sampling="poisson", count=5)]) == value(
        [Event(noise_multiplier=2.0, count=5)]
    )


def test_an_empty_ledger_costs_nothing_and_one_without_noise_everything():
    assert value([]) == 0
    silent = epsilon([Event(noise_multiplier=0.0), Event(noise_multiplier=1.0)], 1e-5, unit="example")
    assert silent.value == math.inf
    assert silent.to_json()["value"] is None and Epsilon.from_json(silent.to_json()) == silent


def test_the_rounds_that_fit_are_the_most_that_fit():
    event, budget = Event(noise_multiplier=4.0), 5.0
    n = rounds_within(event, budget, 1e-5, most=1000)
    assert value([Event(noise_multiplier=4.0, count=n)]) <= budget < value([Event(noise_multiplier=4.0, count=n + 1)])
    spent = [Event(noise_multiplier=4.0, count=n - 2)]
    assert rounds_within(event, budget, 1e-5, most=1000, spent=spent) == 2
    assert rounds_within(event, budget, 1e-5, most=3) == 3
    assert rounds_within(event, 0.01, 1e-5, most=3) == 0


def test_an_epsilon_says_what_it_rests_on():
    found = epsilon(
        [Event(noise_multiplier=2.0, sampling="poisson", rate=0.1)], 1e-6, "pld", unit="client", assumptions=["honest"]
    )
    assert (found.delta, found.unit, found.accountant) == (1e-6, "client", "pld")
    assert found.assumptions == (
        "honest",
        "neighbours differ in one client's whole participation: present or absent",
        "who was sampled stays secret, also from those who are sampled",
    )


def test_an_event_comes_back_from_its_row():
    for event in (
        Event(noise_multiplier=2.5),
        Event(noise_multiplier=1.0, sampling="poisson", rate=0.25, count=7),
        Event(noise_multiplier=1.0, sampling="without_replacement", taken=3, of=9, relation="replace"),
    ):
        assert Event.from_json(json.loads(json.dumps(event.to_json()))) == event
    assert Event(noise_multiplier=2.5).to_json() == {"kind": "gaussian", "noise_multiplier": 2.5, "count": 1}
    with pytest.raises(ValueError, match="laplace"):
        Event.from_json({"kind": "laplace", "noise_multiplier": 1.0})


@pytest.mark.parametrize(
    "wrong",
    [
        {"noise_multiplier": -1.0},
        {"noise_multiplier": math.nan},
        {"noise_multiplier": 1.0, "count": 0},
        {"noise_multiplier": 1.0, "rate": 0.5},
        {"noise_multiplier": 1.0, "sampling": "poisson", "rate": 0.0},
        {"noise_multiplier": 1.0, "sampling": "without_replacement", "taken": 5, "of": 4, "relation": "replace"},
        {"noise_multiplier": 1.0, "sampling": "without_replacement", "taken": 4, "of": 5},
        {"noise_multiplier": 1.0, "taken": 4, "of": 5},
    ],
)
def test_an_event_that_makes_no_sense_is_refused(wrong: dict):
    with pytest.raises(ValueError):
        Event(**wrong)


def test_what_an_accountant_cannot_take_is_refused_in_words():
    fixed = Event(noise_multiplier=1.0, sampling="without_replacement", taken=1, of=9, relation="replace")
    with pytest.raises(OperatorError, match="rdp"):
        value([fixed], accountant="pld")
    with pytest.raises(OperatorError, match="pld"):
        value([Event(noise_multiplier=1.0, sampling="poisson", rate=0.5, relation="replace")])
    with pytest.raises(OperatorError, match="one neighbouring relation"):
        value([fixed, Event(noise_multiplier=1.0)])
    with pytest.raises(OperatorError, match="delta"):
        value([], delta=0.0)


def test_the_slow_library_is_imported_for_an_epsilon_only_and_stays_quiet():
    code = """if True:
        import sys
        from murmur.privacy.dp.accounting import Event, epsilon
        assert "dp_accounting" not in sys.modules and "scipy" not in sys.modules
        epsilon([Event(noise_multiplier=0.3, sampling="poisson", rate=0.9, count=5000)], 1e-5, unit="client")
        assert "dp_accounting" in sys.modules
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
