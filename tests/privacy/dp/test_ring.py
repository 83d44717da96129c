"""Clipped updates as integers: their bound, their noise, and that no sum wraps around."""

import math
import os
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from murmur.privacy.dp.mechanisms import TAIL, Noise, l2_norm
from murmur.privacy.dp.ring import BIT, DpQuantizer, Encoding, encoding_of
from murmur.protocol.errors import OperatorError
from murmur.protocol.sections import Dp


def dp(**values: float | str | bool) -> Dp:
    return Dp(**{"mode": "central", "clip_norm": 2.0, "noise_multiplier": 1.0} | values)


def words_of(update: np.ndarray, encoding: Encoding, key: bytes = bytes(32)) -> np.ndarray:
    out = np.empty(len(update), np.uint32)
    DpQuantizer(encoding, l2_norm([update]), Noise(key)).quantize(update, out)
    return out


def integers(words: np.ndarray) -> np.ndarray:
    return words.view(np.int32).astype(object)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=64),
    st.sampled_from([16, 24, 32]),
    st.integers(3, 12),
    st.floats(1e-3, 50),
)
def test_one_clients_integers_never_exceed_the_bound(values: list[float], bits: int, n: int, clip_norm: float):
    update = np.array(values, np.float32)
    encoding = encoding_of(dp(clip_norm=clip_norm), n=n, fewest=n, dim=len(update), ring_bits=bits)
    given_ = integers(words_of(update, encoding))
    assert sum(v * v for v in given_) <= encoding.bound**2  # exactly, in Python's integers


def test_changing_one_client_moves_the_decoded_sum_by_no_more_than_the_bound():
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = np.random.default_rng(seed)
    encoding = encoding_of(dp(), n=5, fewest=5, dim=300, ring_bits=24)
    for _ in range(20):
        others = [words_of(rng.normal(size=300) * 10.0 ** rng.uniform(-3, 3), encoding) for _ in range(4)]
        one = words_of(rng.normal(size=300) * 10.0 ** rng.uniform(-3, 3), encoding)
        with_it = encoding.decode(np.sum([*others, one], axis=0, dtype=np.uint32))
        without = encoding.decode(np.sum(others, axis=0, dtype=np.uint32))
        assert np.linalg.norm(with_it - without) <= 2.0 * (1 + 1e-12)


def test_a_small_update_comes_back_and_a_large_one_is_clipped():
    encoding = encoding_of(dp(), n=4, fewest=3, dim=3, ring_bits=32)
    small = np.array([0.3, -0.4, 0.5])
    assert encoding.decode(words_of(small, encoding)) == pytest.approx(small, abs=2.0 / encoding.bound)
    large = encoding.decode(words_of(np.array([300.0, -400.0, 0.0]), encoding))
    assert large == pytest.approx([1.2, -1.6, 0.0], rel=1e-5)  # norm 2, and a millionth less


@pytest.mark.parametrize("bits", [16, 24, 32])
def test_negative_sums_come_back_in_a_ring_of_any_width(bits: int):
    encoding = encoding_of(dp(), n=3, fewest=3, dim=2, ring_bits=bits)
    total = np.sum([words_of(np.array([-1.0, 0.5]), encoding)] * 3, axis=0, dtype=np.uint32)
    kept = total & np.uint32((1 << bits) - 1)  # what a ring of so many bits keeps
    assert encoding.decode(kept) == pytest.approx([-3.0, 1.5], abs=3 * 2.0 / encoding.bound)


@pytest.mark.parametrize("bits", [16, 24, 32])
@pytest.mark.parametrize("n", [3, 10, 100])
def test_the_largest_possible_sum_does_not_wrap(bits: int, n: int):
    for z in (0.5, 1.0, 8.0):
        wanted = dp(mode="distributed", noise_multiplier=z)
        try:
            encoding = encoding_of(wanted, n=n, fewest=n, dim=10, ring_bits=bits)
        except OperatorError as error:
            assert bits == 16, error  # 100 clients, of which each may take 327 units
            continue
        largest = n * (encoding.bound + math.ceil(TAIL * encoding.sigma + 0.5))
        assert largest <= 1 << (bits - 1)
        assert largest > 0.9 * (1 << (bits - 1))  # and nothing is given away


def test_noise_is_sized_for_the_fewest_survivors_without_the_colluders():
    wanted = dp(mode="distributed", noise_multiplier=3.0, colluders=2)
    encoding = encoding_of(wanted, n=10, fewest=6, dim=100, ring_bits=32)
    assert encoding.sigma == pytest.approx(3.0 * encoding.bound / math.sqrt(6 - 2))
    assert encoding_of(dp(), n=10, fewest=6, dim=100, ring_bits=32).sigma == 0.0


