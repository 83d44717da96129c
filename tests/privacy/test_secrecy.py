"""What an upload shows of its update: nothing, alone or with what a coordinator and a minority could add.

The randomness is seeded, so that a statistic has one value; its bound is one that a uniform vector passes with near
certainty.
"""

import json

import numpy as np
import pytest

from murmur.privacy import bodies, keys, shamir
from murmur.privacy.fixed_point import quantize
from murmur.privacy.masks import RING, Masks
from murmur.protocol.encoding import b64, unb64

D = 200_000


def ring_of(fleet, body):
    return np.frombuffer(body[8 * fleet.context.aux :], np.uint32)


def assert_uniform(y):
    """Chi-square of each byte, Kolmogorov-Smirnov of the words, mean of each bit."""
    d = len(y)
    for shift in (0, 8, 16, 24):
        counts = np.bincount((y >> shift) & 255, minlength=256)
        chi2 = float(((counts - d / 256) ** 2 / (d / 256)).sum())
        assert abs(chi2 - 255) < 5 * np.sqrt(2 * 255), (shift, chi2)
    ordered = np.sort(y) / 2.0**32
    distance = np.abs(ordered - (np.arange(d) + 0.5) / d).max()
    assert np.sqrt(d) * distance < 2.2  # beyond it with probability 1e-4
    for bit in range(32):
        ones = int(((y >> bit) & 1).sum())
        assert abs(ones - d / 2) < 5 * np.sqrt(d) / 2, bit


def assert_unrelated(a, b):
    r = np.corrcoef(a.astype(np.float64), b.astype(np.float64))[0, 1]
    assert abs(r) < 5 / np.sqrt(len(a)), r


def test_the_statistics_see_an_unmasked_update(fleet):
    round_ = fleet(4, D)
    with pytest.raises(AssertionError):
        assert_uniform(quantize(round_.values("c00"), weight=1, clip_value=1.0, max_weight=1, n=4))


@pytest.mark.parametrize("constant", [None, 0.0])
def test_one_upload_is_uniform_whatever_the_update(fleet, constant, monkeypatch):
    round_ = fleet(4, D)
    if constant is not None:
        monkeypatch.setattr(round_, "values", lambda u: np.full(D, constant, np.float32))
    round_.until_upload()
    for u in round_.context.cohort:
        y = ring_of(round_, round_.uploads[u])
        assert_uniform(y)
        assert constant is not None or abs(np.corrcoef(y, round_.values(u))[0, 1]) < 5 / np.sqrt(D)


def test_equal_updates_of_two_clients_and_of_two_attempts_look_unrelated(fleet, monkeypatch):
    uploads = []
    for attempt in (1, 2):
        round_ = fleet(4, D, attempt=attempt)
        monkeypatch.setattr(round_, "values", lambda u: np.linspace(-1, 1, D, dtype=np.float32))
        round_.until_upload()
        uploads += [ring_of(round_, round_.uploads[u]) for u in ("c00", "c01")]
    for i, a in enumerate(uploads):
        for b in uploads[:i]:
            assert_unrelated(a, b)
            assert_uniform(a - b)


def test_the_same_randomness_in_another_round_gives_other_masks(fleet, join):
    """Even with a broken random generator, everything a mask depends on makes rounds differ."""
    uploads = []
    for changes in ({}, {"round": 2}, {"model_sha256": "d" * 64}, {"kind": "evaluate"}):
        round_ = fleet(4, 1000, **changes)
        round_.until_upload()
        uploads.append(round_.uploads["c00"])
    assert len(set(uploads)) == len(uploads)
    for a in uploads[1:]:
        assert_unrelated(ring_of(round_, a), ring_of(round_, uploads[0]))


def test_a_late_upload_stays_uniform_though_its_mask_seed_was_rebuilt(fleet):
    """c03 was declared dropped, its seed is public, then its upload arrives: the self mask still hides it."""
    round_ = fleet(5, D)
    everyone = round_.context.cohort
    staying = round_.without({"c03"})
    for phase in (round_.advertise, round_.share, round_.open):
        phase(everyone)
    for phase in (round_.upload, round_.agree, round_.reveal):
        phase(staying)
    shares = {round_.context.position(u): unb64(json.loads(round_.reveals[u])["mask"]["c03"]) for u in staying}
    seed = shamir.combine(shares)
    private = keys.mask_private(seed, context=round_.context.digest(), client="c03")
    client = round_.clients["c03"]
    pairs = []
    for u in staying:
        common = keys.exchange(private, unb64(json.loads(round_.adverts[u])["mask"]), u)
        mask = keys.pair_mask(common, session=client._session, shared=client._shared, first="c03", second=u)
        pairs.append((mask.ring, not u > "c03"))
    round_.uploads.clear()
    round_.upload(["c03"])
    late = ring_of(round_, round_.uploads["c03"]).copy()
    Masks(pairs, RING).apply(late)
    assert_uniform(late)
    # The test takes away all but the self mask: without that one the update stands there.
    own = keys.self_mask(client._secrets.secret, session=client._session, shared=client._shared, client="c03")
    Masks([(own.ring, False)], RING).apply(late)
    plain = quantize(round_.values("c03"), weight=round_.weights["c03"], clip_value=1.0, max_weight=1000, n=5)
    assert np.array_equal(late, plain)


