"""A client refuses what could make it reveal more than the sum: a lying coordinator, liars among the clients."""

import itertools
import json

import pytest

from murmur.privacy.client import State
from murmur.protocol.encoding import b64, unb64
from murmur.protocol.errors import BadRequest, PrivacyRefusal


def refuses(reason, call, *args, clients=None):
    with pytest.raises(PrivacyRefusal) as refused:
        call(*args)
    assert refused.value.reason == reason, refused.value.detail
    if clients is not None:
        assert refused.value.facts["clients"] == clients


# The roster


@pytest.fixture
def adverted(fleet):
    round_ = fleet(5)
    round_.advertise(round_.context.cohort)
    return round_


def roster_with(round_, changes):
    """The roster with some adverts replaced, whatever the honest coordinator would check."""
    adverts = {u: json.loads(body) for u, body in (round_.adverts | changes).items() if body}
    fields = json.loads(round_.server.roster(round_.adverts))
    return json.dumps(fields | {"adverts": list(adverts.values())}, sort_keys=True, separators=(",", ":"))


def test_an_advert_of_another_round_is_refused(adverted, fleet):
    for changes in ({"round": 2}, {"attempt": 2}, {"model_sha256": "d" * 64}, {"clip_value": 2.0}, {"threshold": 5}):
        other = fleet(5, **changes)
        roster = roster_with(adverted, {"c03": other.clients["c03"].advertise()})
        client = adverted.clients.pop(min(adverted.clients))
        refuses("wrong_context", client.share, roster, clients=["c03"])


def test_a_roster_of_other_terms_is_refused(adverted, forge):
    roster = forge(adverted.server.roster(adverted.adverts), {"context": "0" * 64})
    refuses("wrong_context", adverted.clients["c00"].share, roster)


def test_own_keys_replaced_or_missing_are_refused(adverted, fleet):
    impostor = fleet(5, seed="impostor").clients["c00"].advertise()  # even signed by the same identity
    refuses("own_advert", adverted.clients["c00"].share, roster_with(adverted, {"c00": impostor}))
    refuses("own_advert", adverted.clients["c01"].share, roster_with(adverted, {"c01": ""}))


def test_a_changed_advert_is_refused(adverted, forge):
    other = json.loads(adverted.adverts["c04"])["mask"]
    changed = forge(adverted.adverts["c03"], {"mask": other})
    refuses("bad_signature", adverted.clients["c00"].share, roster_with(adverted, {"c03": changed}), clients=["c03"])


def test_duplicate_keys_are_refused(adverted, forge):
    other = json.loads(adverted.adverts["c04"])
    for i, key in enumerate(("mask", "channel", "identity")):
        signer = "c04" if key == "identity" else "c03"
        changed = forge(adverted.adverts["c03"], {key: other[key]}, by=signer)
        roster = roster_with(adverted, {"c03": changed})
        refuses("duplicate_key", adverted.clients[f"c0{i}"].share, roster, clients=["c03", "c04"])


def test_one_key_for_two_purposes_is_refused(adverted, forge):
    mask = json.loads(adverted.adverts["c03"])["mask"]
    changed = forge(adverted.adverts["c03"], {"channel": mask}, by="c03")
    refuses("duplicate_key", adverted.clients["c00"].share, roster_with(adverted, {"c03": changed}), clients=["c03"])


@pytest.mark.parametrize("use", ["mask", "channel"])
@pytest.mark.parametrize(
    "key",
    [
        bytes(32),
        (1).to_bytes(32, "little"),
        (2**255 - 20).to_bytes(32, "little"),  # -1
        (2**255 - 19).to_bytes(32, "little"),  # 0 again
        (2**255 - 10).to_bytes(32, "little"),  # 9, the base point, in a second spelling
        b"\xff" * 32,
        bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),  # order 8
    ],
)
def test_unusable_public_keys_are_refused(adverted, forge, key, use):
    changed = forge(adverted.adverts["c03"], {use: b64(key)}, by="c03")
    refuses("bad_key", adverted.clients["c00"].share, roster_with(adverted, {"c03": changed}), clients=["c03"])


def test_an_unknown_client_in_the_roster_is_refused(adverted, forge):
    stranger = forge(adverted.adverts["c04"], {"client": "zoe"}, by="c04")
    refuses("not_in_cohort", adverted.clients["c00"].share, roster_with(adverted, {"zoe": stranger}))


def test_a_roster_that_is_too_small_is_refused(adverted):
    small = roster_with(adverted, {"c03": "", "c04": ""})  # 3 of 5, t = 4
    refuses("too_few", adverted.clients["c00"].share, small)


def test_a_client_listed_twice_or_out_of_order_is_refused(adverted):
    fields = json.loads(adverted.server.roster(adverted.adverts))
    for i, rows in enumerate((fields["adverts"] + fields["adverts"][-1:], fields["adverts"][::-1])):
        body = json.dumps(fields | {"adverts": rows}, sort_keys=True, separators=(",", ":"))
        with pytest.raises(BadRequest, match="sorted"):
            adverted.clients[f"c0{i}"].share(body)


