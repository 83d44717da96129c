"""Masked rounds on a regular graph: the sum is exact, a round that cannot be unmasked reveals nothing, liars fail."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from murmur.privacy import shamir
from murmur.privacy.client import Policy, State
from murmur.privacy.fixed_point import quantize
from murmur.privacy.graph import neighbours, short, standing
from murmur.protocol.errors import PrivacyRefusal

PHASES = ("advertise", "share", "open", "upload", "agree", "reveal")


def refuses(reason, call, *args, clients=None):
    with pytest.raises(PrivacyRefusal) as refused:
        call(*args)
    assert refused.value.reason == reason, refused.value.detail
    if clients is not None:
        assert refused.value.facts["clients"] == clients


def near_of(round_):
    session = bytes.fromhex(json.loads(next(iter(round_.shares.values())))["session"])
    return neighbours(session, round_.adverts, round_.context.degree)


def ring_of(near):
    """The clients in ring order, from the first one on; for degree 4."""
    ring = [min(near)]
    while len(ring) < len(near):
        common = {v: len(near[v] & near[ring[-1]]) for v in near[ring[-1]] if v not in ring}
        ring.append(max(sorted(common), key=lambda v: common[v]))
    return ring


def expected_sum(round_):
    context, total = round_.context, np.zeros(round_.context.dim, np.uint32)
    bounds = {"clip_value": context.clip_value, "max_weight": context.max_weight, "n": len(context.cohort)}
    for u in round_.uploads:
        total += quantize(round_.values(u), weight=round_.weights[u], **bounds)
    return total


def play(round_, leaves):
    """Run a round in which clients stay silent from a phase on, and may refuse; the sum, or None for a refused round.

    A client that refuses takes no further part, as one that left. What anyone refuses with is that too few are left.
    """
    gone: set[str] = set()

    def each(phase, call):
        for u in round_.without(gone):
            try:
                call([u])
            except PrivacyRefusal as error:
                assert error.reason in ("too_few", "not_in_cohort", "left_out"), (phase, u, error.detail)
                gone.add(u)

    try:
        for phase in PHASES:
            gone |= {u for u, at in leaves.items() if at == phase}
            if phase == "share":
                round_.server.roster(round_.adverts)
            if phase == "agree":
                round_.told = round_.server.survivors(round_.adverts, round_.shares, round_.uploads)
            each(phase, getattr(round_, phase))
        return round_.unmask()[0]
    except PrivacyRefusal as error:
        assert error.reason == "too_few", error.detail
        return None


def can_end(round_):
    """Whether every secret that the sum needs has t of its holders among those that revealed: from the messages."""
    near, t = near_of(round_), round_.context.threshold
    return not short(near, standing(near, round_.shares, round_.uploads), round_.reveals, t)


@settings(max_examples=20, deadline=None)
@given(
    data=st.data(), n=st.integers(6, 16), half=st.integers(1, 4), dim=st.integers(0, 40), seed=st.integers(0, 1 << 20)
)
def test_the_sum_is_exact_or_the_round_is_refused(fleet, data, n, half, dim, seed):
    k = 2 * half
    t = data.draw(st.integers(half + 1, min(k + 1, n)).filter(lambda t: 2 * t > min(k + 1, n)))
    round_ = fleet(n, dim, seed=str(seed), degree=k, threshold=t)
    cohort = round_.context.cohort
    leavers = data.draw(st.lists(st.sampled_from(cohort), max_size=min(n // 3, 4), unique=True))
    leaves = {u: data.draw(st.sampled_from(PHASES)) for u in leavers}
    found = play(round_, leaves)
    if found is None:
        assert leaves
        assert not (round_.reveals and can_end(round_)), "a round that could end was refused"
    else:
        assert can_end(round_)
        assert np.array_equal(found, expected_sum(round_))
    if not leaves:
        assert found is not None


def test_a_round_on_a_ring_loses_a_client_in_every_phase(fleet):
    """Degree 4, t = 3 of 5 holders: one client of nine may leave before any phase, and two that are not close."""
    probe = fleet(9, 3, degree=4, threshold=3)
    probe.advertise(probe.context.cohort)
    probe.share(probe.context.cohort)
    ring = ring_of(near_of(probe))
    for first, then in itertools.combinations_with_replacement(PHASES, 2):
        round_ = fleet(9, 3, degree=4, threshold=3)
        found = play(round_, {ring[0]: first, ring[4]: then})
        assert found is not None, (first, then)
        assert np.array_equal(found, expected_sum(round_))


def test_clients_get_what_concerns_them_and_no_more(fleet):
    round_ = fleet(9, 3, degree=4, threshold=3).until_reveal()
    near = near_of(round_)
    for u in round_.context.cohort:
        deal, inbox = json.loads(round_.shares[u]), json.loads(round_.server.inbox(u, round_.adverts, round_.shares))
        assert set(deal["sealed"]) == set(inbox["sealed"]) == set(inbox["commitments"]) == near[u]
        assert set(deal["commitments"]) == near[u] | {u}
        assert len(inbox["deals"]) == 9  # who dealt what binds every mask
        assert set(json.loads(round_.signatures(u))["signatures"]) == near[u] | {u}
        shown = json.loads(round_.reveals[u])
        assert (set(shown["self"]), shown["mask"]) == (near[u] | {u}, {})


# Too few are left: nothing is revealed


@pytest.fixture
def ring12(fleet):
    """A round of twelve on a ring of degree 4, t = 4 of 5 holders, its shares dealt; and the ring."""
    round_ = fleet(12, 5, degree=4, threshold=4)
    round_.advertise(round_.context.cohort)
    round_.share(round_.context.cohort)
    return round_, ring_of(near_of(round_))


def test_a_client_with_too_few_neighbours_that_shared_goes_no_further(ring12):
    round_, ring = ring12
    fewer = {u: s for u, s in round_.shares.items() if u not in ring[:1]}
    for u in ring[1:]:
        round_.server.inbox(u, round_.adverts, fewer)  # each has lost one holder of five
    fewer = {u: s for u, s in round_.shares.items() if u not in ring[3:5]}
    refuses("too_few", round_.server.inbox, ring[2], round_.adverts, fewer)
    inbox = json.loads(round_.server.inbox(ring[2], round_.adverts, round_.shares))
    for gone in ring[3:5]:  # a coordinator that says so all the same
        for rows in ("deals", "sealed", "commitments"):
            del inbox[rows][gone]
    client = round_.clients[ring[2]]
    refuses("too_few", client.open, json.dumps(inbox, sort_keys=True, separators=(",", ":")))
    assert client.state is State.ENDED
    assert client._kept is None


def test_a_client_with_too_few_surviving_neighbours_signs_nothing(ring12, forge):
    round_, ring = ring12
    round_.open(ring)
    round_.upload(ring)
    refuses("too_few", round_.server.survivors, round_.adverts, round_.shares, ring[2:])
    told = json.loads(round_.server.survivors(round_.adverts, round_.shares, ring))
    body = json.dumps(told | {"survivors": sorted(ring[2:])}, sort_keys=True, separators=(",", ":"))
    refuses("too_few", round_.clients[ring[2]].agree, body)  # 3 of its 5 holders are left
    round_.clients[ring[5]].agree(body)  # far away all seem well, and its signature helps nobody


def test_a_sum_is_not_touched_when_one_secret_lacks_a_share(ring12):
    """Ten of twelve reveal, far more than t = 4; the two silent ones stand next to each other."""
    round_, ring = ring12
    for phase in (round_.open, round_.upload, round_.agree):
        phase(ring)
    round_.reveal(ring[2:])
    ring_sum, aux = round_.sums()
    before = ring_sum.copy(), aux.copy()
    messages = {"adverts": round_.adverts, "shares": round_.shares, "survivors": round_.told, "reveals": round_.reveals}
    with pytest.raises(PrivacyRefusal, match="fewer than 4 holders are left of the secrets of") as refused:
        round_.server.unmask(**messages, ring_sum=ring_sum, aux_sum=aux)
    assert refused.value.reason == "too_few"
    assert np.array_equal(ring_sum, before[0])
    assert np.array_equal(aux, before[1])


# Secrecy


def test_fewer_than_t_neighbours_learn_nothing(ring12):
    """With their t - 1 shares every secret is possible: some value of one more share makes it of them."""
    round_, ring = ring12
    round_.open(ring)
    victim, near = round_.clients[ring[0]], near_of(round_)
    held = {round_.context.position(u): round_.clients[u]._secrets.held[ring[0]] for u in sorted(near[ring[0]])}
    assert len(held) == 4  # with its own one, five
    for place, secret in ((0, victim._secrets.secret), (1, victim._secrets.seed)):
        shares = {x: pair[place] for x, pair in held.items()}
        assert shamir.combine(shares) == secret
        (last, _), *few = shares.items()
        assert shamir.combine(dict(few)) != secret
        weights = dict(zip(sorted(shares), shamir.weights_at_zero(tuple(sorted(shares))), strict=True))
        known = sum(weights[x] * shamir.parse_share(share) for x, share in few)
        for other in (secret, bytes(31), b"any other secret, of 31 bytes..".ljust(31)):
            value = (int.from_bytes(other, "big") - known) * pow(weights[last], -1, shamir.PRIME) % shamir.PRIME
            assert shamir.combine({**dict(few), last: value.to_bytes(32, "big")}) == other
    assert all(ring[0] not in round_.clients[u]._secrets.held for u in ring if u not in near[ring[0]] | {ring[0]})


def test_a_client_masks_with_its_neighbours_alone(ring12):
    round_, ring = ring12
    round_.open(ring)
    assert all(len(round_.clients[u]._mask_keys()) == 5 for u in ring)
    assert all(set(round_.clients[u]._secrets.common) == near_of(round_)[u] for u in ring)


# A coordinator that lies


@pytest.fixture
def uploaded(ring12):
    round_, ring = ring12
    round_.open(ring)
    round_.upload(ring)
    return round_, ring


def lists_of(round_, *clients):
    told = json.loads(round_.server.survivors(round_.adverts, round_.shares, round_.context.cohort))
    return [json.dumps(told | {"survivors": sorted(c)}, sort_keys=True, separators=(",", ":")) for c in clients]


def filtered(round_, client, agrees, told):
    """The signatures that a liar would show a client: of its holders, those that signed what it did itself."""
    near = near_of(round_)
    mine = json.loads(agrees[client])
    signed = {
        u: json.loads(body)["signature"]
        for u, body in agrees.items()
        if u in near[client] | {client} and told[u] == told[client]
    }
    fields = {"session": mine["session"], "survivors": mine["survivors"], "signatures": signed, "kind": "signatures"}
    return json.dumps(fields, sort_keys=True, separators=(",", ":"))


def test_two_lists_of_survivors_never_show_both_secrets_of_a_client(uploaded):
    """Half of the ring is told that one client is gone: whoever may reveal, its two secrets are not both out."""
    round_, ring = uploaded
    victim = ring[4]
    everyone, others = lists_of(round_, ring, [u for u in ring if u != victim])
    told = {u: everyone if i in (2, 3, 4, 5, 6) else others for i, u in enumerate(ring)}
    agrees = {u: round_.clients[u].agree(told[u]) for u in ring}
    shown = {"self": 0, "mask": 0}
    for u in ring:
        try:
            reveal = json.loads(round_.clients[u].reveal(filtered(round_, u, agrees, told)))
        except PrivacyRefusal as error:
            assert error.reason == "too_few"
            assert round_.clients[u].state is State.ENDED
            continue
        for which in shown:
            shown[which] += victim in reveal[which]
    assert min(shown.values()) < 4
    mixed = json.loads(filtered(round_, ring[0], agrees, dict.fromkeys(ring, 0)))
    assert mixed["signatures"].keys() == near_of(round_)[ring[0]] | {ring[0]}


def test_signatures_for_another_list_or_of_strangers_are_refused(uploaded, forge):
    round_, ring = uploaded
    round_.agree(ring)
    bodies_ = {u: round_.signatures(u) for u in ring}
    stranger = min(set(ring) - near_of(round_)[ring[0]] - {ring[0]})
    signatures = json.loads(bodies_[ring[0]])["signatures"]
    theirs = json.loads(round_.agrees[stranger])["signature"]
    far = forge(bodies_[ring[0]], {"signatures": signatures | {stranger: theirs}})
    refuses("unknown_survivor", round_.clients[ring[0]].reveal, far)
    refuses("unknown_survivor", round_.clients[ring[1]].reveal, round_.signatures(ring[5]))
    signatures = json.loads(bodies_[ring[2]])["signatures"]
    few = forge(bodies_[ring[2]], {"signatures": dict(list(signatures.items())[:3])})
    refuses("too_few", round_.clients[ring[2]].reveal, few)
    signatures = json.loads(bodies_[ring[3]])["signatures"]
    swapped = dict(zip(signatures, list(signatures.values())[::-1], strict=True))
    refuses("bad_signature", round_.clients[ring[3]].reveal, forge(bodies_[ring[3]], {"signatures": swapped}))


def test_nobody_reveals_twice_or_for_a_client_both_alive_and_dropped(uploaded):
    round_, ring = uploaded
    del round_.uploads[ring[0]]
    staying = ring[1:]
    round_.agree(staying)
    round_.reveal(staying)
    near = near_of(round_)
    for u in staying:
        shown = json.loads(round_.reveals[u])
        assert not shown["self"].keys() & shown["mask"].keys()
        assert shown["self"].keys() | shown["mask"].keys() == near[u] | {u}
        assert list(shown["mask"]) == [ring[0]] * (ring[0] in near[u])
        round_.agrees.pop(ring[4], None)
    refuses("second_question", round_.clients[ring[3]].reveal, round_.signatures(ring[3]))
    assert np.array_equal(round_.unmask()[0], expected_sum(round_))


def test_an_inbox_without_a_neighbours_share_or_with_a_strangers_is_refused(ring12):
    round_, ring = ring12
    near = near_of(round_)
    for i, change in enumerate(("missing", "more")):
        inbox = json.loads(round_.server.inbox(ring[i], round_.adverts, round_.shares))
        other = json.loads(round_.server.inbox(ring[i + 1], round_.adverts, round_.shares))
        stranger = min(other["sealed"].keys() - near[ring[i]] - {ring[i]})
        for rows in ("sealed", "commitments"):
            if change == "missing":
                del inbox[rows][min(near[ring[i]])]
            else:
                inbox[rows][stranger] = other[rows][stranger]
        body = json.dumps(inbox, sort_keys=True, separators=(",", ":"))
        with pytest.raises(Exception, match="every other dealer"):
            round_.clients[ring[i]].open(body)


def test_a_deal_to_others_than_the_neighbours_is_refused(ring12, forge):
    round_, ring = ring12
    near = near_of(round_)
    fields = json.loads(round_.shares[ring[0]])
    stranger = min(set(ring) - near[ring[0]] - {ring[0]})
    for rows in ("sealed", "commitments"):
        more = forge(
            round_.shares[ring[0]], {rows: fields[rows] | {stranger: next(iter(fields[rows].values()))}}, by=ring[0]
        )
        with pytest.raises(Exception, match="every neighbour"):
            round_.server.check_shares(ring[0], more, round_.adverts)


# Policy


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        ({"min_degree": 6}, "policy_degree"),
        ({"min_threshold": 5}, "policy_threshold"),
        ({"colluders": 3}, "policy_colluders"),  # 2 * 4 = 8 is not above 5 + 3
        ({"min_degree": 4, "min_threshold": 4, "colluders": 2}, None),
    ],
)
def test_a_client_keeps_to_its_own_floors(context, join, policy, reason):
    terms = context(9, degree=4, threshold=4)
    if reason:
        refuses(reason, lambda: join(terms, policy=Policy(min_clients=2, **policy)))
    else:
        join(terms, policy=Policy(min_clients=2, **policy))


def test_the_floor_of_the_degree_does_not_hold_for_the_complete_graph(context, join):
    join(context(5), policy=Policy(min_clients=2, min_degree=40))
    join(context(5, degree=4), policy=Policy(min_clients=2, min_degree=40))
