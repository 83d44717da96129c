"""The frozen round in tests/vectors/secagg.json: read as another implementation's messages, and made again."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from murmur.privacy import shamir
from murmur.privacy.context import Context
from murmur.privacy.fixed_point import decode, quantize, scale, value_bits
from murmur.privacy.server import ServerSession
from murmur.protocol.errors import BadRequest, PrivacyRefusal

FOLDER = Path(__file__).parents[1] / "vectors"
VECTORS = json.loads((FOLDER / "secagg.json").read_text())
ROUND = VECTORS["round"]
REGULAR = json.loads((FOLDER / "secagg_regular.json").read_text())


@pytest.fixture(scope="module")
def server():
    return ServerSession(Context(**ROUND["context"]), {u: bytes.fromhex(k) for u, k in ROUND["identities"].items()})


def test_the_script_still_makes_every_byte_of_the_vectors():
    spec = importlib.util.spec_from_file_location("make_secagg", FOLDER / "make_secagg.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert json.loads(json.dumps(script.build())) == VECTORS
    assert json.loads(json.dumps(script.round_vector(script.EIGHT, degree=4))) == REGULAR


def test_the_round_on_a_ring_passes_every_door_and_unmasks_to_its_sum():
    """Eight clients, each joined to two on either side; hazel drops out after dealing, with four of five holders left
    of whatever it and its neighbours need."""
    context = Context(**REGULAR["context"])
    assert (context.degree, context.threshold, context.holders, len(context.cohort)) == (4, 4, 5, 8)
    server = ServerSession(context, {u: bytes.fromhex(k) for u, k in REGULAR["identities"].items()})
    adverts, shares, told = REGULAR["adverts"], REGULAR["shares"], REGULAR["survivors"]
    ring, aux = np.zeros(context.dim, np.uint32), np.zeros(context.aux, np.uint64)
    expected = ring.copy()
    for u in context.cohort:
        server.check_shares(u, shares[u], adverts)
        assert server.inbox(u, adverts, shares) == REGULAR["inboxes"][u]
        assert len(json.loads(shares[u])["sealed"]) == 4
    for u, text in REGULAR["uploads"].items():
        server.check_agree(u, REGULAR["agrees"][u], told)
        assert server.signatures(u, adverts, REGULAR["agrees"]) == REGULAR["signatures"][u]
        server.check_reveal(u, REGULAR["reveals"][u], adverts, shares, told)
        body, brought = bytes.fromhex(text), REGULAR["updates"][u]
        aux += np.frombuffer(body[: aux.nbytes], np.uint64)
        ring += np.frombuffer(body[aux.nbytes :], np.uint32)
        bounds = {"clip_value": context.clip_value, "max_weight": context.max_weight, "n": 8}
        expected += quantize(np.array(brought["values"]), weight=brought["weight"], **bounds)
    messages = {"adverts": adverts, "shares": shares, "survivors": told, "reveals": REGULAR["reveals"]}
    server.unmask(**messages, ring_sum=ring, aux_sum=aux)
    assert np.array_equal(ring, expected)
    assert REGULAR["sum"] == {"ring": ring.tolist(), "aux": aux.tolist()}


def test_shares_of_the_vector_rebuild_its_secret():
    vector = VECTORS["shamir"]
    shares = {int(x): bytes.fromhex(share) for x, share in vector["shares"].items()}
    assert shamir.combine({x: shares[x] for x in (5, 2, 4)}).hex() == vector["secret"]


def test_fixed_point_of_the_vector():
    """With 5 clients B = 29: the largest weighted delta, 2 * 8 = 16, is 2^28 - 1 units."""
    vector = VECTORS["fixed_point"]
    n, clip, heaviest, weight = (vector[k] for k in ("clients", "clip_value", "max_weight", "weight"))
    assert value_bits(n) == vector["bits"] == 29
    words = quantize(np.array(vector["values"]), weight=weight, clip_value=clip, max_weight=heaviest, n=n)
    assert words.tolist() == vector["words"]
    unit = (2**28 - 1) / 16
    assert vector["words"] == [round(min(max(x, -2), 2) * 3 * unit) % 2**32 for x in vector["values"]]


def test_every_message_of_the_vector_passes_its_door(server):
    adverts, shares, told = ROUND["adverts"], ROUND["shares"], ROUND["survivors"]
    assert Context(**ROUND["context"]).digest().hex() == ROUND["context_sha256"]
    for u in ROUND["context"]["cohort"]:
        server.check_advert(u, adverts[u])
        server.check_shares(u, shares[u], adverts)
        assert server.inbox(u, adverts, shares) == ROUND["inboxes"][u]
    assert server.roster(adverts) == ROUND["roster"]
    assert server.survivors(adverts, shares, ROUND["uploads"]) == told
    for u in ROUND["uploads"]:
        assert server.signatures(u, adverts, ROUND["agrees"]) == ROUND["signatures"]
    for u in ROUND["uploads"]:
        server.check_agree(u, ROUND["agrees"][u], told)
        server.check_reveal(u, ROUND["reveals"][u], adverts, shares, told)


def test_the_uploads_of_the_vector_unmask_to_its_sum(server):
    context = Context(**ROUND["context"])
    ring, aux = np.zeros(context.dim, np.uint32), np.zeros(context.aux, np.uint64)
    expected_ring, expected_aux = ring.copy(), aux.copy()
    for u, text in ROUND["uploads"].items():
        body, brought = bytes.fromhex(text), ROUND["updates"][u]
        aux += np.frombuffer(body[: aux.nbytes], np.uint64)
        ring += np.frombuffer(body[aux.nbytes :], np.uint32)
        expected_aux += np.array(brought["aux"], np.uint64)
        bounds = {"clip_value": context.clip_value, "max_weight": context.max_weight, "n": len(context.cohort)}
        expected_ring += quantize(np.array(brought["values"]), weight=brought["weight"], **bounds)
    assert ROUND["masked_sum"] == {"ring": ring.tolist(), "aux": aux.tolist()}
    messages = {"adverts": ROUND["adverts"], "shares": ROUND["shares"], "survivors": ROUND["survivors"]}
    server.unmask(**messages, reveals=ROUND["reveals"], ring_sum=ring, aux_sum=aux)
    assert ROUND["sum"] == {"ring": ring.tolist(), "aux": aux.tolist()}
    assert np.array_equal(ring, expected_ring)
    assert np.array_equal(aux, expected_aux)


@pytest.mark.parametrize("vector", VECTORS["rings"], ids=["16 bits", "24 bits", "total weight"])
def test_uploads_of_other_rings_unmask_to_their_sums(vector):
    """The other messages are those that the script makes; here the sums, from bytes, and what they decode to."""
    context = Context(**vector["context"])
    assert context.digest().hex() == vector["context_sha256"]
    width, size = context.ring_bits // 8, 8 * context.aux
    low, total = (1 << context.ring_bits) - 1, [0] * context.dim
    for text in vector["uploads"].values():
        ring = bytes.fromhex(text)[size:]
        words = [int.from_bytes(ring[i : i + width], "little") for i in range(0, len(ring), width)]
        total = [(a + b) & low for a, b in zip(total, words, strict=True)]
    assert vector["masked_sum"]["ring"] == total
    exact = sum(
        np.clip(np.array(u["values"]), -1, 1) * u["weight"] for u in ROUND["updates"].values()
    )  # the clients bring the same updates in every ring
    unit = 1 / scale(**context.bounds)
    worst = len(ROUND["updates"]) * unit * (1 if context.ring_bits == 16 else 0.5)
    found = decode(np.array(vector["sum"]["ring"], np.uint32), **context.bounds)
    assert np.abs(found - exact).max() <= worst * 1.0001


@pytest.mark.parametrize("bad", VECTORS["bad"], ids=lambda bad: f"{bad['door']}: {bad['what']}")
def test_bad_messages_of_the_vector_are_refused(server, bad):
    adverts, shares, told = ROUND["adverts"], ROUND["shares"], ROUND["survivors"]
    rest = {"check_shares": (adverts,), "check_agree": (told,), "check_reveal": (adverts, shares, told)}
    with pytest.raises((BadRequest, PrivacyRefusal)) as refused:
        getattr(server, bad["door"])(bad["client"], bad["body"], *rest.get(bad["door"], ()))
    assert getattr(refused.value, "reason", refused.value.code) == bad["answer"]
