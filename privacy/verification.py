"""Checks the manifests of runs, with nothing but the manifests: what was signed, what is chained, what holds.

What this shows: who took part under which keys, that enough of them signed one list of whose updates were summed, under
which terms, and that no round was changed afterwards. What it cannot show: that the version was computed from the sum
whose hash stands there (the sum itself is not kept), that a plain round is what the coordinator says, and that the keys
belong to whom they are said to, unless they are compared with a list.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath

from ..protocol.encoding import DIGEST, b64, canonical_json, fingerprint
from ..protocol.errors import BadRequest, PrivacyRefusal
from ..protocol.messages import Kind, settings_digest
from . import bodies
from .context import Context
from .manifest import Manifest, MaskedSum, digest_of, read

BROKEN: dict[str, str] = {
    "not_a_manifest": "This is no manifest, or not one that this release can read.",
    "two_manifests": "Two different manifests stand for one round.",
    "missing_round": "The manifest of a round is missing.",
    "other_past": "It does not name the manifest of the round before: one of the two was changed.",
    "other_model": "It does not start from the version that the round before made.",
    "other_optimizer": "It does not start from the optimizer's state that the round before left.",
    "bad_version": "A training round made no version, or an evaluation made one.",
    "bad_terms": "Under its terms no masked sum may be taken.",
    "other_terms": "The terms that the clients signed are not those that the manifest states.",
    "other_cohort": "The clients of its sums are not those that were asked.",
    "bad_advert": "A client's keys are not what it signed.",
    "other_session": "Its session is not that of its terms and keys.",
    "other_shares": "What the masks depend on is not what the clients shared.",
    "bad_survivors": "Its list of whose updates are in the sum cannot be right.",
    "bad_agreement": "A client did not sign this list of whose updates are in the sum.",
    "too_few": "Too few clients signed, or are in the sum.",
    "changed_key": "A client took part under another key than in another round.",
    "untrusted": "A client took part under a key that is not on the list of trusted keys.",
    "other_file": "A model file is no version of these rounds, or not the one that it is named as.",
}
"""What is wrong with a round, by stable code."""

NOTES: dict[str, str] = {
    "identities_unchecked": "Whose keys these are was not checked: compare them with a list of trusted keys.",
    "starts_late": "The rounds before the first one are not covered.",
    "plain": "Rounds without masks carry no client's signature: for them the coordinator's word stands alone.",
    "models_unchecked": "The model files were not compared.",
}
"""What was not checked, by stable code."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """Something about a round (0: about no round in particular), with a known code."""

    code: str
    run: str = ""
    round: int = 0
    detail: str = ""

    @property
    def sentence(self) -> str:
        """What it is, in words, without the detail."""
        return BROKEN.get(self.code) or NOTES[self.code]


@dataclass(frozen=True, kw_only=True, slots=True)
class Chain:
    """The rounds of one run that were checked. `version`: of the last one that made any."""

    run: str
    first: int
    last: int
    masked: int
    plain: int
    version: str | None
    clients: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """All that was found, by run and round; `broken` is empty where everything holds."""

    chains: tuple[Chain, ...]
    broken: tuple[Finding, ...]
    notes: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        return bool(self.chains) and not self.broken


class _Broken(Exception):
    def __init__(self, code: str, detail: str) -> None:
        super().__init__(code)
        self.code, self.detail = code, detail


@dataclass
class _Run:
    """What one run's manifests say."""

    texts: dict[int, str] = field(default_factory=dict[int, str])
    rounds: dict[int, Manifest] = field(default_factory=dict[int, Manifest])


def verify(
    manifests: Mapping[str, str],
    *,
    identities: Mapping[str, str] | None = None,
    models: Mapping[str, str] | None = None,
) -> Report:
    """Check manifests against each other and themselves.

    manifests: texts, by the name that a finding about an unreadable one gives. identities: what is known of clients'
    keys, by client, as base64 or fingerprint; a client that is not on the list is a finding. models: SHA-256 of model
    files, by file name. Never raises for what a manifest says.
    """
    broken: list[Finding] = []
    runs: dict[str, _Run] = {}
    for name, text in manifests.items():
        try:
            found = read(text)
        except BadRequest as error:
            broken.append(Finding(code="not_a_manifest", detail=f"{name}: {error.detail}"))
            continue
        run = runs.setdefault(found.run, _Run())
        if run.texts.setdefault(found.round, text) != text:
            broken.append(Finding(code="two_manifests", run=found.run, round=found.round, detail=f"one is {name}"))
            continue
        run.rounds[found.round] = found
    keys: dict[str, tuple[str, str, int]] = {}
    for name in sorted(runs):
        broken += _check_run(name, runs[name], identities, keys)
    broken += _check_files(runs, models or {})
    chains = tuple(_chain(name, [run.rounds[n] for n in sorted(run.rounds)]) for name, run in sorted(runs.items()))
    return Report(chains=chains, broken=tuple(broken), notes=tuple(_notes(chains, identities, models)))


