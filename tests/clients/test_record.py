"""What left a site, what it was asked for and who agreed: noted before it happens, kept over restarts, signed."""

import json
import threading
import time

import httpx
import pytest

from murmur.clients import conversation as conversation_module
from murmur.clients.identity import Identity
from murmur.clients.outgoing import KINDS, describe
from murmur.clients.receipt import make_receipt, verify_receipt
from murmur.clients.record import FILE, Record, terms_of
from murmur.protocol.errors import NotFound, OperatorError
from murmur.protocol.messages import Accepted
from murmur.protocol.sections import Dp

from ..waiting import wait_until
from .conftest import NAMES
from .coordinator_double import CoordinatorDouble
from .scripted import A, Script, ok


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(conversation_module, "PACE_S", 0.02)
    monkeypatch.setattr(conversation_module, "CONSENT_S", 0.01)


@pytest.fixture
def double(tmp_path, identities):
    return lambda **options: CoordinatorDouble(tmp_path / "coordinator", identities, **options)


@pytest.fixture
def noted(party):
    """Lets all clients of a double talk, with alpha's requests on its record."""

    def talk(coordinator):
        link = coordinator.link("alpha")
        link.before_sending = party.site("alpha").before_sending
        alpha = threading.Thread(target=party.conversation(coordinator, "alpha", link).run, daemon=True)
        alpha.start()
        party.talk(coordinator, *NAMES[1:])
        alpha.join(60)
        assert not alpha.is_alive()
        return party.site("alpha").record

    return talk


def until(condition, what):
    wait_until(condition, 20, what, every_s=0.01)


# What leaves


def test_each_message_of_a_masked_round_is_on_the_record_with_the_hash_that_the_coordinator_knows(double, noted):
    coordinator = double()
    record = noted(coordinator)
    rows = {m.kind: m for m in record.sent()}
    assert [m.kind for m in reversed(record.sent())] == ["advert", "shares", "update", "result", "agree", "reveal"]
    part = coordinator.parts["alpha"]
    assert rows["update"].sha256 == part.complete.sha256 and rows["update"].masked is True
    assert rows["update"].size == rows["update"].bytes == len(part.received)
    assert rows["result"].said == {"sha256": part.complete.sha256} and rows["result"].masked is None
    assert {m.run for m in record.sent()} == {"run1"} and {m.tries for m in record.sent()} == {1}
    assert {c.kind for c in record.counted()} >= {"token", "download", "question"}


def test_of_a_plain_round_the_record_has_the_weight_and_the_metrics_that_left(double, noted, party):
    party.policies = {name: {"require_secure": False} for name in NAMES}
    record = noted(double(masked=False))
    rows = {m.kind: m for m in record.sent()}
    assert rows["update"].masked is False and rows["result"].masked is False
    assert rows["result"].said["weight"] == 100  # alpha's examples
    assert rows["result"].said["metrics"]["loss"] == {"sum": 2.5, "count": 10.0}
    (asked,) = record.assignments()
    assert asked.state == "delivered" and asked.about.task == "digits" and asked.ended_at


def test_a_message_is_on_the_record_before_its_first_byte_leaves(tmp_path):
    record, seen = Record(tmp_path / FILE), []
    script = Script(lambda request: seen.append([m.kind for m in record.sent()]) or ok({"accepted": True}))
    script.link.before_sending = record.leaves
    script.link.signed("/v1/assignments/r.1.1.alpha/failure", b'{"fence":1,"code":"x","detail":"y"}', Accepted)
    assert seen == [["failure"]]
    assert record.sent()[0].said == {"code": "x", "detail": "y"}


def test_what_cannot_be_noted_does_not_leave(tmp_path):
    (tmp_path / FILE).write_text("no database" * 100)
    script = Script(ok({"accepted": True}))
    script.link.before_sending = Record(tmp_path / FILE).leaves
    with pytest.raises(OperatorError, match="cannot be used"):
        script.link.signed("/v1/assignments/r.1.1.alpha/answers/advert", b"{}", Accepted)
    assert script.requests == [] and script.tokens == 0


def test_the_same_bytes_again_are_one_row_with_one_more_try(tmp_path):
    record = Record(tmp_path / FILE)
    script = Script(httpx.ConnectError("away"), httpx.ReadError("lost"), ok({"accepted": True}))
    script.link.before_sending = record.leaves
    script.link.signed("/v1/assignments/r.1.1.alpha/answers/advert", b"12345", Accepted)
    (row,) = record.sent()
    assert (row.tries, row.size, row.bytes) == (3, 5, 15)


def test_a_message_that_is_not_known_is_on_the_record_too():
    out = describe(httpx.Request("POST", "http://x/v1/assignments/a/later", content=b"abc"))
    assert out.kind == "other" and out.said == {"request": "POST /v1/assignments/a/later"} and not out.counted
    assert describe(httpx.Request("POST", "http://x/v1/assignments/a/answers/later", content=b"abc")).kind == "other"
    assert out.kind in KINDS


# Consent


