"""Rings of 16, 24 and 32 bits: exact sums, honest rounding, uniform uploads, and bounds that hold by calculation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from murmur.privacy.context import Context
from murmur.privacy.fixed_point import (
    decode,
    mean,
    needs_rounding,
    quantize,
    rounding_error,
    scale,
    value_bits,
    weight_bound,
)
from murmur.privacy.masks import CHUNK, apply
from murmur.protocol.errors import PrivacyRefusal, SumTooLarge
from murmur.protocol.wire import pack_ring, unpack_24

RINGS = (16, 24, 32)
KEY = b"r" * 32


def unpacked(body, context):
    """The words of an upload's ring, read byte by byte."""
    width = context.ring_bits // 8
    raw = np.frombuffer(body[8 * context.aux :], np.uint8).reshape(-1, width).astype(np.uint32)
    return sum((raw[:, i] << np.uint32(8 * i) for i in range(width)), start=np.zeros(len(raw), np.uint32))


def ring_sums(fleet):
    aux = sum((np.frombuffer(b[: 8 * fleet.context.aux], np.uint64) for b in fleet.uploads.values()), np.uint64(0))
    return sum((unpacked(b, fleet.context) for b in fleet.uploads.values()), np.uint32(0)), aux


def unmasked(fleet, dropped=()):
    """Play a round in which some drop out after they dealt their shares; the ring's sum without masks."""
    everyone = fleet.context.cohort
    for phase in (fleet.advertise, fleet.share, fleet.open):
        phase(everyone)
    for phase in (fleet.upload, fleet.agree, fleet.reveal):
        phase(fleet.without(dropped))
    ring, aux = ring_sums(fleet)
    fleet.server.unmask(
        adverts=fleet.adverts,
        shares=fleet.shares,
        survivors=fleet.told,
        reveals=fleet.reveals,
        ring_sum=ring,
        aux_sum=aux,
    )
    return ring


@settings(max_examples=12, deadline=None)
@given(
    ring_bits=st.sampled_from(RINGS),
    n=st.integers(3, 12),
    dim=st.integers(0, 200),
    seed=st.integers(0, 1 << 20),
    bound=st.booleans(),
)
def test_the_sum_is_that_of_numpy_to_a_unit_of_each_client(fleet, ring_bits, n, dim, seed, bound):
    total = sum(1 + 37 * i for i in range(n)) if bound else 0
    round_ = fleet(n, dim, seed=str(seed), ring_bits=ring_bits, total_weight=total)
    gone = list(round_.context.cohort[: (n - round_.context.threshold)])
    ring, bounds = unmasked(round_, gone), round_.context.bounds
    exact, staying = np.zeros(dim), round_.without(gone)
    for u in staying:
        exact += np.clip(round_.values(u).astype(np.float64), -1, 1) * round_.weights[u]
    found = decode(ring, **bounds) * scale(**bounds)
    assert np.abs(found - np.rint(found)).max(initial=0) < 1e-6  # whole units
    worst = 1.0 if needs_rounding(n, ring_bits) else 0.5
    assert np.abs(found - exact * scale(**bounds)).max(initial=0) <= worst * len(staying) + 1e-6
    if not needs_rounding(n, ring_bits):
        words = sum(quantize(round_.values(u), weight=round_.weights[u], **bounds) for u in staying)
        low = np.uint32((1 << ring_bits) - 1)
        assert np.array_equal(ring & low, words & low)


