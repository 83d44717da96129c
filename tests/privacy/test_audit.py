"""The bound that canaries prove: values that can be worked out by hand, and that it does not claim too much."""

import math

import numpy as np
import pytest

from murmur.privacy.audit import audit, count_correct, lower_bound, p_value


@pytest.mark.parametrize("r", [5, 10, 200, 1000])
def test_with_every_guess_right_and_no_delta_the_bound_is_that_of_randomized_response(r):
    """q^r = beta for q = e^epsilon / (1 + e^epsilon), so epsilon = ln(q / (1 - q)): 1.05 for 10, 4.19 for 200."""
    q = 0.05 ** (1 / r)
    assert lower_bound(r, r, r, delta=0.0, beta=0.05) == pytest.approx(max(0, math.log(q / (1 - q))), abs=2e-6)


def test_the_tail_is_the_binomials():
    """Three coins and epsilon = ln 3, so q = 3/4: of 3 guesses 2 or more are right with 27/64 + 27/64."""
    assert p_value(3, 3, 2, epsilon=math.log(3), delta=0.0) == pytest.approx(54 / 64)
    assert p_value(3, 3, 3, epsilon=math.log(3), delta=0.0) == pytest.approx(27 / 64)
    assert p_value(3, 3, 0, epsilon=math.log(3), delta=0.0) == pytest.approx(1.0)


def test_delta_adds_what_the_theorem_says():
    """With epsilon = 0 and v = r = 2: P[2 > W >= 1] = 1/2 and P[2 > W >= 0] = 3/4, so alpha = max(1, 3/4) = 1.

    Of m = 10 coins and delta = 0.01 that is 1/4 + 0.01 * 10 * 1.
    """
    assert p_value(10, 2, 2, epsilon=0.0, delta=0.01) == pytest.approx(0.25 + 0.1)
    assert p_value(10, 2, 0, epsilon=0.0, delta=0.01) == 1.0
    assert p_value(10**6, 2, 2, epsilon=0.0, delta=0.01) == 1.0  # a probability


def test_a_later_maximum_of_alpha_is_found():
    """W ~ Binomial(4, 1/2) and v = 4: P[W = 3] = 4/16 for i = 1, P[4 > W >= 2] = 10/16 for i = 2, which is more."""
    assert p_value(4, 4, 4, epsilon=0.0, delta=0.01) == pytest.approx(1 / 16 + 0.01 * 4 * 2 * (10 / 16) / 2)


def test_the_bound_is_where_the_p_value_is_beta():
    for m, r, v, delta in ((500, 200, 170, 1e-5), (500, 500, 300, 1e-4), (60, 40, 33, 0.0)):
        epsilon = lower_bound(m, r, v, delta=delta, beta=0.05)
        assert epsilon > 0
        assert p_value(m, r, v, epsilon=epsilon, delta=delta) == pytest.approx(0.05, rel=1e-3)


def test_a_larger_delta_or_confidence_and_fewer_right_guesses_prove_less():
    bounds = [
        [lower_bound(500, 200, 180, delta=d, beta=0.05) for d in (0.0, 1e-6, 1e-5, 1e-4, 1e-3)],
        [lower_bound(500, 200, 180, delta=1e-5, beta=b) for b in (0.3, 0.1, 0.05, 0.01)],
        [lower_bound(500, 200, v, delta=1e-5, beta=0.05) for v in (200, 190, 150, 120)],
    ]
    for found in bounds:
        assert found == sorted(found, reverse=True)
        assert found[0] > found[-1] > 0


def test_guesses_no_better_than_a_coins_prove_nothing():
    for v in (0, 50, 57):
        assert lower_bound(100, 100, v, delta=1e-5, beta=0.05) == 0.0


def test_the_highest_are_said_to_be_in_and_the_lowest_out():
    scores, coins = np.array([3.0, -1.0, 0.0, 2.0, 1.0]), np.array([True, False, True, True, False])
    assert count_correct(scores, coins, 2) == 2  # 3.0 in, -1.0 out
    assert count_correct(scores, coins, 3) == 3  # 2.0 in too
    assert count_correct(scores, coins, 5) == 3  # 1.0 in and 0.0 out are wrong
    assert count_correct(scores, ~coins, 4) == 1


def test_an_audit_takes_the_best_number_of_guesses_and_pays_for_the_choice():
    coins = np.arange(160) % 2 == 0
    scores = np.where(coins, 1.0, -1.0) * (np.arange(160) >= 80)  # 80 canaries say nothing, 80 say everything
    found = audit(scores, coins, delta=0.0)
    assert (found.guesses, found.correct, found.tries) == (80, 80, 4)
    assert found.epsilon == lower_bound(160, 80, 80, delta=0.0, beta=0.05 / 4)
    only = audit(scores, coins, delta=0.0, guesses=(80,))
    assert only.epsilon == lower_bound(160, 80, 80, delta=0.0, beta=0.05) > found.epsilon


def test_randomized_response_is_not_refuted_more_often_than_the_confidence_allows():
    """The audited mechanism is exactly epsilon-DP and its output the best score: of 400 audits at 90 %, 40 may err.

    The bound must also be worth something: of half of them it is above 0.6 of the truth.
    """
    seed, epsilon, m = 20_251, 1.5, 400
    print("seed", seed)
    rng, bounds = np.random.default_rng(seed), []
    for _ in range(400):
        coins = rng.random(m) < 0.5
        told = np.where(rng.random(m) < 1 / (1 + math.exp(-epsilon)), coins, ~coins)
        scores = told + rng.random(m) / 2  # ties are broken by chance, not by place
        bounds.append(audit(scores, coins, delta=0.0, confidence=0.9, guesses=(m // 2,)).epsilon)
    assert np.mean(np.array(bounds) > epsilon) <= 0.1
    assert np.median(bounds) > 0.6 * epsilon


def test_what_cannot_be_is_an_error():
    with pytest.raises(ValueError, match="right of"):
        p_value(10, 5, 6, epsilon=1.0, delta=0.0)
    with pytest.raises(ValueError, match="between 0 and 1"):
        lower_bound(10, 5, 5, delta=0.0, beta=0.0)
    with pytest.raises(ValueError, match="guesses of"):
        count_correct(np.zeros(3), np.zeros(3, bool), 4)
    for scores in (np.zeros(4), np.array([0.0, np.nan, 1.0])):
        with pytest.raises(ValueError, match="finite score"):
            audit(scores, np.zeros(3, bool), delta=0.0)
