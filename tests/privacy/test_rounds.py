"""Whole rounds: the sum is exact for every way of dropping out, and below the threshold nothing is read."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from murmur.privacy.fixed_point import decode, quantize
from murmur.protocol.errors import PrivacyRefusal

PHASES = ("advertise", "share", "open", "upload", "agree", "reveal", "nothing")


def check_sum(fleet, block, ring, aux):
    """The unmasked sums are those that numpy finds without any masks."""
    context, summed = fleet.context, sorted(fleet.uploads)
    expected = np.zeros(context.dim, np.uint32)
    bounds = {"clip_value": context.clip_value, "max_weight": context.max_weight, "n": len(context.cohort)}
    for u in summed:
        expected += quantize(fleet.values(u), weight=fleet.weights[u], **bounds)
    assert np.array_equal(ring, expected)
    exact = sum(np.clip(fleet.values(u).astype(np.float64), -1, 1) * fleet.weights[u] for u in summed)
    assert np.abs(decode(ring, **bounds) - exact).max(initial=0) < 1e-4
    totals, places = block.decode(aux), [context.cohort.index(u) for u in summed]
    assert totals.clients == len(summed)
    assert totals.weight == sum(fleet.weights[u] for u in summed)
    assert totals.clipped == sum(places)
    assert totals.metrics == {"loss": (sum(places) / 2, totals.weight), "accuracy": (sum(places), totals.weight)}
    assert totals.integers.tolist() == [sum(places) - 2 * len(places), 10**12 * sum(places)]


def play(fleet, leaves):
    """Run a round in which each client stays silent from a phase on; the sums, or the phase that was refused."""
    gone: set[str] = set()
    for phase in PHASES[:-1]:
        gone |= {u for u, at in leaves.items() if at == phase}
        try:
            getattr(fleet, phase)(fleet.without(gone))
        except PrivacyRefusal as error:
            assert error.reason == "too_few"
            return phase
    try:
        return fleet.unmask()
    except PrivacyRefusal as error:
        assert error.reason == "too_few"
        return "unmask"


def refused_at(fleet, leaves):
    """Where a round must be refused: the first phase that needs what too few clients have sent; None for nowhere."""
    needs = (("advertise", "share"), ("share", "open"), ("upload", "agree"), ("agree", "reveal"), ("reveal", "unmask"))
    for phase, then in needs:
        done = [u for u in fleet.context.cohort if PHASES.index(leaves[u]) > PHASES.index(phase)]
        if len(done) < fleet.context.threshold:
            return then
    return None


def ways(n):
    """Every way in which up to two of n clients drop out, by phase; among more than four, one order of each."""
    pairs = itertools.product(PHASES, repeat=2) if n == 4 else itertools.combinations_with_replacement(PHASES, 2)
    if n == 4:
        return sorted({tuple(w) for p in pairs for w in itertools.permutations(p + ("nothing",) * 2)})
    staying = ("nothing",) * (n - 2)
    return [(p + staying)[i % n :] + (p + staying)[: i % n] for i, p in enumerate(pairs)]


@pytest.mark.parametrize(("n", "sums", "refusals"), [(4, 25, 216), (5, 7, 21), (6, 7, 21)])
def test_every_combination_of_dropouts_gives_the_sum_or_a_refusal(fleet, block, n, sums, refusals):
    """t is n - 1 here: any one client may leave in any of the six phases; after the last one, all may."""
    outcomes = []
    for way in ways(n):
        round_ = fleet(n, 5)
        leaves = dict(zip(round_.context.cohort, way, strict=True))
        expected, found = refused_at(round_, leaves), play(round_, leaves)
        if expected is None:
            assert not isinstance(found, str), (leaves, found)
            check_sum(round_, block, *found)
        else:
            assert found == expected, (leaves, found)
        outcomes.append(expected)
    assert (outcomes.count(None), len(outcomes) - outcomes.count(None)) == (sums, refusals)


@pytest.mark.parametrize(("n", "threshold", "gone"), [(6, 4, 2), (7, 4, 3)])
def test_several_clients_may_leave_in_different_phases(fleet, block, n, threshold, gone):
    for phases in itertools.combinations(PHASES[1:6], gone):
        round_ = fleet(n, 3, threshold=threshold)
        leaves = dict.fromkeys(round_.context.cohort, "nothing") | dict(
            zip(round_.context.cohort[1::2][:gone], phases, strict=True)
        )
        check_sum(round_, block, *play(round_, leaves))


@settings(max_examples=15, deadline=None)
@given(data=st.data(), n=st.integers(3, 12), dim=st.integers(0, 300), seed=st.integers(0, 1 << 20))
def test_the_sum_is_exact_for_random_rounds(fleet, block, data, n, dim, seed):
    round_ = fleet(n, dim, seed=str(seed))
    cohort = round_.context.cohort
    leavers = data.draw(st.sets(st.sampled_from(cohort), max_size=n - round_.context.threshold))
    leaves = {u: data.draw(st.sampled_from(PHASES)) if u in leavers else "nothing" for u in cohort}
    check_sum(round_, block, *play(round_, leaves))


@pytest.mark.parametrize("dim", [0, 1, 65535, 65536, 65537])
def test_the_sum_is_exact_at_the_edges_of_a_piece(fleet, block, dim):
    round_ = fleet(4, dim)
    leaves = dict.fromkeys(round_.context.cohort, "nothing") | {"c02": "upload"}
    check_sum(round_, block, *play(round_, leaves))


def test_a_refused_unmasking_leaves_the_sums_masked(fleet):
    round_ = fleet(5).until_reveal()
    del round_.reveals["c01"], round_.reveals["c03"]
    ring, aux = round_.sums()
    before = ring.copy(), aux.copy()
    with pytest.raises(PrivacyRefusal) as refused:
        round_.server.unmask(
            adverts=round_.adverts,
            shares=round_.shares,
            survivors=round_.told,
            reveals=round_.reveals,
            ring_sum=ring,
            aux_sum=aux,
        )
    assert refused.value.reason == "too_few"
    assert np.array_equal(ring, before[0])
    assert np.array_equal(aux, before[1])


def test_clients_that_differ_in_who_shared_sum_to_noise(fleet, block):
    """A coordinator shows one client a smaller U2: its masks fit nobody's, and the sum is not readable."""
    round_ = fleet(5)
    everyone = round_.context.cohort
    round_.advertise(everyone)
    round_.share(everyone)
    fewer = {u: s for u, s in round_.shares.items() if u != "c04"}
    round_.clients["c00"].open(round_.server.inbox("c00", round_.adverts, fewer))
    round_.open(everyone[1:])
    round_.upload(everyone)
    told = round_.server.survivors(round_.adverts, round_.shares, everyone)
    with pytest.raises(PrivacyRefusal) as refused:
        round_.clients["c00"].agree(told)
    assert refused.value.reason == "wrong_session"
    round_.agree(everyone[1:])
    round_.reveal(everyone[1:])
    _, aux = round_.unmask()
    assert block.decode(aux).clients > 50 or block.decode(aux).clients < 0


def test_large_mapped_files_are_unmasked_in_place(fleet, block, tmp_path):
    round_ = fleet(3, 70_000).until_reveal()
    ring, aux = round_.sums()
    mapped = np.memmap(tmp_path / "sum", np.uint32, "w+", shape=ring.shape)
    mapped[:] = ring
    round_.server.unmask(
        adverts=round_.adverts,
        shares=round_.shares,
        survivors=round_.told,
        reveals=round_.reveals,
        ring_sum=mapped,
        aux_sum=aux,
    )
    check_sum(round_, block, np.array(mapped), aux)


def test_sums_of_another_shape_are_errors(fleet):
    round_ = fleet(3, 4).until_reveal()
    ring, aux = round_.sums()
    fixed = ring.copy()
    fixed.setflags(write=False)
    messages = {"adverts": round_.adverts, "shares": round_.shares, "survivors": round_.told, "reveals": round_.reveals}
    for wrong in ({"ring_sum": ring[:3]}, {"ring_sum": fixed}, {"ring_sum": ring.view(np.int32)}, {"aux_sum": aux[:2]}):
        with pytest.raises(ValueError, match="was asked for"):
            round_.server.unmask(**messages | {"ring_sum": ring, "aux_sum": aux} | wrong)