@pytest.mark.parametrize("ring_bits", RINGS)
@pytest.mark.parametrize("dim", [0, 1, 65535, 65536, 65537, 3 * CHUNK + 5])
def test_threads_and_pieces_change_no_byte_of_an_upload(fleet, ring_bits, dim):
    bodies = []
    for threads, cuts in ((1, []), (2, [1, dim // 3]), (5, [dim // 2])):
        round_ = fleet(3, dim, ring_bits=ring_bits)
        for phase in (round_.advertise, round_.share, round_.open):
            phase(round_.context.cohort)
        me = round_.clients["c01"]
        pieces = np.split(round_.values("c01"), sorted(c for c in cuts if c <= dim))
        bodies.append(b"".join(me.mask(pieces, weight=3, aux=round_.aux("c01", 3), rounding=KEY, threads=threads)))
    assert bodies[0] == bodies[1] == bodies[2]
    assert len(bodies[0]) == 8 * round_.context.aux + dim * ring_bits // 8


@pytest.mark.parametrize("dim", [0, 1, 65535, 65536, 65537, 5 * CHUNK + 1])
def test_a_server_takes_masks_out_alike_in_any_number_of_threads(dim):
    keys = [(bytes([i]) * 32, bool(i % 2)) for i in range(3)]
    values = np.random.default_rng(1).integers(0, 1 << 32, dim, np.uint32)
    found = [values.copy() for _ in range(3)]
    for vector, threads in zip(found, (1, 2, 7), strict=True):
        apply(keys, vector, threads=threads)
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])
    assert dim == 0 or not np.array_equal(found[0], values)


def test_an_update_that_goes_wrong_in_a_thread_names_its_element(fleet):
    round_ = fleet(3, 4 * CHUNK)
    for phase in (round_.advertise, round_.share, round_.open):
        phase(round_.context.cohort)
    values = round_.values("c00").copy()
    values[3 * CHUNK + 7] = np.nan
    with pytest.raises(Exception, match=f"element {3 * CHUNK + 7} of the update is nan"):
        list(round_.clients["c00"].mask([values], weight=1, aux=round_.aux("c00", 1), threads=3))
    assert round_.clients["c00"].state == "ended"


@pytest.mark.parametrize("ring_bits", RINGS)
def test_one_upload_is_uniform_in_every_ring(fleet, ring_bits, monkeypatch):
    """Chi-square of each byte and the mean of each bit, for an update that is the same number everywhere."""
    dim = 200_000
    round_ = fleet(4, dim, ring_bits=ring_bits)
    monkeypatch.setattr(round_, "values", lambda u: np.full(dim, 0.25, np.float32))
    round_.until_upload()
    words = unpacked(round_.uploads["c02"], round_.context)
    for shift in range(0, ring_bits, 8):
        counts = np.bincount((words >> np.uint32(shift)) & 255, minlength=256)
        chi2 = float(((counts - dim / 256) ** 2 / (dim / 256)).sum())
        assert abs(chi2 - 255) < 5 * np.sqrt(2 * 255), (shift, chi2)
    for bit in range(ring_bits):
        ones = int(((words >> np.uint32(bit)) & 1).sum())
        assert abs(ones - dim / 2) < 5 * np.sqrt(dim) / 2, bit
    assert words.max() < 1 << ring_bits


@pytest.mark.parametrize("ring_bits", RINGS)
def test_words_are_packed_lowest_byte_first(ring_bits):
    words = np.array([0x04030201, 0xFFFFFFFF, 0, 0x80000080], np.uint32)
    width = ring_bits // 8
    assert pack_ring(words, ring_bits).tobytes() == b"".join(w.tobytes()[:width] for w in words)
    if ring_bits == 24:
        assert unpack_24(pack_ring(words, 24), np.empty(9, np.uint32)).tolist() == (words & 0xFFFFFF).tolist()


def test_random_rounding_has_the_right_mean_and_is_repeatable():
    """0.3 of a unit comes out as 0 or 1: over 200,000 values the mean is within 5 standard errors of 0.3."""
    bounds = {"clip_value": 1.0, "max_weight": 1, "n": 10, "ring_bits": 16}
    unit = 1 / scale(**bounds)
    assert (value_bits(10, 16), scale(**bounds)) == (12, 2047)
    for times in (0.3, -2.7, 0.0, 5.0):
        values = np.full(200_000, times * unit)
        words = quantize(values, weight=1, rounding=KEY, **bounds).view(np.int32)
        share = times - np.floor(times)
        assert set(np.unique(words)) <= {int(np.floor(times)), int(np.floor(times)) + 1}
        assert abs(words.mean() - times) < 5 * np.sqrt(max(share * (1 - share), 1e-9) / len(words)) + 2e-5
        assert np.array_equal(words, quantize(values, weight=1, rounding=KEY, **bounds).view(np.int32))
    other = quantize(np.full(1000, 0.3 * unit), weight=1, rounding=b"s" * 32, **bounds)
    assert not np.array_equal(other, quantize(np.full(1000, 0.3 * unit), weight=1, rounding=KEY, **bounds))


def test_values_are_rounded_at_random_below_twenty_bits_only():
    assert [needs_rounding(n, 16) for n in (3, 200)] == [True, True]
    assert [needs_rounding(n, 24) for n in (10, 15, 16)] == [False, False, True]  # 24 - 4 and 24 - 5 bits
    assert [needs_rounding(n, 32) for n in (10, 4095, 4096)] == [False, False, True]


@settings(max_examples=100, deadline=None)
@given(
    ring_bits=st.sampled_from(RINGS),
    clip=st.floats(1e-3, 1e3),
    weights=st.lists(st.integers(0, 1 << 20), min_size=3, max_size=40),
    sign=st.sampled_from([-1.0, 1.0]),
)
def test_the_largest_updates_within_a_total_weight_do_not_wrap(ring_bits, clip, weights, sign):
    total, n = max(sum(weights), 1), len(weights)
    bounds = {"clip_value": clip, "max_weight": 1 << 20, "n": n, "ring_bits": ring_bits, "total_weight": total}
    ring = np.zeros(2, np.uint32)
    for i, w in enumerate(weights):
        ring += quantize(np.full(2, sign * 2 * clip), weight=w, rounding=bytes([i]) * 32, **bounds)
    found = decode(ring, **bounds)
    assert np.abs(found - sign * clip * sum(weights)).max() <= n / scale(**bounds) * 1.0001


def test_a_sum_of_more_weight_than_the_bound_is_never_taken_for_a_mean():
    """Two clients of 60 against a bound of 100: at the clip value the sum would have wrapped; one of 200 as well."""
    bounds = {"clip_value": 1.0, "max_weight": 1000, "n": 3, "total_weight": 100}
    ring = sum(quantize(np.ones(1), weight=60, **bounds) for _ in range(2))
    assert decode(ring, **bounds)[0] < 0
    with pytest.raises(SumTooLarge, match="120, 100 were expected"):
        mean(ring, weight=120, **bounds)
    alone = quantize(np.array([1.0, -1.0]), weight=200, **bounds).view(np.int32)
    assert np.abs(alone.astype(np.int64)).max() < 1 << 31
    assert np.sign(alone).tolist() == [1, -1]
    with pytest.raises(SumTooLarge):
        mean(alone.view(np.uint32), weight=200, **bounds)
    assert mean(quantize(np.full(1, 0.5), weight=90, **bounds), weight=90, **bounds)[0] == pytest.approx(0.5, abs=1e-7)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("dim", [0, 1, 65537, 3 * CHUNK])
def test_the_mean_is_the_decoded_sum_over_the_weight_in_any_number_of_threads(dim, dtype):
    bounds = {"clip_value": 2.0, "max_weight": 50, "n": 5, "ring_bits": 24}
    ring = np.random.default_rng(3).integers(0, 1 << 32, dim, np.uint32)
    expected = (decode(ring, **bounds) / 33).astype(dtype)
    for threads in (1, 3):
        assert np.array_equal(mean(ring.copy(), weight=33, dtype=dtype, threads=threads, **bounds), expected)


def test_the_bound_on_the_weights_leaves_room_and_says_little():
    """A quarter more for the same clients, four times as much for others, rounded up to a power of two."""
    ten = [f"c{i}" for i in range(10)]
    assert weight_bound(6000, ten, ten, 65536) == 8192  # 7,500 and up
    assert weight_bound(6554, ten, ten, 65536) == 16384  # 8,192.5 and up
    assert weight_bound(6553, ten, ten, 65536) == 8192
    assert weight_bound(6000, ten, ten[:4], 65536) == 8192  # whoever of the ten they are
    assert weight_bound(6000, ten, [*ten[:9], "x"], 65536) == 32768  # 24,000 and up
    assert weight_bound(6000, ten, [*ten, *"abcdefghij"], 65536) == 65536  # 48,000 for twice as many
    assert weight_bound(0, [], ten, 65536) == 0  # nothing is known yet
    assert weight_bound(10, ten, ten, 1) == 0  # each weighs 1
    assert weight_bound(6000, ten, ten, 500) == 0  # 500 for each of ten is the tighter bound
    assert weight_bound(6000, ten, ten, 513) == 8192


def test_the_error_of_the_mean_is_a_hundredth_of_the_largest_that_a_peer_has():
    """Ten updates of N(0, 0.01) weighing 600 each, with the recipe's clip_value and the bound of a second round.

    One client's error is uniform within half a unit; the mean's has the deviation unit / sqrt(12) * sqrt(10) / 6000.
    The largest of 200,000 lies below 5.5 deviations: 1.4e-8. flwr 1.41 has 4.6e-6 (benchmarks/secagg.py).
    """
    rng = np.random.default_rng(7)
    ten = [f"c{i}" for i in range(10)]
    bounds = {"clip_value": 8.0, "max_weight": 65536, "n": 10, "total_weight": weight_bound(6000, ten, ten, 65536)}
    ring, exact = np.zeros(200_000, np.uint32), np.zeros(200_000)
    for _ in ten:
        update = rng.normal(0, 0.01, 200_000).astype(np.float32)
        ring += quantize(update, weight=600, **bounds)
        exact += update.astype(np.float64) / 10
    error = mean(ring, weight=6000, **bounds) - exact
    deviation = 1 / scale(**bounds) / np.sqrt(12) * np.sqrt(10) / 6000
    assert deviation == pytest.approx(4.64e-9, rel=0.01)
    assert error.std() == pytest.approx(deviation, rel=0.02)
    assert np.abs(error).max() < 5.5 * deviation < 4.6e-8


@pytest.mark.parametrize(("ring_bits", "clip"), [(16, 0.08), (16, 8.0), (24, 8.0), (32, 8.0)])
def test_the_rounding_error_that_is_told_is_the_one_that_occurs(ring_bits, clip):
    rng = np.random.default_rng(5)
    bounds = {"clip_value": clip, "max_weight": 600, "n": 5, "ring_bits": ring_bits}
    updates = rng.normal(0, 0.01, (4, 50_000)).astype(np.float32)
    words = [quantize(u, weight=600, rounding=bytes([i]) * 32, **bounds) for i, u in enumerate(updates)]
    found = mean(sum(words), weight=2400, **bounds)
    exact = updates.astype(np.float64).mean(0)
    error = float(np.sqrt(((found - exact) ** 2).mean() / (found**2).mean()))
    told = rounding_error(found, weight=2400, summed=4, **bounds)
    print(f"{ring_bits} bits, clip {clip}: {error:.2e}, told {told:.2e}")
    # values of few units are rounded with less variance than the average of 1/6
    assert told / 1.1 < error < told * 1.1 or ((ring_bits, clip) == (16, 8.0) and told / 2 < error < told)


def test_a_ring_too_small_for_the_cohort_is_refused(context):
    many = tuple(f"c{i:03}" for i in range(256))
    assert isinstance(context(255, ring_bits=16, cohort=many[:255]), Context)  # 8 bits of a value are left
    with pytest.raises(PrivacyRefusal, match="256 clients leave 7 bits") as refused:
        context(256, ring_bits=16, cohort=many)
    assert refused.value.reason == "bad_terms"
    with pytest.raises(PrivacyRefusal, match="a ring of 20 bits"):
        context(4, ring_bits=20)
