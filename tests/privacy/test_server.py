"""The coordinator names whoever breaks the protocol, goes on without them where it can, and survives any input."""

import json

import numpy as np
import pytest

from murmur.privacy import bodies, keys, shamir
from murmur.privacy.server import ServerSession
from murmur.protocol.encoding import b64, unb64
from murmur.protocol.errors import BadRequest, PrivacyRefusal


def refuses(reason, call, *args, clients=None, **options):
    with pytest.raises(PrivacyRefusal) as refused:
        call(*args, **options)
    assert refused.value.reason == reason, refused.value.detail
    if clients is not None:
        assert refused.value.facts["clients"] == clients


def unmask_args(round_):
    ring, aux = round_.sums()
    messages = {"adverts": round_.adverts, "shares": round_.shares, "survivors": round_.told, "reveals": round_.reveals}
    return messages | {"ring_sum": ring, "aux_sum": aux}


def wrong(share):
    """Another share, still a number below the prime."""
    return b64(share[:-1] + bytes([share[-1] ^ 1]))


# Bad shares and dishonest dealers


def spoil(round_, forge, holder, dealer):
    shown = json.loads(round_.reveals[holder])
    shown["self"][dealer] = wrong(unb64(shown["self"][dealer]))
    round_.reveals[holder] = forge(round_.reveals[holder], {"self": shown["self"]}, by=holder)


def test_a_wrong_share_is_refused_at_the_door_and_its_holder_named(fleet, forge):
    round_ = fleet(5).until_reveal()
    spoil(round_, forge, "c01", "c03")
    args = ("c01", round_.reveals["c01"], round_.adverts, round_.shares, round_.told)
    refuses("bad_share", round_.server.check_reveal, *args, clients=["c01"])


def test_a_wrong_share_is_tolerated_while_enough_are_right(fleet, forge, block):
    round_ = fleet(5).until_reveal()  # t = 4
    spoil(round_, forge, "c01", "c03")
    ring, aux = round_.unmask()
    assert [(f.client, f.reason) for f in round_.faults] == [("c01", "bad_share")]
    assert block.decode(aux).clients == 5
    clean = fleet(5).until_reveal()
    assert np.array_equal(ring, clean.unmask()[0])
    assert clean.faults == ()


def test_too_many_wrong_shares_stop_the_round_and_all_are_named(fleet, forge):
    round_ = fleet(5).until_reveal()
    spoil(round_, forge, "c01", "c03")
    spoil(round_, forge, "c04", "c00")
    args = unmask_args(round_)
    before = args["ring_sum"].copy()
    refuses("too_few", round_.server.unmask, clients=["c01", "c04"], **args)
    assert np.array_equal(args["ring_sum"], before)


def test_a_malformed_stored_reveal_is_a_fault_and_not_a_crash(fleet):
    round_ = fleet(5).until_reveal()
    round_.reveals["c02"] = "{"
    round_.unmask()
    assert [(f.client, f.reason) for f in round_.faults] == [("c02", "bad_request")]


def deal_badly(round_, identity, me, which, how):
    """Let a client deal shares that rebuild nothing, or another secret, yet commit to each of them."""
    client, cohort, t = round_.clients[me], round_.context.cohort, round_.context.threshold
    secrets, session, positions = client._secrets, client._session, range(1, len(cohort) + 1)
    dealt = {}
    for place, secret in (("self", secrets.secret), ("mask", secrets.seed)):
        degree = len(cohort) if (place, how) == (which, "too high a degree") else t
        other = b"x" * 31 if (place, how) == (which, "another secret") else secret
        dealt[place] = shamir.split(other, positions, degree, client._random)
    commitments, sealed = {}, {}
    for x, u in enumerate(cohort, 1):
        commitments[u] = [b64(keys.commit_share(session, me, u, w, dealt[w][x])) for w in ("self", "mask")]
    committed = b64(keys.commit_secret(session, me, secrets.secret))
    client._deal = bodies.deal_digest(commitments, committed)
    for x, u in enumerate(cohort, 1):
        if u == me:
            secrets.held[me] = (dealt["self"][x], dealt["mask"][x])
            continue
        common = keys.exchange(secrets.channel, client._adverts[u].channel, u)
        sealed[u] = b64(keys.seal(common, dealt["self"][x] + dealt["mask"][x], session, me, u, client._deal))
    fields = {"client": me, "commitments": commitments, "sealed": sealed, "secret": committed}
    round_.shares[me] = bodies.dump_signed("shares", fields | {"session": session.hex()}, identity(me))
    round_.server.check_shares(me, round_.shares[me], round_.adverts)


