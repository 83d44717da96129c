"""A run of three rounds and an evaluation, its manifests, and every way in which one of them can be wrong."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from murmur.privacy import bodies
from murmur.privacy.manifest import Manifest, PlainUpdate, Server, digest_of, masked_sum, read, sum_digest
from murmur.privacy.verification import BROKEN, NOTES, Finding, verify
from murmur.protocol.encoding import b64, canonical_json, fingerprint
from murmur.protocol.errors import BadRequest
from murmur.protocol.messages import Kind, Total, settings_digest

from .conftest import Fleet, identity_of, make_context, public_of

SETTINGS = {"mu": 0.0, "seed": 7, "train": {"lr": 0.1}, "weighting": "examples", "metrics": ["loss"]}
COHORT = tuple(f"c{i:02}" for i in range(4))
DROPPED = {2: "c03"}  # round -> who deals shares in it and uploads nothing


def model(n: int) -> str:
    return hashlib.sha256(f"version {n}".encode()).hexdigest()


def made(n: int, previous: str | None, **changes: Any) -> Manifest:
    """Round n of the run: 1 to 3 train, 4 evaluates."""
    kind = Kind.TRAIN if n < 4 else Kind.EVALUATE
    values = {
        "run": "r1",
        "round": n,
        "attempt": 1,
        "kind": kind,
        "task": "digits",
        "previous": previous,
        "base": model(n - 1),
        "version": model(n) if n < 4 else None,
        "settings": SETTINGS,
        "server": Server(
            strategy={"server": "Adam"},
            optimizer_before=model(10 + n - 1) if n > 1 else None,
            optimizer_after=model(10 + n) if n < 4 else None,
        ),
        "cohort": COHORT,
        "metrics": {str(n): {"loss": Total(sum=2.5, count=10.0)}},
    }
    return Manifest.model_validate(values | changes)


def masked(n: int, previous: str | None) -> Manifest:
    digest = settings_digest(SETTINGS)
    kind = "train" if n < 4 else "evaluate"
    terms = make_context(4, 10, round=n, kind=kind, model_sha256=model(n - 1), settings_sha256=digest)
    fleet = Fleet(terms, seed=f"round {n}")
    inside = fleet.without({DROPPED.get(n, "")})
    for phase in (fleet.advertise, fleet.share, fleet.open):
        phase(COHORT)
    for phase in (fleet.upload, fleet.agree, fleet.reveal):
        phase(inside)
    ring, aux = fleet.unmask()
    messages = {"adverts": fleet.adverts, "shares": fleet.shares, "survivors": fleet.told, "agrees": fleet.agrees}
    return made(n, previous, sums=(masked_sum(terms, **messages, unmasked=(ring, aux)),))


def plain(n: int, previous: str | None) -> Manifest:
    return made(n, previous, updates=[PlainUpdate(client=u, sha256=model(n), weight=3) for u in COHORT])


def history(make: Callable[[int, str | None], Manifest]) -> list[str]:
    texts: list[str] = []
    for n in range(1, 5):
        texts.append(make(n, digest_of(texts[-1]) if texts else None).text())
    return texts


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return history(masked)


def checked(texts: list[str], **known: Any):
    return verify({f"round-{i + 1}": text for i, text in enumerate(texts)}, **known)


def keys() -> dict[str, str]:
    return {u: b64(public_of(u)) for u in COHORT}


def test_a_run_as_it_was_is_good_and_says_what_was_not_checked(texts: list[str]):
    report = checked(texts)
    assert report.ok and report.broken == ()
    (chain,) = report.chains
    assert (chain.run, chain.first, chain.last, chain.masked, chain.plain) == ("r1", 1, 4, 4, 0)
    assert (chain.version, chain.clients) == (model(3), COHORT)
    assert [n.code for n in report.notes] == ["identities_unchecked", "models_unchecked"]


def test_everything_known_is_compared(texts: list[str]):
    listed = keys() | {"c01": fingerprint(public_of("c01"))}
    report = checked(texts, identities=listed, models={"final.safetensors": model(3), f"{model(0)}.st": model(0)})
    assert report.ok and report.notes == ()


def test_a_part_of_a_run_is_good_and_says_where_it_begins(texts: list[str]):
    report = checked(texts[2:])
    assert report.ok and (report.notes[0].code, report.notes[0].round) == ("starts_late", 3)


def test_plain_rounds_are_chained_and_said_to_be_unsigned():
    report = checked(history(plain), models={})
    assert report.ok and [n.code for n in report.notes] == ["plain"]
    changed = history(plain)
    changed[1] = changed[1].replace('"weight":3.0', '"weight":4.0', 1)
    assert [f.code for f in checked(changed).broken] == ["other_past"]


def test_nothing_at_all_is_not_good():
    assert not verify({}).ok


def test_no_secret_share_reveal_or_upload_stands_in_it(texts: list[str]):
    fleet = Fleet(make_context(4, 10, settings_sha256=settings_digest(SETTINGS), model_sha256=model(0)), seed="round 1")
    fleet.until_reveal()
    assert (
        fleet.adverts["c00"]
        and bodies.load(fleet.adverts["c00"], "advert", bodies.Advert.KEYS, members=4)["mask"] in texts[0]
    ), "the very same round"
    for u in COHORT:
        for body in (fleet.shares[u], fleet.reveals[u]):
            fields = json.loads(body)
            hidden = [*fields.get("sealed", {}).values(), *fields.get("self", {}).values()]
            hidden += [c for pair in fields.get("commitments", {}).values() for c in pair]
            assert hidden and not [value for value in hidden if value in texts[0]]
        assert hashlib.sha256(fleet.uploads[u]).hexdigest() not in texts[0]


def test_the_hash_of_the_sum_is_that_of_its_bytes():
    ring, aux = np.array([1, 2**32 - 1], np.uint32), np.array([3, 2**64 - 1], np.uint64)
    data = bytes([3, *[0] * 7, *[255] * 8, 1, 0, 0, 0, *[255] * 4])
    assert sum_digest(ring, aux) == hashlib.sha256(data).hexdigest()


def test_a_manifest_reads_back_and_another_spelling_is_refused(texts: list[str]):
    assert read(texts[0]).text() == texts[0]
    for wrong in (texts[0] + "\n", texts[0].replace(":", ": ", 1), "", "{}", "[" * 10_000, "\x00", '{"format":"x"}'):
        with pytest.raises(BadRequest):
            read(wrong)
    assert [f.code for f in verify({"a file": "{}"}).broken] == ["not_a_manifest"]


# What can be wrong. Each changes round 2 as a dict; its successor is chained anew, so that nothing else is broken.

Change = Callable[[dict[str, Any]], None]


def terms_of(m: dict[str, Any]) -> dict[str, Any]:
    return m["sums"][0]["terms"]


def signed_again(m: dict[str, Any], **changes: Any) -> None:
    """What a coordinator could do that holds c00's key: change its keys and sign them."""
    advert = m["sums"][0]["adverts"][0]
    fields = {k: v for k, v in (advert | changes).items() if k not in ("kind", "signature")}
    m["sums"][0]["adverts"][0] = json.loads(bodies.dump_signed("advert", fields, identity_of("c00")))


