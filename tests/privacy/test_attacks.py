"""Attacks that go through several steps: colluding clients, a coordinator that lies to some, vectors of one client.

Where an attack works, the test says so: docs/threats.md names these as limits.
"""

import itertools
import json

import numpy as np
import pytest

from murmur.privacy import bodies, keys, shamir
from murmur.privacy.client import ClientSession, Policy
from murmur.privacy.fixed_point import decode, quantize
from murmur.privacy.masks import RING, Masks
from murmur.protocol.encoding import unb64
from murmur.protocol.errors import PrivacyRefusal

D = 100_000


def opened(round_):
    for phase in (round_.advertise, round_.share, round_.open):
        phase(round_.context.cohort)
    return round_


def ring_of(round_, client):
    return np.frombuffer(round_.uploads[client][8 * round_.context.aux :], np.uint32).copy()


def quantized(round_, client):
    context = round_.context
    n, weight = len(context.cohort), round_.weights[client]
    values = round_.values(client)
    return quantize(values, weight=weight, clip_value=context.clip_value, max_weight=context.max_weight, n=n)


def assert_uniform_bytes(vector):
    """Chi-square of every byte of the elements, 255 degrees of freedom, within 5 standard deviations."""
    raw = vector.view(np.uint8).reshape(len(vector), -1)
    for column in range(raw.shape[1]):
        counts = np.bincount(raw[:, column], minlength=256)
        chi2 = float(((counts - len(vector) / 256) ** 2 / (len(vector) / 256)).sum())
        assert abs(chi2 - 255) < 5 * np.sqrt(2 * 255), (column, chi2)


def pair_masks_known_to(round_, colluders, client):
    """The masks of `client` with each colluder, made from the colluder's secrets, with the signs they have there."""
    session, shared = round_.clients[client]._session, round_.clients[client]._shared
    found = []
    for u in colluders:
        theirs = unb64(json.loads(round_.adverts[client])["mask"])
        common = keys.exchange(round_.clients[u]._secrets.mask, theirs, client)
        mask = keys.pair_mask(common, session=session, shared=shared, first=client, second=u)
        found.append((mask.ring, client < u))
    return found


def without_masks(vector, masks):
    Masks([(key, not plus) for key, plus in masks], RING).apply(vector)
    return vector


# What an upload shows


def test_the_auxiliary_block_is_as_uniform_as_the_ring(fleet, monkeypatch):
    """Weights, metrics and integer tensors travel in it: 64 bits each, under masks of their own."""
    round_ = fleet(4, 1, aux=D)
    monkeypatch.setattr(round_, "aux", lambda u, weight: np.arange(D, dtype=np.uint64))
    opened(round_).upload(round_.context.cohort)
    blocks = [np.frombuffer(round_.uploads[u][: 8 * D], np.uint64) for u in round_.context.cohort]
    for i, a in enumerate(blocks):
        assert_uniform_bytes(a)
        for b in blocks[:i]:
            assert_uniform_bytes(a - b)
    with pytest.raises(AssertionError):
        assert_uniform_bytes(np.arange(D, dtype=np.uint64))


def test_the_ring_and_the_block_of_one_client_have_different_masks(fleet):
    """Of a client whose numbers are all 0 the upload is its masks: no part of one stream stands in the other."""
    round_ = opened(fleet(3, 2000, aux=1000))
    zeros = round_.clients["c00"].mask([np.zeros(2000, np.float32)], weight=0, aux=np.zeros(1000, np.uint64))
    upload = np.frombuffer(b"".join(zeros), "<u4")
    block, ring = upload[:2000], upload[2000:]
    assert not set(block.tolist()) & set(ring.tolist())  # of 4000 words in 2^32 two are equal with probability 0.002


# Colluding clients


def test_t_minus_one_colluders_and_the_coordinator_see_noise_in_an_upload(fleet):
    """They take out every mask that they share with the victim; those with the other honest client and its own stay."""
    round_ = fleet(6, D)  # t = 5
    opened(round_).upload(round_.context.cohort)
    honest, colluders = ("c00", "c01"), ("c02", "c03", "c04", "c05")
    left = {}
    for u in honest:
        left[u] = without_masks(ring_of(round_, u), pair_masks_known_to(round_, colluders, u))
        assert_uniform_bytes(left[u])
        difference = left[u] - quantized(round_, u)
        assert_uniform_bytes(difference)
    assert_uniform_bytes(left["c00"] + left["c01"])  # before anybody reveals, not even the sum of the two