@pytest.mark.parametrize("how", ["too high a degree", "another secret"])
@pytest.mark.parametrize("which", ["self", "mask"])
def test_a_dishonest_dealer_is_named(fleet, identity, which, how):
    """Every share is the one committed to, so nobody can tell until the secret is rebuilt."""
    round_ = fleet(5)
    everyone = round_.context.cohort
    round_.advertise(everyone)
    round_.share(everyone)
    deal_badly(round_, identity, "c03", which, how)
    round_.open(everyone)
    staying = round_.without({"c03"} if which == "mask" else set())
    for phase in (round_.upload, round_.agree, round_.reveal):
        phase(staying)
    args = unmask_args(round_)
    before = args["ring_sum"].copy()
    refuses("bad_dealer", round_.server.unmask, clients=["c03"], **args)
    assert np.array_equal(args["ring_sum"], before)


def test_a_dealer_that_lies_about_the_secret_that_is_not_needed_does_no_harm(fleet, identity, block):
    round_ = fleet(5)
    everyone = round_.context.cohort
    round_.advertise(everyone)
    round_.share(everyone)
    deal_badly(round_, identity, "c03", "mask", "another secret")  # c03 stays, so its seed is never rebuilt
    for phase in (round_.open, round_.upload, round_.agree, round_.reveal):
        phase(everyone)
    assert block.decode(round_.unmask()[1]).clients == 5


# Inconsistent messages at the door


def test_an_advert_under_another_identity_than_enrolled_is_refused(fleet, forge, identity):
    round_ = fleet(4)
    body = round_.clients["c01"].advertise()
    other = b64(identity("mallory").public_key().public_bytes_raw())
    forged = forge(body, {"identity": other}, by="mallory")
    refuses("changed_key", round_.server.check_advert, "c01", forged, clients=["c01"])


def test_a_message_of_another_client_is_refused(fleet):
    round_ = fleet(5).until_reveal()
    server = round_.server
    for check, body, rest in (
        (server.check_advert, round_.adverts["c02"], ()),
        (server.check_shares, round_.shares["c02"], (round_.adverts,)),
        (server.check_agree, round_.agrees["c02"], (round_.told,)),
        (server.check_reveal, round_.reveals["c02"], (round_.adverts, round_.shares, round_.told)),
    ):
        with pytest.raises(BadRequest, match="another client"):
            check("c01", body, *rest)
        check("c02", body, *rest)


def test_strangers_are_refused_at_every_door(fleet):
    round_ = fleet(5).until_reveal()
    server = round_.server
    refuses("not_in_cohort", server.check_advert, "zoe", round_.adverts["c02"])
    refuses("not_in_cohort", server.check_shares, "zoe", round_.shares["c02"], round_.adverts)
    refuses("not_in_cohort", server.inbox, "zoe", round_.adverts, round_.shares)
    refuses("not_in_cohort", server.survivors, round_.adverts, round_.shares, [*round_.context.cohort, "zoe"])
    refuses("left_out", server.check_agree, "zoe", round_.agrees["c02"], round_.told)
    args = (round_.adverts, round_.shares, round_.told)
    refuses("left_out", server.check_reveal, "zoe", round_.reveals["c02"], *args)


def test_a_client_that_missed_a_phase_takes_no_part_in_the_next(fleet):
    round_ = fleet(5)
    round_.advertise(round_.without({"c04"}))
    round_.share(round_.without({"c04"}))
    late = round_.shares["c03"]
    refuses("not_in_cohort", round_.server.check_shares, "c04", late, round_.adverts, clients=["c04"])
    refuses("not_in_cohort", round_.server.inbox, "c04", round_.adverts, round_.shares, clients=["c04"])


def test_messages_have_one_spelling(fleet):
    """Whoever may choose between spellings could make two that are both signed, or hide a number that JSON lacks."""
    round_ = fleet(4)
    good = round_.clients["c01"].advertise()
    fields = json.loads(good)
    other = fields["signature"][:85] + chr(ord(fields["signature"][85]) + 1) + "=="  # unused bits of the last digit
    assert unb64(other) == unb64(fields["signature"])
    spellings = [
        good + " ",
        good.replace(":", ": ", 1),
        json.dumps(dict(reversed(fields.items())), separators=(",", ":")),
        good.replace('"c01"', '"\\u00631"'),
        good.replace('"client":"c01",', '"client":"c00","client":"c01",'),
        good.replace('"c01"', "1e999"),
        good.replace('"c01"', "NaN"),
        good.replace(fields["signature"], other),
        good.replace(fields["context"], fields["context"].upper()),
    ]
    for body in spellings:
        assert body != good
        with pytest.raises(BadRequest):
            round_.server.check_advert("c01", body)
    round_.server.check_advert("c01", good)