def unsigned_terms(m: dict[str, Any]) -> None:
    terms_of(m)["min_clients"] = 3
    m["sums"][0]["context"] = hashlib.sha256(canonical_json(terms_of(m))).hexdigest()


def shared_nothing(m: dict[str, Any]) -> None:
    part = m["sums"][0]
    del part["deals"]["c02"]
    deals = {u: bytes.fromhex(deal) for u, deal in part["deals"].items()}
    part["shared"] = bodies.shared_digest(bytes.fromhex(part["session"]), deals).hex()


def signature_of_nobody(m: dict[str, Any]) -> None:
    m["sums"][0]["agrees"]["c00"] = b64(bytes(64))


def swapped(m: dict[str, Any]) -> None:
    agrees = m["sums"][0]["agrees"]
    agrees["c00"], agrees["c01"] = agrees["c01"], agrees["c00"]


CHANGES: list[tuple[str, str, Change]] = [
    ("other_past", "another past", lambda m: m.update(previous="0" * 64)),
    ("other_past", "no past", lambda m: m.update(previous=None)),
    ("other_model", "another start", lambda m: m.update(base=model(0))),
    ("other_terms", "a start that was not signed", lambda m: m.update(base=model(0))),
    ("other_optimizer", "another state", lambda m: m["server"].update(optimizer_before=model(99))),
    ("bad_version", "no version", lambda m: m.update(version=None)),
    ("bad_version", "an evaluation with a version", lambda m: m.update(kind="evaluate")),
    ("bad_terms", "a low threshold", lambda m: terms_of(m).update(threshold=2)),
    ("bad_terms", "a word for a number", lambda m: terms_of(m).update(threshold="3")),
    ("bad_terms", "an unknown term", lambda m: terms_of(m).update(mercy=True)),
    ("bad_terms", "a missing term", lambda m: terms_of(m).pop("aux")),
    ("bad_terms", "another spelling", lambda m: terms_of(m).update(clip_value=1)),
    ("other_terms", "another training", lambda m: m["settings"].update(mu=0.5)),
    ("other_terms", "another attempt", lambda m: m.update(attempt=2)),
    ("other_terms", "another digest", lambda m: m["sums"][0].update(context="0" * 64)),
    ("bad_advert", "terms that nobody signed", unsigned_terms),
    ("bad_advert", "a key that was not signed", lambda m: m["sums"][0]["adverts"][0].update(mask=b64(bytes(32)))),
    ("bad_advert", "twice the same", lambda m: m["sums"][0]["adverts"].append(m["sums"][0]["adverts"][0])),
    ("other_session", "keys of another day", lambda m: signed_again(m, mask=b64(b"\x09" + bytes(31)))),
    ("other_session", "one client fewer", lambda m: m["sums"][0]["adverts"].pop()),
    ("other_shares", "another deal", lambda m: m["sums"][0]["deals"].update(c00="0" * 64)),
    ("other_cohort", "a stranger in the sum", lambda m: m["sums"][0].update(survivors=["c00", "c01", "c09"])),
    ("bad_survivors", "one that shared nothing", shared_nothing),
    ("other_cohort", "a client twice", lambda m: m["sums"][0].update(survivors=["c00", "c01", "c01"])),
    ("bad_survivors", "out of order", lambda m: m["sums"][0]["survivors"].reverse()),
    ("too_few", "two in the sum", lambda m: m["sums"][0].update(survivors=["c00", "c01"])),
    ("bad_agreement", "one more in the sum", lambda m: m["sums"][0].update(survivors=list(COHORT))),
    ("bad_agreement", "a signature of nobody", signature_of_nobody),
    ("bad_agreement", "signatures swapped", swapped),
    ("bad_agreement", "not base64", lambda m: m["sums"][0]["agrees"].update(c00="?")),
    ("bad_agreement", "who is not in the sum", lambda m: m["sums"][0]["agrees"].update(c03=b64(bytes(64)))),
    ("too_few", "two signatures", lambda m: m["sums"][0]["agrees"].pop("c00")),
    ("too_few", "no sum", lambda m: m.update(sums=[])),
    ("other_cohort", "fewer asked", lambda m: m["cohort"].pop()),
    ("other_cohort", "one more asked", lambda m: m["cohort"].append("c04")),
    ("other_cohort", "asked twice", lambda m: m["cohort"].append("c03")),
    ("not_a_manifest", "a member more", lambda m: m.update(mood="good")),
    ("not_a_manifest", "another format", lambda m: m.update(format="murmur manifest 2")),
]