def _check_run(
    name: str, run: _Run, identities: Mapping[str, str] | None, keys: dict[str, tuple[str, str, int]]
) -> Generator[Finding]:
    before: int | None = None
    for n in sorted(run.rounds):
        manifest = run.rounds[n]
        try:
            if before is None:
                _check_first(manifest)
            else:
                _check_link(run.texts[before], run.rounds[before], manifest)
        except _Broken as found:
            yield Finding(code=found.code, run=name, round=n, detail=found.detail)
        try:
            for client, key in _check_content(manifest).items():
                _check_key(client, key, identities, keys.setdefault(client, (b64(key), name, n)))
        except _Broken as found:
            yield Finding(code=found.code, run=name, round=n, detail=found.detail)
        before = n


# The chain


def _check_first(manifest: Manifest) -> None:
    if manifest.round == 1 and manifest.previous is not None:
        raise _Broken("other_past", "it is the first round, and names one before it")


def _check_link(text: str, before: Manifest, after: Manifest) -> None:
    if after.round != before.round + 1:
        missing = f"{before.round + 1}" + (f" to {after.round - 1}" if after.round > before.round + 2 else "")
        raise _Broken("missing_round", f"nothing is known of round {missing}")
    if after.previous != digest_of(text):
        raise _Broken(
            "other_past", f"it names {_start(after.previous)}, round {before.round} is {_start(digest_of(text))}"
        )
    if after.base != (before.version or before.base):
        raise _Broken(
            "other_model", f"it starts from {_start(after.base)}, round {before.round} made {_start(before.version)}"
        )
    if after.server.optimizer_before != before.server.optimizer_after:
        raise _Broken("other_optimizer", f"it starts from {_start(after.server.optimizer_before)}")


def _start(sha256: str | None) -> str:
    """As much of a hash as one needs to find it."""
    return sha256[:16] if sha256 else "none"


# One round


def _check_content(manifest: Manifest) -> dict[str, bytes]:
    """The identity keys of a round's clients, none for a plain one; raises _Broken."""
    if (manifest.version is None) != (manifest.kind is Kind.EVALUATE):
        raise _Broken("bad_version", f"kind {manifest.kind}, version {manifest.version}")
    if sorted(set(manifest.cohort)) != list(manifest.cohort) or len(set(manifest.contributors)) != len(
        manifest.contributors
    ):
        raise _Broken("other_cohort", "a client stands there twice, or out of order")
    asked = {client for part in manifest.sums for client in _names(part.terms.get("cohort"))} if manifest.sums else None
    if not set(manifest.contributors) <= set(manifest.cohort) or asked not in (None, set(manifest.cohort)):
        raise _Broken("other_cohort", f"{', '.join(manifest.cohort)[:200]} were asked")
    if bool(manifest.sums) == bool(manifest.updates):
        raise _Broken("too_few", "a round is made of masked sums or of plain updates, and of one of the two")
    found: dict[str, bytes] = {}
    for part in manifest.sums:
        found |= _check_sum(manifest, part)
    return found


def _names(value: object) -> list[str]:
    return [name for name in value if isinstance(name, str)] if isinstance(value, list) else []


def _check_sum(manifest: Manifest, part: MaskedSum) -> dict[str, bytes]:
    context = _context(manifest, part)
    adverts = _adverts(context, part)
    session = bodies.session_digest(context.digest(), adverts)
    if session.hex() != part.session:
        raise _Broken("other_session", f"it is {_start(session.hex())}, {_start(part.session)} is stated")
    shared = bodies.shared_digest(session, {u: bytes.fromhex(deal) for u, deal in part.deals.items()})
    if shared.hex() != part.shared:
        raise _Broken("other_shares", f"their digest is {_start(shared.hex())}, {_start(part.shared)} is stated")
    if not set(part.survivors) <= part.deals.keys() <= adverts.keys():
        raise _Broken("bad_survivors", "a client is in the sum that shared no keys")
    told = {"session": part.session, "shared": part.shared, "survivors": list(part.survivors)}
    try:
        survivors = bodies.load_survivors(bodies.dump("survivors", told), len(context.cohort))
    except BadRequest as error:
        raise _Broken("bad_survivors", error.detail) from None
    if len(survivors.clients) < context.fewest:
        raise _Broken("too_few", f"{len(survivors.clients)} updates are in the sum, {context.fewest} are the fewest")
    _check_agreements(context, part, survivors, adverts)
    return {u: advert.identity for u, advert in adverts.items()}