def test_a_run_waits_for_its_sites_consent_and_goes_on_with_it(double, noted, party):
    party.policies["alpha"] = {"ask": True}
    coordinator, record = double(), party.site("alpha").record

    def answer():
        until(lambda: any(a.state == "waiting" for a in record.assignments()), "a question")
        before.extend(m.kind for m in record.sent())
        record.decide("run1", "approved")

    before = []
    somebody = threading.Thread(target=answer)
    somebody.start()
    noted(coordinator)
    somebody.join()
    assert before == []  # neither keys nor anything else, nor was the model fetched
    assert coordinator.totals()[1].clients == 4 and record.assignments()[0].state == "delivered"


def test_a_run_that_is_denied_hears_so_in_words(double, party):
    party.policies["alpha"] = {"ask": True}
    coordinator, site = double(), party.site("alpha")
    site.record.consent(coordinator.assignments["alpha"])
    site.record.decide("run1", "denied")
    party.talk(coordinator, "alpha")
    failure = coordinator.parts["alpha"].failure
    assert failure.code == "privacy_refusal:policy_ask" and failure.detail.endswith("has said no to run run1")
    assert party.trainers["alpha"].jobs == [] and site.record.assignments()[0].state == "refused"


def test_consent_is_to_what_was_shown_and_other_terms_are_asked_again(tmp_path):
    record = Record(tmp_path / FILE)
    assert record.consent(A) == "waiting"
    record.decide("r", "approved", terms_of(A))
    changed = A.model_copy(update={"train": A.train.model_copy(update={"epochs": 9})})
    assert record.consent(A) == "approved" and record.consent(changed) == "waiting"
    later = A.model_copy(update={"round": 2, "model": "1" * 64, "id": "r.2.1.alpha"})
    assert record.consent(later) == "approved"  # another round of the same
    with pytest.raises(NotFound):
        record.decide("r", "approved", "of no question")
    assert Record(tmp_path / FILE).consent(changed) == "waiting"  # over a restart


def test_a_bound_that_follows_the_updates_is_not_asked_again():
    def of(clip_norm, adaptive):
        dp = Dp(mode="central", clip_norm=clip_norm, noise_multiplier=1.0, adaptive=adaptive)
        return terms_of(A.model_copy(update={"dp": dp}))

    assert of(1.0, True) == of(2.0, True) and of(1.0, False) != of(2.0, False)


# The stop switch


def test_what_is_under_way_ends_with_the_stop_and_only_the_word_of_it_leaves(double, party):
    coordinator, site = double(), party.site("alpha")
    link = coordinator.link("alpha")
    link.before_sending = site.before_sending
    party.trainers["alpha"].hold.clear()
    talk = party.conversation(coordinator, "alpha", link)
    thread = threading.Thread(target=talk.run, daemon=True)
    thread.start()
    assert party.trainers["alpha"].started.wait(60)
    site.switch.stop("a test")
    thread.join(60)  # its sign of life meets the switch
    assert not thread.is_alive()
    assert coordinator.parts["alpha"].failure.code == "privacy_refusal:policy_stopped"
    assert [m.kind for m in site.record.sent()][:1] == ["failure"]


# Receipts


@pytest.fixture
def receipt(party):
    site = party.site("alpha")
    site.record.asked(A)
    for what in ("answers/advert", "answers/shares", "failure"):
        body = b'{"fence":1,"code":"x","detail":"y"}'
        site.before_sending(httpx.Request("POST", f"http://x/v1/assignments/{A.id}/{what}", content=body))
    site.before_sending(httpx.Request("GET", "http://x/v1/blobs/0"))

    def make(month=""):
        return make_receipt(site.settings, site.identity, site.record, site.ledger, month)

    return make


def test_a_receipt_says_what_left_and_its_signature_holds(receipt, identities):
    found = verify_receipt(receipt())
    assert found["client"] == "alpha" and found["fingerprint"] == identities["alpha"].fingerprint
    assert [m["kind"] for m in found["sent"]] == ["advert", "shares", "failure"]
    assert found["asked"][0]["about"]["run"] == "r" and [c["kind"] for c in found["counted"]] == ["download"]


def test_a_receipt_that_was_changed_anywhere_is_refused(receipt):
    data = receipt()
    found = json.loads(data)
    found["sent"][2]["bytes"] -= 1
    for changed in (json.dumps(found).encode(), data.replace(b'"month":null', b'"month":"2026-11"'), data[:-20], b"[]"):
        with pytest.raises(OperatorError, match=r"signature is wrong|no receipt"):
            verify_receipt(changed)


def test_a_receipt_signed_by_another_key_names_that_key(receipt):
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from murmur.clients.receipt import _signed
    from murmur.protocol.encoding import b64

    other = Identity(Ed25519PrivateKey.generate())
    body = {k: v for k, v in json.loads(receipt()).items() if k != "signature"} | {"public_key": other.public_b64}
    forged = json.dumps({**body, "signature": b64(other.key.sign(_signed(body)))}).encode()
    assert verify_receipt(forged)["fingerprint"] == other.fingerprint


def test_a_receipt_of_a_month_has_that_month_alone(receipt):
    now = time.strftime("%Y-%m", time.gmtime())
    assert len(verify_receipt(receipt(now))["sent"]) == 3
    assert verify_receipt(receipt("2020-12"))["sent"] == verify_receipt(receipt("2020-12"))["counted"] == []
    with pytest.raises(OperatorError, match="2026-11"):
        receipt("November")