@pytest.mark.parametrize(("code", "what", "change"), CHANGES, ids=[f"{c}: {w}" for c, w, _ in CHANGES])
def test_what_is_wrong_with_a_round_is_found_in_that_round(texts: list[str], code: str, what: str, change: Change):
    second = json.loads(texts[1])
    change(second)
    changed = [texts[0], canonical_json(second).decode()]
    third = json.loads(texts[2]) | {"previous": digest_of(changed[1])}
    found = checked([*changed, canonical_json(third).decode()]).broken
    where = 0 if code == "not_a_manifest" else 2
    assert code in {f.code for f in found if f.round == where}, (what, found)
    assert found[0].round == where


def test_the_first_broken_link_is_named_when_a_round_was_changed_and_nothing_else(texts: list[str]):
    for n in (1, 2, 3):  # in a field that nobody signed: the next round gives it away
        changed = [t.replace('"task":"digits"', '"task":"others"') if i == n - 1 else t for i, t in enumerate(texts)]
        assert [(f.code, f.round) for f in checked(changed).broken] == [("other_past", n + 1)]


def test_a_round_that_is_left_out_or_there_twice_is_found(texts: list[str]):
    assert [(f.code, f.round) for f in checked([texts[0], *texts[2:]]).broken] == [("missing_round", 3)]
    fork = texts[1].replace('"task":"digits"', '"task":"others"')
    assert [(f.code, f.round) for f in checked([*texts, fork]).broken] == [("two_manifests", 2)]
    assert checked([*texts, texts[1]]).ok


