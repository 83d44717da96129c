"""Secret sharing: exact for every set of holders, silent below the threshold."""

import itertools
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from murmur.privacy import shamir
from murmur.privacy.shamir import PRIME, combine, split, weights_at_zero


@settings(max_examples=40, deadline=None)
@given(data=st.data(), n=st.integers(1, 12), secret=st.binary(min_size=31, max_size=31))
def test_any_threshold_of_shares_rebuilds_the_secret(data, n, secret):
    threshold = data.draw(st.integers(1, n))
    shares = split(secret, range(1, n + 1), threshold, os.urandom)
    chosen = data.draw(st.permutations(range(1, n + 1)))[:threshold]
    assert combine({x: shares[x] for x in chosen}) == secret


def test_extreme_secrets_survive():
    for secret in (bytes(31), b"\xff" * 31):
        shares = split(secret, [1, 2, 3], 2, os.urandom)
        for pair in itertools.combinations((1, 2, 3), 2):
            assert combine({x: shares[x] for x in pair}) == secret


def test_one_share_too_few_leaves_every_secret_possible():
    """t - 1 shares and any candidate secret lie on a polynomial: the holders cannot rule out a single one."""
    threshold = 4
    shares = split(b"s" * 31, range(1, 7), threshold, os.urandom)
    known = {x: int.from_bytes(shares[x], "big") for x in (1, 3, 6)}
    for candidate in (0, 1, int.from_bytes(b"s" * 31, "big"), PRIME - 1):
        points = {0: candidate} | known
        for x in (2, 4, 5):  # Lagrange through the candidate gives each missing share a value below the prime
            value = 0
            for xi, yi in points.items():
                term = yi
                for xj in points:
                    if xj != xi:
                        term = term * (x - xj) * pow(xi - xj, -1, PRIME) % PRIME
                value = (value + term) % PRIME
            forged = {y: shares[y] for y in known} | {x: value.to_bytes(32, "big")}
            total = sum(
                int.from_bytes(share, "big") * w
                for share, w in zip(
                    (forged[y] for y in sorted(forged)), weights_at_zero(tuple(sorted(forged))), strict=True
                )
            )
            assert total % PRIME == candidate


def test_the_shares_of_t_minus_one_holders_do_not_rebuild_the_secret():
    shares = split(b"s" * 31, range(1, 7), 4, os.urandom)
    for few in itertools.combinations(range(1, 7), 3):
        assert combine({x: shares[x] for x in few}) != b"s" * 31


def test_weights_are_lagranges_at_zero():
    assert weights_at_zero((1, 2)) == (2, PRIME - 1)  # f(0) = 2 f(1) - f(2)
    assert weights_at_zero((1, 2, 3)) == (3, PRIME - 3, 1)  # f(0) = 3 f(1) - 3 f(2) + f(3)


def test_known_polynomial_gives_known_shares():
    """f(x) = 5 + 7 x + 11 x^2, with the highest coefficient drawn first."""
    draws = iter((11, 7))
    shares = split((5).to_bytes(31, "big"), [1, 2, 3], 3, lambda size: (next(draws) << 1).to_bytes(size, "big"))
    assert [int.from_bytes(s, "big") for s in shares.values()] == [23, 63, 125]


def test_a_coefficient_beyond_the_prime_is_drawn_again():
    draws = iter((PRIME, PRIME + 18, 3))
    shares = split(bytes(31), [1], 1, os.urandom)
    assert shares[1] == bytes(32)
    shares = split(bytes(31), [1, 2], 2, lambda size: (next(draws) << 1).to_bytes(size, "big"))
    assert [int.from_bytes(s, "big") for s in shares.values()] == [3, 6]


def test_shares_on_no_secret_combine_to_none():
    assert combine({1: (PRIME - 1).to_bytes(32, "big")}) is None


@pytest.mark.parametrize(
    ("secret", "positions", "threshold"),
    [
        (b"short", [1, 2], 2),
        (bytes(32), [1, 2], 2),
        (bytes(31), [0, 1], 2),  # the secret itself lies at 0
        (bytes(31), [1, 1], 2),
        (bytes(31), [1, PRIME], 2),
        (bytes(31), [1, 2], 0),
        (bytes(31), [1, 2], 3),
    ],
)
def test_splits_that_would_leak_or_fail_are_errors(secret, positions, threshold):
    with pytest.raises(ValueError, match=r"."):
        split(secret, positions, threshold, os.urandom)


@pytest.mark.parametrize("share", [b"", bytes(31), bytes(33), PRIME.to_bytes(32, "big"), b"\xff" * 32])
def test_what_is_no_share_is_not_read_as_one(share):
    with pytest.raises(ValueError, match="not a share"):
        shamir.parse_share(share)