def test_the_fewest_survivors_noise_adds_up_to_the_whole():
    wanted = dp(mode="distributed", noise_multiplier=2.0)
    dim, fewest = 60_000, 4
    encoding = encoding_of(wanted, n=6, fewest=fewest, dim=dim, ring_bits=32)
    keys = [os.urandom(32) for _ in range(fewest)]
    print("keys", [key.hex() for key in keys])
    total = np.sum([words_of(np.zeros(dim), encoding, key) for key in keys], axis=0, dtype=np.uint32)
    decoded = encoding.decode(total)
    assert decoded.std() == pytest.approx(2.0 * 2.0, rel=5 / math.sqrt(2 * dim))  # z * clip_norm
    assert abs(decoded.mean()) < 5 * 4.0 / math.sqrt(dim)


def test_noise_is_added_to_integers_as_integers():
    """Rounding value and noise apart is rounding their sum, as the value is whole: post-processing of a Gaussian."""
    wanted = dp(mode="distributed")
    encoding = encoding_of(wanted, n=3, fewest=3, dim=50, ring_bits=32)
    update = np.linspace(-0.1, 0.1, 50)
    noise = np.zeros(50)
    Noise(bytes(32)).add(noise, encoding.sigma)
    silent = Encoding(clip_norm=2.0, bound=encoding.bound, dim=50, ring_bits=32, sigma=0.0, bit_sigma=0.0)
    plain = integers(words_of(update, silent))
    assert list(integers(words_of(update, encoding))) == [
        int(v + g) for v, g in zip(plain, np.rint(noise), strict=True)
    ]


def test_how_an_update_is_cut_does_not_change_its_words():
    encoding = encoding_of(dp(mode="distributed"), n=3, fewest=3, dim=150_000, ring_bits=32)
    update = np.sin(np.arange(150_000)).astype(np.float32)
    whole = words_of(update, encoding)
    out, quantizer = np.empty(150_000, np.uint32), DpQuantizer(encoding, l2_norm([update]), Noise(bytes(32)))
    for first, last in ((0, 1), (1, 65_537), (65_537, 65_537), (65_537, 150_000)):
        quantizer.quantize(update[first:last], out[first:last])
    assert np.array_equal(out, whole)


def test_a_ring_without_room_is_refused_with_the_numbers():
    with pytest.raises(
        OperatorError, match=r"10 clients in a ring of 16 bits leave 3,275 units.*50,000,000 parameters"
    ):
        encoding_of(dp(), n=10, fewest=7, dim=50_000_000, ring_bits=16)
    with pytest.raises(OperatorError, match=r"noise would be .* units, 64 are needed.*noise_multiplier"):
        encoding_of(dp(mode="distributed", noise_multiplier=1e-2), n=10, fewest=7, dim=100, ring_bits=16)
    with pytest.raises(OperatorError, match="leave 0 units"):
        encoding_of(dp(), n=40_000, fewest=30_000, dim=100, ring_bits=16)


def test_bits_are_centred_and_noisy_only_in_distributed_mode():
    central = encoding_of(dp(adaptive=True, bit_noise=1.0), n=3, fewest=3, dim=4, ring_bits=32)
    assert central.bit(0.5, Noise()) == BIT // 2 and central.bit(2.5, Noise()) == -BIT // 2
    wanted = dp(mode="distributed", adaptive=True, bit_noise=1.5)
    noisy = encoding_of(wanted, n=5, fewest=4, dim=4, ring_bits=32)
    key = os.urandom(32)
    print("key", key.hex())
    noise = Noise(key)
    found = np.array([noisy.bit(0.5, noise) for _ in range(20_000)]) / BIT
    assert found.std() == pytest.approx(1.5 / math.sqrt(4), rel=5 / math.sqrt(40_000))
    assert found.mean() == pytest.approx(0.5, abs=5 * 0.75 / math.sqrt(20_000))


def test_the_update_pays_for_the_noise_of_the_count():
    """Figures of the closed form: z = 1 with 100 clients, z = 0.8 with 50, sigma_b a twentieth of them."""
    assert dp(adaptive=True, bit_noise=5.0).update_noise == pytest.approx(1.00504, abs=1e-5)
    assert dp(adaptive=True, noise_multiplier=0.8, bit_noise=2.5).update_noise == pytest.approx(0.81044, abs=1e-5)
    for z, count in ((1.0, 5.0), (0.8, 2.5), (1.9, 1.0)):
        update = dp(adaptive=True, noise_multiplier=z, bit_noise=count).update_noise
        assert update**-2 + (2 * count) ** -2 == pytest.approx(z**-2)  # the two together are one Gaussian of z