def test_a_key_that_is_not_on_the_list_is_found_in_each_round(texts: list[str]):
    wrong = checked(texts, identities=keys() | {"c02": b64(bytes(32))}).broken
    assert [(f.code, f.round) for f in wrong] == [("untrusted", n) for n in (1, 2, 3, 4)]
    assert "c02" in wrong[0].detail and "another is on the list" in wrong[0].detail
    unknown = checked(texts, identities={u: key for u, key in keys().items() if u != "c02"}).broken
    assert "the list does not name it" in unknown[0].detail


def test_a_client_that_changes_its_key_between_rounds_is_found_without_any_list(texts: list[str]):
    """Round 3 of another run, in which somebody else calls itself c00."""
    other = json.loads(texts[2])
    part = other["sums"][0]
    terms = make_context(4, 10, run="r2", settings_sha256=settings_digest(SETTINGS), model_sha256=model(2), round=3)
    fleet = Fleet(terms)
    impostor = fleet.clients["c00"]
    impostor._identity = identity_of("somebody else")  # pyright: ignore[reportPrivateUsage]
    fleet.server._identities["c00"] = public_of("somebody else")  # pyright: ignore[reportPrivateUsage]
    fleet.until_reveal()
    ring, aux = fleet.unmask()
    messages = {"adverts": fleet.adverts, "shares": fleet.shares, "survivors": fleet.told, "agrees": fleet.agrees}
    part = masked_sum(terms, **messages, unmasked=(ring, aux)).model_dump(mode="json")
    text = canonical_json(other | {"run": "r2", "sums": [part]}).decode()
    assert checked([text]).ok
    assert [(f.code, f.run, f.round) for f in checked([*texts, text]).broken] == [("changed_key", "r2", 3)]


def test_a_model_file_must_be_the_one_that_its_name_or_a_round_says(texts: list[str]):
    for name, sha256 in ((f"{model(1)}.safetensors", model(2)), ("final.safetensors", model(77))):
        (found,) = checked(texts, models={name: sha256}).broken
        assert (found.code, name in found.detail, sha256 in found.detail) == ("other_file", True, True)


def places(value: Any, *path: Any) -> list[tuple[Any, ...]]:
    """The path to everything in a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [found for key, item in inside for found in places(item, *path, key)]


def test_nothing_that_stands_in_a_manifest_stops_the_check(texts: list[str]):
    """Whatever is replaced, there is a report; and it is good only where nobody signed what was replaced."""
    free = {"task", "server", "metrics", "dp", "previous", "version", "sum_sha256"}
    for path in places(json.loads(texts[1])):
        for odd in (None, "", -1, 10**400, [], {"a": [1]}):
            manifest = json.loads(texts[1])
            place = manifest
            for key in path[:-1]:
                place = place[key]
            if place[path[-1]] == odd:
                continue
            place[path[-1]] = odd
            report = verify({"": canonical_json(manifest).decode()})
            assert not report.ok or path[0] in free or path[-1] in free, (path, odd)


def test_every_code_has_a_sentence_and_a_test():
    tested = {code for code, _, _ in CHANGES}
    assert tested | {"two_manifests", "missing_round", "changed_key", "untrusted", "other_file"} == BROKEN.keys()
    for sentence in (*BROKEN.values(), *NOTES.values()):
        assert sentence.endswith(".")
    assert Finding(code="plain").sentence == NOTES["plain"]
