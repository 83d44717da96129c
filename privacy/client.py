"""A client's side of one masked round: a state machine that brings no messages and reads no clock.

    advertise -> share -> open -> mask -> agree -> reveal

Each step checks what the coordinator sent before anything leaves, and happens once: the same question again gets the
same answer, another one ends the session. Secrets live in this object only; a client that restarts is a dropped one.
Source: Bonawitz et al. 2017, "Practical Secure Aggregation", doi:10.1145/3133956.3133982, with the signatures and the
consistency round that hold off a coordinator that lies.

    D = elements of the ring vector, A = elements of the auxiliary block
    U1, U2, U3 = clients that sent keys, that dealt shares, whose updates are summed

The holders of a client's secrets are its neighbours in the graph of masks (`graph`) and itself: of these, and not of
all, t must be there at each step.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from ..protocol.encoding import b64
from ..protocol.errors import BadRequest, IllegalTransition, MurmurError
from ..protocol.threads import in_order
from ..protocol.wire import pack_ring
from . import bodies, keys, shamir
from .context import Context, refusal
from .fixed_point import Encoder, Quantizer, chunks, needs_rounding
from .graph import neighbours
from .masks import AUX, CHUNK, RING, Array, Masks
from .policy import Policy
from .steps import NEXT, State, Step


class _Common(NamedTuple):
    """The X25519 secrets of this client and another one: of their channel keys and of their mask keys."""

    channel: bytes
    mask: bytes


@dataclass(kw_only=True, slots=True, repr=False)
class _Secrets:
    """What only this client may know: its private keys, what they have in common with each neighbour's, and the shares
    that others entrusted to it, by dealer."""

    channel: X25519PrivateKey
    seed: bytes  # the mask key grows from it; shared among the clients
    mask: X25519PrivateKey
    secret: bytes  # the self mask grows from it; shared among the clients
    common: dict[str, _Common] = field(default_factory=dict[str, "_Common"])
    held: dict[str, tuple[bytes, bytes]] = field(default_factory=dict[str, tuple[bytes, bytes]])  # of secret, of seed


class ClientSession:
    """One client's part of one attempt.

    identity: its long-term key; known: identity keys of peers seen in earlier rounds (one that changed is refused);
    joined: hex digests of the contexts that this client took part in before, from its journal.
    random: cryptographic randomness, so many bytes a call. Raises PrivacyRefusal when policy or terms forbid the round.
    """

    def __init__(
        self,
        context: Context,
        me: str,
        identity: Ed25519PrivateKey,
        *,
        policy: Policy,
        known: Mapping[str, bytes],
        joined: Container[str] = (),
        random: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self._digest = context.digest()
        if me not in context.cohort:
            raise refusal("not_in_cohort", f"{me} is not in the cohort")
        policy.check(context)
        if self._digest.hex() in joined:
            raise refusal("joined_before", f"round {context.round}, attempt {context.attempt} was joined before")
        self.state = State.NEW
        self.peers: dict[str, bytes] = {}
        self._context, self._me, self._identity, self._policy, self._random = context, me, identity, policy, random
        self._known = dict(known)
        self._answers: dict[Step, tuple[str, str]] = {}
        channel, seed = random(keys.KEY_BYTES), random(shamir.SECRET_BYTES)
        self._kept: _Secrets | None = _Secrets(
            channel=X25519PrivateKey.from_private_bytes(channel),
            seed=seed,
            mask=keys.mask_private(seed, context=self._digest, client=me),
            secret=random(shamir.SECRET_BYTES),
        )

    def __repr__(self) -> str:
        return f"<ClientSession {self._me}, round {self._context.round}, {self.state}>"

    @property
    def context_sha256(self) -> str:
        """Hex digest of the terms: what a journal of joined attempts keeps."""
        return self._digest.hex()

    @property
    def dealers(self) -> tuple[str, ...]:
        """The clients whose updates may come into the sum, sorted; known once the shares were opened."""
        return tuple(sorted(self._u2))

    def advertise(self) -> str:
        """This client's fresh public keys, signed by its identity together with the terms."""
        return self._once(Step.ADVERTISE, "", self._advertise)

    def share(self, roster: str) -> str:
        """Check everyone's keys and deal out shares of this client's secrets; afterwards `peers` holds identity keys.

        Raises PrivacyRefusal for a roster that is too small, holds a key twice, a key that is not trusted or has
        changed, an advert made for other terms, or not this client's own advert.
        """
        return self._once(Step.SHARE, roster, self._share)

    def open(self, inbox: str) -> None:
        """Take the shares that the others dealt to this client; fixes U2, on which every mask depends."""
        self._once(Step.OPEN, inbox, self._open)

    def mask(
        self,
        values_D: Iterable[Array],
        *,
        weight: int,
        aux: Array,
        rounding: bytes = b"",
        threads: int = 0,
        encoder: Encoder | None = None,
    ) -> Iterator[memoryview]:
        """The upload's tensors as bytes in pieces, in the order of `tensors.masked_layout`: first the auxiliary block.

        values_D: pieces of the update (delta, float32 or float64 vectors) in order, D elements together; how they are
        cut does not change the result, but what they hold must stay until the next one is asked for, and then until a
        few hundred thousand elements later, since several threads work on them. aux: (A,) uint64 from `Block.encode`.
        weight: 0 .. max_weight. rounding: 32 bytes that decide how values of few bits are rounded; fresh ones when
        empty. threads: as many as can run at once (0), or so many; the bytes are the same. encoder: makes the integers
        in place of the weighted fixed point, in one thread.
        Raises BadUpdate for a value that is not finite or a wrong number of them; what was yielded before is then
        worthless, and so is the session: a keystream serves one update. `fixed_point.count_clipped` checks first.
        """
        context = self._context
        if aux.shape != (context.aux,) or aux.dtype != AUX:
            raise ValueError(f"({context.aux},) uint64 was asked for, got {aux.shape} {aux.dtype}")
        if not rounding and needs_rounding(len(context.cohort), context.ring_bits):
            rounding = self._random(keys.KEY_BYTES)

        def quantizer() -> Quantizer:
            return Quantizer(weight=weight, rounding=rounding, **context.bounds)

        quantizer()  # a weight out of bounds is refused before anything is used up
        self._advance(Step.MASK)
        if encoder is not None:
            return self._masked(values_D, lambda: encoder, aux, 1)
        return self._masked(values_D, quantizer, aux, threads)

    def agree(self, survivors: str) -> str:
        """Sign the list of clients whose updates are summed; a second, different list is refused for good."""
        return self._once(Step.AGREE, survivors, self._agree)

    def reveal(self, signatures: str) -> str:
        """The shares that unmask the sum, after t holders of its secrets signed the very list that this client did.

        Of a client in the sum the self-mask share, of one that dropped out after sharing the mask-seed share: never
        both, and never again.
        """
        return self._once(Step.REVEAL, signatures, self._reveal)

    # The machine

    def _advance(self, step: Step) -> None:
        following = NEXT.get((self.state, step))
        if following is None:
            raise IllegalTransition(f"{step} is not possible for a client that is {self.state}")
        self.state = following

    def _once(self, step: Step, question: str, answer: Callable[[str], str]) -> str:
        if self.state is State.ENDED:
            raise refusal("ended_before", f"{self._me} has left this round before")
        if step in self._answers:
            if self._answers[step][0] == question:
                return self._answers[step][1]
            self._end()
            raise refusal("second_question", f"{self._me} was asked to {step} a second time, with other content")
        if (self.state, step) not in NEXT:
            raise IllegalTransition(f"{step} is not possible for a client that is {self.state}")
        try:
            found = answer(question)
        except MurmurError:
            self._end()
            raise
        self._answers[step] = (question, found)
        self._advance(step)
        if self.state is State.REVEALED:
            self._kept = None
        return found

    def _end(self) -> None:
        """Go on no more, and keep nothing that could unmask anything."""
        self.state = State.ENDED
        self._answers.clear()
        self._kept = None

    @property
    def _secrets(self) -> _Secrets:
        assert self._kept is not None, self.state
        return self._kept

    # The steps

    def _advertise(self, _: str) -> str:
        fields = {
            "client": self._me,
            "context": self._digest.hex(),
            "identity": b64(self._identity.public_key().public_bytes_raw()),
            "channel": b64(keys.public_bytes(self._secrets.channel)),
            "mask": b64(keys.public_bytes(self._secrets.mask)),
        }
        return bodies.dump_signed("advert", fields, self._identity)

    def _share(self, roster: str) -> str:
        context, me, secrets = self._context, self._me, self._secrets
        self._adverts = self._check_roster(roster)
        self._session = bodies.session_digest(self._digest, self._adverts)
        near = neighbours(self._session, self._adverts, context.degree)[me]
        self._holders = tuple(u for u in sorted(self._adverts) if u in near or u == me)
        for u in near:
            theirs = self._adverts[u]
            channel, mask = (
                keys.exchange(secrets.channel, theirs.channel, u),
                keys.exchange(secrets.mask, theirs.mask, u),
            )
            secrets.common[u] = _Common(channel, mask)
        holders = {u: context.position(u) for u in self._holders}
        places, t = list(holders.values()), context.threshold
        of_secret = shamir.split(secrets.secret, places, t, self._random)
        of_seed = shamir.split(secrets.seed, places, t, self._random)
        commitments: dict[str, list[str]] = {}
        for u, x in holders.items():
            pair = zip(("self", "mask"), (of_secret[x], of_seed[x]), strict=True)
            commitments[u] = [b64(keys.commit_share(self._session, me, u, which, s)) for which, s in pair]
        committed = b64(keys.commit_secret(self._session, me, secrets.secret))
        self._deal = bodies.deal_digest(commitments, committed)
        sealed: dict[str, str] = {}
        for u, x in holders.items():
            if u == me:
                secrets.held[me] = (of_secret[x], of_seed[x])
                continue
            plain = of_secret[x] + of_seed[x]
            sealed[u] = b64(keys.seal(secrets.common[u].channel, plain, self._session, me, u, self._deal))
        fields = {"client": me, "commitments": commitments, "sealed": sealed, "secret": committed}
        return bodies.dump_signed("shares", fields | {"session": self._session.hex()}, self._identity)

    def _check_roster(self, roster: str) -> dict[str, bodies.Advert]:
        context, me = self._context, self._me
        fields = bodies.load(roster, "roster", bodies.ROSTER_KEYS, members=len(context.cohort))
        if bodies.digest(fields["context"], "context") != self._digest:
            raise refusal("wrong_context", "the roster was made for other terms or another round")
        if not isinstance(fields["adverts"], list):
            raise BadRequest("adverts must be a list")
        listed = [bodies.Advert.of(row, context, self._digest) for row in fields["adverts"]]
        adverts = {advert.client: advert for advert in listed}
        if [advert.client for advert in listed] != sorted(adverts):
            raise BadRequest("adverts must be sorted, each client once")
        bodies.check_distinct(adverts)
        mine = adverts.get(me)
        if mine is None or bodies.dump("advert", mine.fields) != self._answers[Step.ADVERTISE][1]:
            raise refusal("own_advert", f"{me}'s own keys are missing from the roster, or others stand there")
        if len(adverts) < context.fewest:
            raise refusal("too_few", f"{len(adverts)} clients sent keys, at least {context.fewest} are needed")
        peers = {u: advert.identity for u, advert in adverts.items() if u != me}
        for u, key in peers.items():
            self._policy.check_peer(u, key)
            if u in self._known and self._known[u] != key:
                raise refusal("changed_key", f"{u} has another identity key than in earlier rounds", clients=[u])
        self.peers = peers
        return adverts

    def _open(self, inbox: str) -> str:
        context, me = self._context, self._me
        fields = bodies.load(inbox, "inbox", bodies.INBOX_KEYS, members=len(context.cohort))
        if bodies.digest(fields["session"], "session") != self._session or fields["client"] != me:
            raise refusal("wrong_session", "the inbox belongs to other participants or to another client")
        deals = {u: bodies.digest(d, "deal") for u, d in bodies.mapping(fields["deals"], "deals").items()}
        if deals.get(me) != self._deal:
            raise refusal("own_shares", f"{me}'s own shares are missing, or others stand there")
        if not deals.keys() <= self._adverts.keys():
            raise refusal("not_in_cohort", "shares were dealt by a client that is not in the roster")
        if len(deals) < context.fewest:
            raise refusal("too_few", f"{len(deals)} clients dealt shares, at least {context.fewest} are needed")
        sealed, committed = (bodies.mapping(fields[key], key) for key in ("sealed", "commitments"))
        dealers = [u for u in self._holders if u in deals]  # each holds shares of this client's, it of each one's
        self._enough(dealers, "dealt shares")
        if not sealed.keys() == committed.keys() == set(dealers) - {me}:
            raise BadRequest("sealed shares and commitments must come from every other dealer")
        held = dict(self._secrets.held)
        for u in sorted(sealed):
            closed = bodies.raw(sealed[u], keys.SEALED_BYTES, "sealed")
            plain = keys.unseal(self._secrets.common[u].channel, closed, self._session, u, me, deals[u])
            held[u] = (plain[: shamir.SHARE_BYTES], plain[shamir.SHARE_BYTES :])
            found = tuple(
                keys.commit_share(self._session, u, me, w, s) for w, s in zip(("self", "mask"), held[u], strict=True)
            )
            if found != bodies.commitment_pair(committed[u]):
                raise refusal("bad_share", f"{u} dealt {me} a share that it did not commit to", clients=[u])
        self._secrets.held, self._u2 = held, frozenset(deals)
        self._shared = bodies.shared_digest(self._session, deals)
        return ""

    def _mask_keys(self) -> list[tuple[keys.MaskKeys, bool]]:
        bound = {"session": self._session, "shared": self._shared}
        found = [(keys.self_mask(self._secrets.secret, client=self._me, **bound), True)]
        for u in self._holders:
            if u in self._u2 and u != self._me:
                common = self._secrets.common[u].mask
                found.append((keys.pair_mask(common, first=self._me, second=u, **bound), self._me < u))
        return found

    def _masked(
        self, values_D: Iterable[Array], quantizer: Callable[[], Encoder], aux: Array, threads: int
    ) -> Iterator[memoryview]:
        try:
            derived = self._mask_keys()
            block = aux.copy()
            Masks([(key.aux, plus) for key, plus in derived], AUX).apply(block)
            yield block.view(np.uint8).data
            ring_keys = [(key.ring, plus) for key, plus in derived]

            def worker() -> Callable[[tuple[int, Array]], memoryview]:
                own, masks = quantizer(), Masks(ring_keys, RING)

                def work(chunk: tuple[int, Array]) -> memoryview:
                    position, values = chunk
                    words = np.empty(len(values), RING)
                    own.quantize(values, words, position)
                    masks.seek(position)
                    masks.apply(words)
                    return pack_ring(words, self._context.ring_bits).data

                return work

            pieces = chunks(values_D, self._context.dim)
            yield from in_order(worker, pieces, threads=1 if self._context.dim <= CHUNK else threads)
            self._advance(Step.MASKED)
        finally:
            if self.state is State.MASKING:  # the update or the upload broke off; its keystreams are used
                self._end()

    def _agree(self, body: str) -> str:
        context, me = self._context, self._me
        survivors = bodies.load_survivors(body, len(context.cohort))
        if (survivors.session, survivors.shared) != (self._session, self._shared):
            raise refusal("wrong_session", "the list of survivors belongs to other participants or to other shares")
        if not self._u2.issuperset(survivors.clients):
            raise refusal("unknown_survivor", "an update of a client is counted that dealt no shares")
        if me not in survivors.clients:
            raise refusal("left_out", f"{me}'s update is not counted")
        if len(survivors.clients) < context.fewest:
            raise refusal("too_few", f"{len(survivors.clients)} updates are in, at least {context.fewest} are needed")
        there = set(survivors.clients)
        self._enough([u for u in self._holders if u in there], "delivered an update")
        self._u3 = survivors
        return bodies.dump_signed("agree", bodies.agreement(me, survivors), self._identity)

    def _reveal(self, body: str) -> str:
        u3, held = self._u3, self._secrets.held
        fields = bodies.load(body, "signatures", bodies.SIGNATURES_KEYS, members=self._context.holders)
        if bodies.digest(fields["session"], "session") != self._session:
            raise refusal("wrong_session", "the signatures belong to other participants")
        if bodies.digest(fields["survivors"], "survivors") != u3.digest:
            raise refusal("disagreement", "the signatures are for another list of survivors than this client was told")
        signatures = bodies.mapping(fields["signatures"], "signatures")
        there = set(u3.clients)
        if not signatures.keys() <= there.intersection(self._holders):
            raise refusal("unknown_survivor", "a client signed that is not on the list, or holds no share")
        for u, value in signatures.items():
            signature = bodies.raw(value, bodies.SIGNATURE_BYTES, "signature")
            statement = {**bodies.agreement(u, u3), "kind": "agree"}
            bodies.check_statement(statement, signature, self._adverts[u].identity, u)
        self._enough(signatures, "agreed")
        dealers = [u for u in self._holders if u in self._u2]
        of_self = {u: b64(held[u][0]) for u in dealers if u in there}
        of_mask = {u: b64(held[u][1]) for u in dealers if u not in there}
        shown = {"client": self._me, "session": self._session.hex(), "self": of_self, "mask": of_mask}
        return bodies.dump_signed("reveal", shown, self._identity)

    def _enough(self, holders: Collection[str], did: str) -> None:
        """Raise unless so many holders of this client's secrets are left that these can be rebuilt."""
        if len(holders) < self._context.threshold:
            detail = f"{len(holders)} holders of {self._me}'s secrets {did}, {self._context.threshold} are needed"
            raise refusal("too_few", detail)