def test_messages_of_another_attempt_are_refused(fleet):
    one, two = fleet(5).until_reveal(), fleet(5, attempt=2).until_reveal()
    server = one.server
    refuses("wrong_context", server.check_advert, "c01", two.adverts["c01"])
    refuses("wrong_session", server.check_shares, "c01", two.shares["c01"], one.adverts)
    refuses("disagreement", server.check_agree, "c01", two.agrees["c01"], one.told)
    args = (one.adverts, one.shares, one.told)
    refuses("wrong_session", server.check_reveal, "c01", two.reveals["c01"], *args)
    refuses("wrong_session", server.check_reveal, "c01", one.reveals["c01"], one.adverts, one.shares, two.told)


def test_changed_messages_do_not_carry_their_signature(fleet, forge):
    round_ = fleet(5).until_reveal()
    server, other = round_.server, "0" * 64
    shares = forge(round_.shares["c01"], {"secret": b64(bytes(32))})
    refuses("bad_signature", server.check_shares, "c01", shares, round_.adverts)
    refuses("bad_signature", server.check_agree, "c01", forge(round_.agrees["c01"], {"survivors": other}), round_.told)
    reveal = forge(round_.reveals["c01"], {"session": other})
    refuses("bad_signature", server.check_reveal, "c01", reveal, round_.adverts, round_.shares, round_.told)


def test_a_deal_must_cover_the_whole_roster(fleet, forge):
    round_ = fleet(4)
    round_.advertise(round_.context.cohort)
    round_.share(round_.context.cohort)
    fields = json.loads(round_.shares["c01"])
    for key, u in (("sealed", "c02"), ("commitments", "c02"), ("commitments", "c01")):
        fewer = {v: x for v, x in fields[key].items() if v != u}
        with pytest.raises(BadRequest, match="every neighbour"):
            round_.server.check_shares("c01", forge(round_.shares["c01"], {key: fewer}, by="c01"), round_.adverts)


def test_a_reveal_must_hold_exactly_what_is_asked_for(fleet, forge):
    round_ = fleet(5).until_reveal()
    shown = json.loads(round_.reveals["c01"])["self"]
    args = (round_.adverts, round_.shares, round_.told)
    more = {"self": {u: shown[u] for u in list(shown)[1:]}}, {"mask": {"c00": shown["c00"]}}
    for change in more:
        with pytest.raises(BadRequest, match="is asked for"):
            round_.server.check_reveal("c01", forge(round_.reveals["c01"], change, by="c01"), *args)


def test_two_clients_with_the_same_keys_are_not_put_in_one_roster(fleet, forge):
    round_ = fleet(4)
    round_.advertise(round_.context.cohort)
    copied = json.loads(round_.adverts["c01"])["mask"]
    round_.adverts["c02"] = forge(round_.adverts["c02"], {"mask": copied}, by="c02")
    round_.server.check_advert("c02", round_.adverts["c02"])  # alone it is a good advert
    refuses("duplicate_key", round_.server.roster, round_.adverts, clients=["c01", "c02"])


def test_the_coordinator_itself_stops_below_the_threshold(fleet):
    round_ = fleet(5).until_reveal()
    few = round_.context.cohort[:3]
    server, cut = round_.server, lambda rows: {u: rows[u] for u in few}
    refuses("too_few", server.roster, cut(round_.adverts))
    refuses("too_few", server.inbox, "c00", round_.adverts, cut(round_.shares))
    refuses("too_few", server.survivors, round_.adverts, round_.shares, few)
    refuses("too_few", server.signatures, "c00", round_.adverts, cut(round_.agrees))
    args = unmask_args(round_)
    told = json.loads(round_.told) | {"survivors": list(few)}
    args["survivors"] = json.dumps(told, sort_keys=True, separators=(",", ":"))
    refuses("too_few", server.unmask, **args)
    rest = (round_.adverts, round_.shares, args["survivors"])
    refuses("too_few", server.check_reveal, "c00", round_.reveals["c00"], *rest)
    assert server.listed(round_.told) == round_.context.cohort


def test_a_restarted_coordinator_goes_on_from_the_stored_messages(fleet, block):
    """A new session before every phase, and the messages as they come back from rows, in another order."""
    round_ = fleet(5)
    identities = dict(round_.server._identities)

    def restart():
        bodies._load_shares.cache_clear()
        round_.server = ServerSession(round_.context, identities)
        for rows in (round_.adverts, round_.shares, round_.agrees, round_.reveals):
            kept = dict(reversed(rows.items()))
            rows.clear()
            rows.update(kept)

    for phase in (round_.advertise, round_.share, round_.open, round_.upload, round_.agree, round_.reveal):
        restart()
        phase(
            round_.without({"c04"}) if phase in (round_.upload, round_.agree, round_.reveal) else round_.context.cohort
        )
    restart()
    assert block.decode(round_.unmask()[1]).clients == 4