def test_all_but_two_colluding_clients_read_the_sum_of_these_two_and_no_more(fleet):
    """What remains after the reveal, exactly: the sum without the colluders' own updates."""
    round_ = fleet(6, 1000).until_reveal()
    ring, _ = round_.unmask()
    rest = ring - sum((quantized(round_, u) for u in ("c02", "c03", "c04", "c05")), np.zeros(1000, np.uint32))
    assert np.array_equal(rest, quantized(round_, "c00") + quantized(round_, "c01"))


def test_a_sum_with_one_honest_client_in_it_is_that_clients_update(fleet):
    """t - 1 colluders are not the limit: of the fewest that may be summed, two must be honest. A limit, not a guard."""
    round_ = fleet(5, 50)  # t = 4, and 4 is the fewest: three colluders and one other
    opened(round_)
    stay = round_.without({"c04"})
    for phase in (round_.upload, round_.agree, round_.reveal):
        phase(stay)
    ring, _ = round_.unmask()
    rest = ring - sum((quantized(round_, u) for u in ("c01", "c02", "c03")), np.zeros(50, np.uint32))
    assert np.array_equal(rest, quantized(round_, "c00"))


def test_a_policy_of_more_clients_than_collude_keeps_two_honest_ones_in_the_sum(fleet):
    """The guard against the last: c colluders are met by min_clients >= c + 2."""
    round_ = opened(fleet(5, 50, policy=Policy(min_clients=5), min_clients=5))
    round_.upload(round_.context.cohort)
    told = json.loads(round_.server.survivors(round_.adverts, round_.shares, round_.uploads))
    told["survivors"].remove("c04")
    with pytest.raises(PrivacyRefusal) as refused:
        round_.clients["c00"].agree(json.dumps(told, sort_keys=True, separators=(",", ":")))
    assert refused.value.reason == "too_few"


def test_the_shares_of_t_minus_one_colluders_fit_every_secret(fleet):
    """For any candidate there is one more share with which theirs rebuild it; only commitments tell which is right."""
    round_ = opened(fleet(6))  # t = 5
    position, others = round_.context.position, ("c02", "c03", "c04", "c05")
    for place in (0, 1):
        held = {position(u): round_.clients[u]._secrets.held["c00"][place] for u in others}
        secrets = round_.clients["c00"]._secrets
        assert shamir.combine(held) != (secrets.secret, secrets.seed)[place]
        x = position("c01")
        for candidate in (bytes(31), b"\xff" * 31, b"some other secret of 31 bytes..."[:31]):
            weights = dict(zip(sorted([*held, x]), shamir.weights_at_zero(tuple(sorted([*held, x]))), strict=True))
            missing = int.from_bytes(candidate, "big") - sum(
                int.from_bytes(share, "big") * weights[at] for at, share in held.items()
            )
            share = missing * pow(weights[x], -1, shamir.PRIME) % shamir.PRIME
            assert shamir.combine(held | {x: share.to_bytes(32, "big")}) == candidate


# A coordinator that tells two stories


def two_stories(round_, told_all, told_fewer, colluders, victim):
    """Try to have `victim` revealed as alive by some clients and as dropped out by others; gives the shares of each.

    The colluders sign whatever is asked and hand out all they hold.
    """
    everyone = round_.context.cohort
    server, adverts, shares = round_.server, round_.adverts, round_.shares
    shown = []
    for told, listed in ((told_all, everyone), (told_fewer, round_.without({victim}))):
        survivors = server.survivors(adverts, shares, listed)
        agrees = {u: round_.clients[u].agree(survivors) for u in told}
        read = bodies.load_survivors(survivors, len(everyone))
        for u in colluders:
            agrees[u] = bodies.dump_signed("agree", bodies.agreement(u, read), round_.clients[u]._identity)
        if len(agrees) < round_.context.threshold:  # the honest coordinator's check; a liar asks nevertheless
            fields = {"session": read.session.hex(), "survivors": read.digest.hex()}
            signed = {u: json.loads(body)["signature"] for u, body in agrees.items()}
            signatures = bodies.dump("signatures", fields | {"signatures": signed})
        else:
            signatures = server.signatures(everyone[0], adverts, agrees)  # of a complete graph, the same for all
        place = 0 if victim in listed else 1
        found = {round_.context.position(u): round_.clients[u]._secrets.held[victim][place] for u in colluders}
        for u in told:
            try:
                reveal = json.loads(round_.clients[u].reveal(signatures))
            except PrivacyRefusal as refused:
                assert refused.reason == "too_few"
            else:
                found[round_.context.position(u)] = unb64(reveal["mask" if place else "self"][victim])
        shown.append(found)
    return shown