def test_two_rosters_do_not_fit_together(adverted):
    """A coordinator tells c00 of c01 .. c03 and the others of everyone: their shares do not open for it."""
    everyone = adverted.context.cohort
    small = {u: adverted.adverts[u] for u in everyone[:4]}
    adverted.shares["c00"] = adverted.clients["c00"].share(adverted.server.roster(small))
    for u in everyone[1:]:
        adverted.shares[u] = adverted.clients[u].share(adverted.server.roster(adverted.adverts))
    refuses("wrong_session", adverted.server.check_shares, "c00", adverted.shares["c00"], adverted.adverts)
    inbox = json.loads(adverted.server.inbox("c01", adverted.adverts, adverted.shares))
    refuses("not_sealed", adverted.clients["c01"].open, json.dumps(inbox, sort_keys=True, separators=(",", ":")))
    lie = inbox | {"client": "c00"}
    refuses("wrong_session", adverted.clients["c00"].open, json.dumps(lie, sort_keys=True, separators=(",", ":")))


# The inbox


@pytest.fixture
def shared(adverted):
    adverted.share(adverted.context.cohort)
    return adverted


def inbox_with(round_, client, change):
    fields = json.loads(round_.server.inbox(client, round_.adverts, round_.shares))
    change(fields)
    return json.dumps(fields, sort_keys=True, separators=(",", ":"))


def test_swapped_ciphertexts_are_refused(shared):
    def swap(fields):
        sealed = fields["sealed"]
        sealed["c01"], sealed["c02"] = sealed["c02"], sealed["c01"]

    refuses("not_sealed", shared.clients["c00"].open, inbox_with(shared, "c00", swap), clients=["c01"])


def test_a_ciphertext_meant_for_another_client_is_refused(shared):
    other = json.loads(shared.server.inbox("c04", shared.adverts, shared.shares))["sealed"]["c01"]
    body = inbox_with(shared, "c00", lambda fields: fields["sealed"].update(c01=other))
    refuses("not_sealed", shared.clients["c00"].open, body, clients=["c01"])


def test_a_ciphertext_does_not_open_in_the_other_direction(shared):
    own = json.loads(shared.shares["c00"])["sealed"]["c01"]
    body = inbox_with(shared, "c00", lambda fields: fields["sealed"].update(c01=own))
    refuses("not_sealed", shared.clients["c00"].open, body, clients=["c01"])


def test_every_flipped_bit_of_a_ciphertext_is_seen(fleet):
    for at in range(0, 80, 13):
        round_ = fleet(3)
        round_.advertise(round_.context.cohort)
        round_.share(round_.context.cohort)

        def flip(fields, at=at):
            data = bytearray(unb64(fields["sealed"]["c01"]))
            data[at] ^= 1 << at % 8
            fields["sealed"]["c01"] = b64(bytes(data))

        refuses("not_sealed", round_.clients["c00"].open, inbox_with(round_, "c00", flip), clients=["c01"])


def test_another_deal_than_the_dealer_made_is_refused(shared):
    body = inbox_with(shared, "c00", lambda fields: fields["deals"].update(c01="0" * 64))
    refuses("not_sealed", shared.clients["c00"].open, body, clients=["c01"])


def test_own_shares_replaced_or_missing_are_refused(shared):
    body = inbox_with(shared, "c00", lambda fields: fields["deals"].update(c00="0" * 64))
    refuses("own_shares", shared.clients["c00"].open, body)
    body = inbox_with(shared, "c01", lambda fields: fields["deals"].pop("c01"))
    refuses("own_shares", shared.clients["c01"].open, body)


def test_shares_that_were_not_committed_to_are_refused_and_their_dealer_named(shared):
    def other(fields):
        fields["commitments"]["c03"][1] = b64(bytes(32))

    refuses("bad_share", shared.clients["c00"].open, inbox_with(shared, "c00", other), clients=["c03"])


def test_too_few_dealers_are_refused(shared):
    def fewer(fields):
        for key, u in itertools.product(("deals", "sealed", "commitments"), ("c03", "c04")):
            fields[key].pop(u)

    refuses("too_few", shared.clients["c00"].open, inbox_with(shared, "c00", fewer))


def test_a_dealer_outside_the_roster_is_refused(fleet):
    round_ = fleet(5)
    round_.advertise(round_.without({"c04"}))
    round_.share(round_.without({"c04"}))
    body = inbox_with(round_, "c00", lambda fields: fields["deals"].update(c04="0" * 64))
    refuses("not_in_cohort", round_.clients["c00"].open, body)


def test_an_inbox_without_every_dealers_share_is_refused(shared):
    with pytest.raises(BadRequest, match="every other dealer"):
        shared.clients["c00"].open(inbox_with(shared, "c00", lambda fields: fields["sealed"].pop("c03")))


def test_an_inbox_of_another_client_is_refused(shared):
    refuses("wrong_session", shared.clients["c00"].open, shared.server.inbox("c01", shared.adverts, shared.shares))


# Agreement and reveal


@pytest.fixture
def uploaded(fleet):
    return fleet(6).until_upload()  # t = 5