def _context(manifest: Manifest, part: MaskedSum) -> Context:
    """The terms, which bring their own checks; they must be of this round, this model and these settings."""
    try:
        context = Context(**part.terms)  # type: ignore[arg-type]  # what is wrong with them is found here
        if canonical_json(context.terms()) != canonical_json(part.terms):
            raise ValueError("they are not written as terms are")
    except PrivacyRefusal as error:
        raise _Broken("bad_terms", f"{error.reason}: {error.detail}") from None
    except (TypeError, ValueError, OverflowError) as error:
        raise _Broken("bad_terms", str(error)) from None
    stated = {
        "run": manifest.run,
        "round": manifest.round,
        "attempt": manifest.attempt,
        "kind": manifest.kind,
        "model_sha256": manifest.base,
        "settings_sha256": settings_digest(manifest.settings),
    }
    if wrong := [name for name, value in stated.items() if getattr(context, name) != value]:
        raise _Broken("other_terms", f"they differ in {', '.join(wrong)}")
    if context.digest().hex() != part.context:
        raise _Broken(
            "other_terms", f"their digest is {_start(context.digest().hex())}, {_start(part.context)} is stated"
        )
    return context


def _adverts(context: Context, part: MaskedSum) -> dict[str, bodies.Advert]:
    try:
        listed = [bodies.Advert.of(row, context, context.digest()) for row in part.adverts]
        adverts = {advert.client: advert for advert in listed}
        bodies.check_distinct(adverts)
    except PrivacyRefusal as error:
        raise _Broken("bad_advert", f"{error.reason}: {error.detail}") from None
    except BadRequest as error:
        raise _Broken("bad_advert", error.detail) from None
    if [advert.client for advert in listed] != sorted(adverts):
        raise _Broken("bad_advert", "the roster is not sorted, each client once")
    return adverts


def _check_agreements(
    context: Context, part: MaskedSum, survivors: bodies.Survivors, adverts: Mapping[str, bodies.Advert]
) -> None:
    for u, value in part.agrees.items():
        if u not in survivors.clients:
            raise _Broken("bad_agreement", f"{u} signed, and is not in the sum")
        statement = {**bodies.agreement(u, survivors), "kind": "agree"}
        try:
            signature = bodies.raw(value, bodies.SIGNATURE_BYTES, "signature")
            bodies.check_statement(statement, signature, adverts[u].identity, u)
        except (PrivacyRefusal, BadRequest):
            raise _Broken("bad_agreement", f"what stands there for {u} is no signature of it on this list") from None
    if len(part.agrees) < context.threshold:
        raise _Broken("too_few", f"{len(part.agrees)} clients signed the list, {context.threshold} are needed")


def _check_key(client: str, key: bytes, identities: Mapping[str, str] | None, first: tuple[str, str, int]) -> None:
    known, run, n = first
    if known != b64(key):
        raise _Broken("changed_key", f"{client} has the key {fingerprint(key)}, in {run} round {n} it had another")
    if identities is not None and identities.get(client) not in (b64(key), fingerprint(key)):
        listed = "another is on the list" if client in identities else "the list does not name it"
        raise _Broken("untrusted", f"{client} has the key {fingerprint(key)}, {listed}")


# Files and the rest


def _check_files(runs: Mapping[str, _Run], models: Mapping[str, str]) -> Generator[Finding]:
    versions = {sha256 for run in runs.values() for m in run.rounds.values() for sha256 in (m.base, m.version)}
    for name, sha256 in sorted(models.items()):
        stem = PurePath(name).stem
        if DIGEST.fullmatch(stem) and stem != sha256:
            yield Finding(code="other_file", detail=f"{name} has the SHA-256 {sha256}")
        elif sha256 not in versions:
            yield Finding(code="other_file", detail=f"no round names {name}, whose SHA-256 is {sha256}")


def _chain(run: str, rounds: Sequence[Manifest]) -> Chain:
    masked = sum(bool(m.sums) for m in rounds)
    return Chain(
        run=run,
        first=rounds[0].round,
        last=rounds[-1].round,
        masked=masked,
        plain=len(rounds) - masked,
        version=next((m.version for m in reversed(rounds) if m.version), None),
        clients=tuple(sorted({client for m in rounds for client in m.contributors})),
    )


def _notes(
    chains: Sequence[Chain], identities: Mapping[str, str] | None, models: Mapping[str, str] | None
) -> Generator[Finding]:
    for chain in chains:
        if chain.first > 1:
            yield Finding(code="starts_late", run=chain.run, round=chain.first, detail=f"it is round {chain.first}")
        if chain.plain:
            yield Finding(code="plain", run=chain.run, detail=f"{chain.plain} of {chain.plain + chain.masked} rounds")
    if identities is None and any(chain.masked for chain in chains):
        yield Finding(code="identities_unchecked")
    if models is None and chains:
        yield Finding(code="models_unchecked")