@pytest.mark.parametrize("with_all", range(1, 6))
def test_two_stories_need_as_many_colluders_as_two_thresholds_have_in_common(fleet, with_all):
    """n = 7, t = 5: with 2 colluders, one fewer than 2t - n, no way to divide the others opens both secrets."""
    round_ = fleet(7, 50).until_upload()
    honest, colluders = round_.context.cohort[:5], round_.context.cohort[5:]
    alive, dropped = two_stories(round_, honest[:with_all], honest[with_all:], colluders, "c00")
    assert min(len(alive), len(dropped)) == len(colluders)  # one of the stories gets no share but theirs


def test_with_2t_minus_n_colluders_one_update_is_read(fleet):
    """n = 7, t = 5, 3 colluders: the bound is sharp, and beyond it there is no guard but the choice of t."""
    round_ = fleet(7, 50).until_upload()
    colluders = ("c04", "c05", "c06")
    alive, dropped = two_stories(round_, ("c00", "c01"), ("c02", "c03"), colluders, "c00")
    assert len(alive) == len(dropped) == 5
    secret, seed = shamir.combine(alive), shamir.combine(dropped)
    assert secret is not None and seed is not None
    private = keys.mask_private(seed, context=round_.context.digest(), client="c00")
    session, shared = round_.clients["c00"]._session, round_.clients["c00"]._shared
    masks = [(keys.self_mask(secret, session=session, shared=shared, client="c00").ring, True)]
    for u in round_.context.cohort[1:]:
        common = keys.exchange(private, unb64(json.loads(round_.adverts[u])["mask"]), u)
        masks.append((keys.pair_mask(common, session=session, shared=shared, first="c00", second=u).ring, True))
    assert np.array_equal(without_masks(ring_of(round_, "c00"), masks), quantized(round_, "c00"))


def test_a_client_that_is_told_another_model_is_alone_and_goes_no_further(fleet, context, identity, randomness):
    """The dead model of Pasquini et al. 2022: its advert fits nobody's roster, and theirs fits none of its own."""
    round_ = fleet(4)
    lied_to = ClientSession(
        context(4, model_sha256="d" * 64),
        "c00",
        identity("c00"),
        policy=Policy(min_clients=2),
        known={},
        random=randomness("lied to"),
    )
    round_.advertise(round_.without({"c00"}))
    advert = lied_to.advertise()
    with pytest.raises(PrivacyRefusal) as refused:
        round_.server.check_advert("c00", advert)
    assert refused.value.reason == "wrong_context"
    rows = [json.loads(body) for body in (advert, *(round_.adverts[u] for u in round_.without({"c00"})))]
    for client, digest in ((lied_to, lied_to.context_sha256), (round_.clients["c01"], round_.context.digest().hex())):
        roster = bodies.dump("roster", {"adverts": rows, "context": digest})
        with pytest.raises(PrivacyRefusal) as refused:
            client.share(roster)
        assert refused.value.reason == "wrong_context"


# What a sum says: limits


def test_an_index_that_one_client_alone_touches_stands_in_the_sum(fleet, monkeypatch):
    """Embeddings: who alone has a word has its row read, to the fixed point's rounding (arXiv:2508.04285). A limit."""
    round_ = fleet(5, 100)
    rows = {u: np.repeat(np.float32([0.25, 0.0]), 50) for u in round_.context.cohort}
    rows["c02"][70:74] = (0.5, -0.25, 0.125, 1.0)
    monkeypatch.setattr(round_, "values", lambda u: rows[u])
    ring, _ = round_.until_reveal().unmask()
    total = decode(ring, clip_value=1.0, max_weight=1000, n=5)
    assert total[70:74] == pytest.approx(75 * rows["c02"][70:74], abs=1e-4)  # c02 weighs 1 + 2 * 37
    assert np.count_nonzero(total[50:]) == 4


def test_two_sums_over_cohorts_that_differ_by_one_give_that_ones_update(fleet):
    """Of the same model, in two attempts or runs: clients refuse the second attempt (`clients.memory`), not a run."""
    sums = []
    for run, gone in (("r1", set()), ("r2", {"c03"})):
        round_ = opened(fleet(5, 50, run=run))
        stay = round_.without(gone)
        for phase in (round_.upload, round_.agree, round_.reveal):
            phase(stay)
        sums.append(round_.unmask()[0])
    assert np.array_equal(sums[0] - sums[1], quantized(round_, "c03"))


def test_sessions_of_two_runs_have_no_mask_in_common(fleet):
    """The same clients, randomness and update: nothing of one run's uploads can be taken out of another's."""
    uploads = []
    for run in ("r1", "r2", "r3"):
        round_ = opened(fleet(3, D, run=run))
        round_.upload(round_.context.cohort)
        uploads.append(ring_of(round_, "c00"))
    for a, b in itertools.combinations(uploads, 2):
        assert_uniform_bytes(a - b)