def test_the_shares_of_fewer_than_t_clients_do_not_rebuild_a_secret(fleet):
    round_ = fleet(6)  # t = 5
    everyone = round_.context.cohort
    for phase in (round_.advertise, round_.share, round_.open):
        phase(everyone)
    victim = round_.clients["c00"]
    held = {round_.context.position(u): round_.clients[u]._secrets.held["c00"] for u in everyone}
    few = {x: held[x] for x in list(held)[1:5]}
    enough = {x: held[x] for x in list(held)[1:6]}
    for place, secret in ((0, victim._secrets.secret), (1, victim._secrets.seed)):
        assert shamir.combine({x: pair[place] for x, pair in enough.items()}) == secret
        assert shamir.combine({x: pair[place] for x, pair in few.items()}) != secret


def test_secrets_stand_in_no_message_and_no_repr(fleet):
    round_ = fleet(4).until_agree()
    for u, client in round_.clients.items():
        secrets = client._secrets
        private = [secrets.channel.private_bytes_raw(), secrets.mask.private_bytes_raw(), secrets.seed, secrets.secret]
        private += [share for pair in secrets.held.values() for share in pair]
        shown = [repr(client), repr(secrets), str(client), round_.adverts[u], round_.shares[u], round_.agrees[u]]
        shown += [round_.server.inbox(v, round_.adverts, round_.shares) for v in round_.context.cohort]
        for text in shown:
            assert not any(s.hex() in text or b64(s) in text or repr(s) in text for s in private)
        assert repr(client) == f"<ClientSession {u}, round 1, agreed>"


def test_secrets_are_dropped_after_the_reveal_and_after_a_refusal(fleet):
    round_ = fleet(4).until_reveal()
    assert all(client._kept is None for client in round_.clients.values())
    broken = fleet(4)
    broken.advertise(broken.context.cohort)
    with pytest.raises(Exception, match="JSON"):
        broken.clients["c00"].share("{")
    assert broken.clients["c00"]._kept is None


def test_no_dealer_is_revealed_as_both_alive_and_dropped(fleet):
    """Both secrets of one client would unmask its own upload."""
    round_ = fleet(5)
    for phase in (round_.advertise, round_.share, round_.open):
        phase(round_.context.cohort)
    for phase in (round_.upload, round_.agree, round_.reveal):
        phase(round_.without({"c01"}))
    for body in round_.reveals.values():
        shown = json.loads(body)
        assert sorted(shown["self"]) == ["c00", "c02", "c03", "c04"]
        assert sorted(shown["mask"]) == ["c01"]


def test_a_picture_is_read_from_a_plain_gradient_and_not_from_a_masked_one(fleet, monkeypatch):
    """Of a linear layer y = Wx + b the gradients give x = dW[i] / db[i]: the plainest gradient inversion."""
    rng = np.random.default_rng(3)
    picture, slope = rng.uniform(0, 1, 784), rng.normal(0, 0.1, 10)
    update = np.concatenate([np.outer(slope, picture).ravel(), slope]).astype(np.float32)

    def invert(vector):
        weights, bias = vector[:7840].reshape(10, 784), vector[7840:]
        row = int(np.argmax(np.abs(bias)))
        found = weights[row] / bias[row]
        return float(found @ picture / np.linalg.norm(found) / np.linalg.norm(picture))

    round_ = fleet(4, len(update))
    monkeypatch.setattr(round_, "values", lambda u: update)
    round_.until_upload()
    masked = ring_of(round_, round_.uploads["c00"]).view(np.int32).astype(np.float64)
    assert invert(update) > 0.999
    assert abs(invert(masked)) < 0.2


def test_a_deal_commits_to_every_share_and_a_session_to_every_key():
    """Changing any one part changes the digest that the masks depend on."""
    one = {"a": ["1", "2"], "b": ["3", "4"]}
    digests = {
        bodies.deal_digest(one, "s"),
        bodies.deal_digest(one, "t"),
        bodies.deal_digest(one | {"b": ["3", "5"]}, "s"),
        bodies.deal_digest({"a": ["1", "2"], "c": ["3", "4"]}, "s"),
    }
    assert len(digests) == 4
    shared = {
        bodies.shared_digest(b"s", {"a": b"1", "b": b"2"}),
        bodies.shared_digest(b"t", {"a": b"1", "b": b"2"}),
        bodies.shared_digest(b"s", {"a": b"1", "b": b"3"}),
        bodies.shared_digest(b"s", {"a": b"1"}),
    }
    assert len(shared) == 4