def test_a_list_that_leaves_the_client_out_is_refused(uploaded):
    uploaded.uploads.pop("c00")
    told = uploaded.server.survivors(uploaded.adverts, uploaded.shares, uploaded.uploads)
    refuses("left_out", uploaded.clients["c00"].agree, told)


def test_a_list_with_too_few_or_unknown_updates_is_refused(uploaded, forge):
    told = uploaded.server.survivors(uploaded.adverts, uploaded.shares, uploaded.uploads)
    everyone = list(uploaded.context.cohort)
    refuses("too_few", uploaded.clients["c00"].agree, forge(told, {"survivors": everyone[:4]}))
    refuses("unknown_survivor", uploaded.clients["c01"].agree, forge(told, {"survivors": [*everyone, "zoe"]}))
    refuses("wrong_session", uploaded.clients["c02"].agree, forge(told, {"session": "0" * 64}))
    refuses("wrong_session", uploaded.clients["c03"].agree, forge(told, {"shared": "0" * 64}))


def test_a_list_out_of_order_or_with_a_client_twice_is_refused(uploaded, forge):
    """It has one spelling: counted twice, five clients would look like six."""
    told = uploaded.server.survivors(uploaded.adverts, uploaded.shares, uploaded.uploads)
    everyone = list(uploaded.context.cohort)
    for u, clients in (("c00", everyone[::-1]), ("c01", [*everyone[:5], "c04"])):
        with pytest.raises(BadRequest, match="sorted"):
            uploaded.clients[u].agree(forge(told, {"survivors": clients}))


def test_min_clients_above_the_threshold_is_kept(fleet):
    round_ = fleet(6, min_clients=6).until_upload()
    told = json.loads(round_.server.survivors(round_.adverts, round_.shares, round_.uploads))
    told["survivors"].remove("c05")
    body = json.dumps(told, sort_keys=True, separators=(",", ":"))
    refuses("too_few", round_.clients["c00"].agree, body)


def test_two_lists_of_survivors_make_nobody_reveal(uploaded, forge):
    """The coordinator tells three clients of everyone and three that c05 dropped out; no list has t signatures."""
    everyone = uploaded.context.cohort
    lists = {
        "all": uploaded.server.survivors(uploaded.adverts, uploaded.shares, everyone),
        "five": uploaded.server.survivors(uploaded.adverts, uploaded.shares, everyone[:5]),
    }
    told = {u: "five" if u in ("c00", "c01", "c02") else "all" for u in everyone}
    agrees = {u: uploaded.clients[u].agree(lists[told[u]]) for u in everyone}
    refuses("disagreement", uploaded.server.signatures, "c00", uploaded.adverts, agrees)
    for u in everyone:
        mine = {v: agrees[v] for v in everyone if told[v] == told[u]}
        fields = json.loads(agrees[u])
        head = {"kind": "signatures", "session": fields["session"], "survivors": fields["survivors"]}
        filtered = head | {"signatures": {v: json.loads(mine[v])["signature"] for v in mine}}
        mixed = head | {"signatures": {v: json.loads(agrees[v])["signature"] for v in everyone if v != "c05"}}
        lie = filtered if u in ("c00", "c03") else mixed
        reason = "too_few" if lie is filtered else "bad_signature"
        refuses(reason, uploaded.clients[u].reveal, json.dumps(lie, sort_keys=True, separators=(",", ":")))
        assert uploaded.clients[u].state is State.ENDED


def test_a_client_signs_one_list_only(uploaded):
    told = uploaded.server.survivors(uploaded.adverts, uploaded.shares, uploaded.context.cohort)
    other = uploaded.server.survivors(uploaded.adverts, uploaded.shares, uploaded.context.cohort[:5])
    client = uploaded.clients["c00"]
    client.agree(told)
    refuses("second_question", client.agree, other)
    assert client.state is State.ENDED


def test_signatures_of_strangers_or_for_other_lists_are_refused(uploaded, forge):
    uploaded.agree(uploaded.context.cohort)
    body = uploaded.signatures("c00")
    signatures = json.loads(body)["signatures"]
    few = {u: signatures[u] for u in list(signatures)[:4]}
    refuses("too_few", uploaded.clients["c00"].reveal, forge(body, {"signatures": few}))
    zoe = forge(body, {"signatures": signatures | {"zoe": signatures["c00"]}})
    refuses("unknown_survivor", uploaded.clients["c01"].reveal, zoe)
    twice = forge(body, {"signatures": signatures | {"c03": signatures["c00"]}})
    refuses("bad_signature", uploaded.clients["c02"].reveal, twice, clients=["c03"])
    refuses("disagreement", uploaded.clients["c03"].reveal, forge(body, {"survivors": "0" * 64}))
    refuses("wrong_session", uploaded.clients["c04"].reveal, forge(body, {"session": "0" * 64}))
    uploaded.clients["c05"].reveal(body)


def test_a_reveal_for_other_signatures_is_refused_for_good(uploaded):
    uploaded.agree(uploaded.context.cohort)
    client = uploaded.clients["c00"]
    client.reveal(uploaded.signatures("c00"))
    uploaded.agrees.pop("c05")
    refuses("second_question", client.reveal, uploaded.signatures("c00"))
