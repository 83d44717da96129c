"""Shamir's secret sharing over the integers modulo 2^255 - 19.

Any t of the shares rebuild the secret; fewer say nothing about it. Python's integers do not take constant time; the
secrets here live for one round and the attacker is across a network, so that is accepted.
Source: Shamir 1979, "How to share a secret", doi:10.1145/359168.359176.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

PRIME = 2**255 - 19
SECRET_BYTES = 31  # so that every string of this length is below the prime
SHARE_BYTES = 32


def split(secret: bytes, positions: Sequence[int], threshold: int, random: Callable[[int], bytes]) -> dict[int, bytes]:
    """Shares of a secret of 31 bytes, 32 bytes for each position; any `threshold` of them rebuild it.

    positions: different numbers in 1 .. PRIME - 1; 0 is where the secret lies.
    random: gives so many bytes of cryptographic randomness.
    """
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"a secret has {SECRET_BYTES} bytes, not {len(secret)}")
    if not 1 <= threshold <= len(positions):
        raise ValueError(f"{threshold} of {len(positions)} shares cannot be asked for")
    if len(set(positions)) != len(positions) or not all(0 < x < PRIME for x in positions):
        raise ValueError("positions must differ and lie in 1 .. PRIME - 1")
    coefficients = [_uniform(random) for _ in range(threshold - 1)]
    constant = int.from_bytes(secret, "big")
    shares: dict[int, bytes] = {}
    for x in positions:
        value = 0
        for coefficient in coefficients:
            value = (value + coefficient) * x % PRIME
        shares[x] = ((value + constant) % PRIME).to_bytes(SHARE_BYTES, "big")
    return shares


def combine(shares: Mapping[int, bytes]) -> bytes | None:
    """The secret of 31 bytes on which these shares lie; None when they lie on no such secret.

    All shares given are used, so give exactly as many as the threshold. A wrong share gives a wrong secret, or None:
    the caller checks the secret against what its dealer committed to.
    """
    xs = tuple(sorted(shares))
    total = 0
    for x, weight in zip(xs, weights_at_zero(xs), strict=True):
        total += parse_share(shares[x]) * weight
    total %= PRIME
    return total.to_bytes(SECRET_BYTES, "big") if total >> (8 * SECRET_BYTES) == 0 else None


def parse_share(share: bytes) -> int:
    """A share as a number; raises ValueError when it is not 32 bytes below the prime."""
    value = int.from_bytes(share, "big")
    if len(share) != SHARE_BYTES or value >= PRIME:
        raise ValueError("not a share: 32 bytes below 2^255 - 19 are one")
    return value


@lru_cache(maxsize=64)
def weights_at_zero(positions: tuple[int, ...]) -> tuple[int, ...]:
    """Lagrange's weights of these positions at 0, with one inversion for all.

    They are kept because all secrets of a round are rebuilt from the same holders: computing them costs far more than
    using them.
    """
    numerators: list[int] = []
    denominators: list[int] = []
    for x in positions:
        above = below = 1
        for other in positions:
            if other != x:
                above = above * other % PRIME
                below = below * (other - x) % PRIME
        numerators.append(above)
        denominators.append(below)
    return tuple(a * b % PRIME for a, b in zip(numerators, _inverses(denominators), strict=True))


def _inverses(values: list[int]) -> list[int]:
    """Montgomery's trick: invert the product, then peel the factors off from the end."""
    products = [1]
    for value in values:
        products.append(products[-1] * value % PRIME)
    rest = pow(products[-1], -1, PRIME)
    found: list[int] = []
    for value, before in zip(reversed(values), reversed(products[:-1]), strict=True):
        found.append(rest * before % PRIME)
        rest = rest * value % PRIME
    return found[::-1]


def _uniform(random: Callable[[int], bytes]) -> int:
    """A uniform number below the prime, by rejection: 19 in 2^255 draws are thrown away."""
    while True:
        value = int.from_bytes(random(SHARE_BYTES), "big") >> 1
        if value < PRIME:
            return value
