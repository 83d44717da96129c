"""The coordinator's side of one masked round: what it checks at the door, what it passes on, how it unmasks.

A session holds the terms and the cohort's identity keys; every message comes in as an argument, so that a coordinator
that restarted goes on from its rows. It can read no update: it sees signed public keys, sealed shares, and vectors
under masks, and after the reveal the keys of exactly those masks that stand in the sum.

    D = elements of the ring vector, A = elements of the auxiliary block
    U1, U2, U3 = clients that sent keys, that dealt shares, whose updates are summed
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from ..protocol.encoding import b64
from ..protocol.errors import BadRequest, PrivacyRefusal
from . import bodies, keys, shamir
from .bodies import Advert, Shares, Shown, Survivors
from .context import Context, refusal
from .graph import Near, neighbours, short, standing
from .masks import AUX, RING, Array, apply


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """A client whose message could not be used, though the round could do without it."""

    client: str
    reason: str
    detail: str


@dataclass(frozen=True, kw_only=True, slots=True)
class _Round:
    """The messages up to the list of survivors, read and joined."""

    adverts: Mapping[str, Advert]
    deals: Mapping[str, Shares]
    near: Near
    session: bytes
    shared: bytes
    u3: tuple[str, ...]
    there: frozenset[str]  # U3 again

    @property
    def standing(self) -> list[str]:
        """Those of whom a secret is rebuilt: of the survivors the self mask's, of those that dropped out the seed."""
        return standing(self.near, self.deals, self.u3)

    def of(self, client: str) -> tuple[set[str], set[str]]:
        """Whose shares this client holds: dealers that survived, and dealers that dropped out."""
        dealers = {u for u in (*self.near[client], client) if u in self.deals}
        return dealers & self.there, dealers - self.there


class ServerSession:
    """Checks, relays and unmasks one attempt; `identities` are the Ed25519 public keys of the cohort.

    Every `check_*` raises BadRequest for a body that is malformed, PrivacyRefusal for one that is inconsistent, and
    nothing else. Adverts and shares given as arguments are ones that were checked and stored: those of the roster and
    of the inboxes once these were sent.
    """

    def __init__(self, context: Context, identities: Mapping[str, bytes]) -> None:
        self._context = context
        self._identities = {u: bytes(identities[u]) for u in context.cohort}
        self._digest = context.digest()

    def check_advert(self, client: str, body: str) -> None:
        """A client's keys: for these terms, usable, different, signed by the identity that enrolled."""
        advert = self._advert(client, body)
        keys.check_public(advert.channel, client)
        keys.check_public(advert.mask, client)
        if advert.identity != self._identities[client]:
            raise refusal("changed_key", f"{client} signs with another key than it enrolled with", clients=[client])

    def roster(self, adverts: Mapping[str, str]) -> str:
        """All adverts, for everyone alike; raises PrivacyRefusal when they are too few or a key stands there twice."""
        self._enough(len(adverts), "clients sent keys")
        read = self._adverts(adverts)
        bodies.check_distinct(read)
        return bodies.dump("roster", {"context": self._digest.hex(), "adverts": [a.fields for a in read.values()]})

    def check_shares(self, client: str, body: str, adverts: Mapping[str, str]) -> None:
        """A client's deal: in this session, a sealed share for each of its neighbours, a commitment to its own too."""
        self._member(client, adverts)
        deal = bodies.load_shares(body, self._context.holders)
        self._mine(client, deal.fields)
        session, near = self._graph(adverts)
        if deal.fields["session"] != session.hex():
            raise refusal("wrong_session", f"{client} dealt shares for other participants", clients=[client])
        if deal.sealed.keys() ^ near[client] or deal.commitments.keys() ^ {client, *near[client]}:
            raise BadRequest("shares: every neighbour in the graph of masks must get one, and no other client")

    def inbox(self, client: str, adverts: Mapping[str, str], shares: Mapping[str, str]) -> str:
        """What a client of U2 needs of the deals: its sealed shares, their commitments, and who dealt what."""
        self._enough(len(shares), "clients dealt shares")
        self._member(client, shares)
        deals = self._deals(shares)
        session, near = self._graph(adverts)
        self._rebuilt(near, [client], shares)
        others = [u for u in deals if u in near[client]]
        fields = {
            "client": client,
            "session": session.hex(),
            "deals": {u: deal.deal.hex() for u, deal in deals.items()},
            "sealed": {u: b64(deals[u].sealed[client]) for u in others},
            "commitments": {u: [b64(c) for c in deals[u].commitments[client]] for u in others},
        }
        return bodies.dump("inbox", fields)

    def survivors(self, adverts: Mapping[str, str], shares: Mapping[str, str], uploaded: Collection[str]) -> str:
        """The list of clients whose updates are summed; from then on no other upload may be taken."""
        clients = sorted(set(uploaded))
        self._enough(len(clients), "updates are in")
        for u in clients:
            self._member(u, shares)
        session, near = self._graph(adverts)
        shared = self._shared(session, shares)
        self._rebuilt(near, standing(near, shares, clients), clients)
        return bodies.dump("survivors", {"session": session.hex(), "shared": shared.hex(), "survivors": clients})

    def check_agree(self, client: str, body: str, survivors: str) -> None:
        """A client's signature on the list of survivors."""
        told = bodies.load_survivors(survivors, self._members)
        self._survivor(client, told)
        fields = bodies.load(body, "agree", bodies.AGREE_KEYS, members=self._members)
        self._mine(client, fields)
        if {k: fields[k] for k in ("client", "session", "survivors")} != bodies.agreement(client, told):
            raise refusal("disagreement", f"{client} signed another list of survivors", clients=[client])

    def signatures(self, client: str, adverts: Mapping[str, str], agrees: Mapping[str, str]) -> str:
        """The signatures of the holders of a client's secrets; raises PrivacyRefusal for fewer than t of them."""
        _, near = self._graph(adverts)
        self._rebuilt(near, [client], agrees)
        holders = [u for u in sorted(agrees) if u in near[client] or u == client]
        read = {u: bodies.load(agrees[u], "agree", bodies.AGREE_KEYS, members=self._members) for u in holders}
        told = {(fields["session"], fields["survivors"]) for fields in read.values()}
        if len(told) != 1:
            raise refusal("disagreement", "the clients signed different lists of survivors")
        session, survivors = told.pop()
        signed = {u: fields["signature"] for u, fields in read.items()}
        return bodies.dump("signatures", {"session": session, "survivors": survivors, "signatures": signed})

    def check_reveal(
        self, client: str, body: str, adverts: Mapping[str, str], shares: Mapping[str, str], survivors: str
    ) -> None:
        """The shares a client shows: exactly those asked for, each the one that its dealer committed to."""
        self._reveal(client, body, self._round(adverts, shares, survivors))

    def unmask(
        self,
        *,
        adverts: Mapping[str, str],
        shares: Mapping[str, str],
        survivors: str,
        reveals: Mapping[str, str],
        ring_sum: Array,
        aux_sum: Array,
    ) -> tuple[Fault, ...]:
        """Take the masks out of the sum over U3, in place.

        ring_sum: (D,) uint32, a mapped file if it is large; aux_sum: (A,) uint64; both summed over exactly the clients
        in `survivors`; of a smaller ring, the bits above its own do not count. Returns who showed a reveal that could
        not be used. Raises PrivacyRefusal, with the sums as they were, when of some secret fewer than t good shares are
        shown ("too_few") or a dealer's shares do not rebuild what it committed to ("bad_dealer"); the fact `clients`
        names those at fault.
        """
        for vector, size, dtype in ((ring_sum, self._context.dim, RING), (aux_sum, self._context.aux, AUX)):
            if vector.shape != (size,) or vector.dtype != dtype or not vector.flags.writeable:
                raise ValueError(f"a writeable ({size},) {dtype} was asked for, got {vector.shape} {vector.dtype}")
        read = self._round(adverts, shares, survivors)
        shown, faults = self._good_reveals(reveals, read)
        self._rebuilt(read.near, read.standing, shown, faulty=[fault.client for fault in faults])
        derived = self._standing_masks(read, shown)
        apply([(key.aux, plus) for key, plus in derived], aux_sum)
        apply([(key.ring, plus) for key, plus in derived], ring_sum)
        return faults

    def listed(self, survivors: str) -> tuple[str, ...]:
        """U3: the clients that a list of survivors names."""
        return bodies.load_survivors(survivors, self._members).clients

    # Unmasking

    def _good_reveals(self, reveals: Mapping[str, str], read: _Round) -> tuple[dict[str, Shown], tuple[Fault, ...]]:
        """What each holder showed; those whose reveal does not hold are left out and named."""
        shown: dict[str, Shown] = {}
        faults: list[Fault] = []
        for u in sorted(reveals):
            try:
                shown[u] = self._reveal(u, reveals[u], read)
            except PrivacyRefusal as error:
                faults.append(Fault(client=u, reason=error.reason, detail=error.detail))
            except BadRequest as error:
                faults.append(Fault(client=u, reason=error.code, detail=error.detail))
        return shown, tuple(faults)

    def _standing_masks(self, read: _Round, shown: Mapping[str, Shown]) -> list[tuple[keys.MaskKeys, bool]]:
        """The masks that stand in the sum, each with the sign that takes it out.

        They are the survivors' self masks, and the pair masks between each client that dropped out and the survivors
        among its neighbours. Any t of its own holders' shares rebuild a client's secret.
        """
        bound = {"session": read.session, "shared": read.shared}
        found: list[tuple[keys.MaskKeys, bool]] = []
        bad: list[str] = []
        for u in read.standing:
            survived = u in read.there
            holders = sorted(v for v in (*read.near[u], u) if v in shown)[: self._context.threshold]
            secret = shamir.combine(
                {self._context.position(v): (shown[v].secrets if survived else shown[v].seeds)[u] for v in holders}
            )
            if survived:
                if secret is None or keys.commit_secret(read.session, u, secret) != read.deals[u].secret:
                    bad.append(u)
                    continue
                found.append((keys.self_mask(secret, client=u, **bound), False))
                continue
            private = keys.mask_private(secret, context=self._digest, client=u) if secret is not None else None
            if private is None or keys.public_bytes(private) != read.adverts[u].mask:
                bad.append(u)
                continue
            for v in read.u3:
                if v in read.near[u]:
                    common = keys.exchange(private, read.adverts[v].mask, v)
                    found.append((keys.pair_mask(common, first=u, second=v, **bound), u < v))
        if bad:
            detail = f"the shares that {', '.join(bad)} dealt do not rebuild what was committed to"
            raise refusal("bad_dealer", detail, clients=bad)
        return found

    # Reading

    @property
    def _members(self) -> int:
        return len(self._context.cohort)

    def _enough(self, count: int, what: str) -> None:
        if count < self._context.fewest:
            raise refusal("too_few", f"{count} {what}, at least {self._context.fewest} are needed")

    def _rebuilt(self, near: Near, secrets: list[str], holders: Iterable[str], *, faulty: Sequence[str] = ()) -> None:
        """Raise unless t of the holders of each of these clients' secrets are there."""
        lost = short(near, secrets, holders, self._context.threshold)
        if lost:
            names = ", ".join(lost[:5]) + (", ..." if len(lost) > 5 else "")
            detail = f"fewer than {self._context.threshold} holders are left of the secrets of {names}"
            raise refusal("too_few", detail, clients=faulty)

    def _member(self, client: str, of: Collection[str]) -> None:
        if client not in self._identities or client not in of:
            raise refusal("not_in_cohort", f"{client!r} takes no part in this step", clients=[client])

    def _survivor(self, client: str, survivors: Survivors) -> None:
        if client not in self._identities or client not in survivors.clients:
            raise refusal("left_out", f"{client!r} is not on the list of survivors", clients=[client])

    def _mine(self, client: str, fields: Mapping[str, object]) -> None:
        """Raise unless the message says that it is this client's, and this client signed it."""
        if fields["client"] != client:
            raise BadRequest(f"a message of another client was sent by {client}")
        bodies.check_signature(fields, self._identities[client], client)

    def _advert(self, client: str, body: str) -> Advert:
        self._member(client, self._identities)
        if not isinstance(body, str):  # pyright: ignore[reportUnnecessaryIsInstance]  # it comes from outside
            raise BadRequest("advert: the body must be ASCII text")
        advert = _read_advert(body, self._context)
        if advert.client != client:
            raise BadRequest(f"a message of another client was sent by {client}")
        return advert

    def _adverts(self, adverts: Mapping[str, str]) -> dict[str, Advert]:
        return {u: self._advert(u, adverts[u]) for u in sorted(adverts)}

    def _deals(self, shares: Mapping[str, str]) -> dict[str, Shares]:
        return {u: bodies.load_shares(shares[u], self._context.holders) for u in sorted(shares)}

    def _graph(self, adverts: Mapping[str, str]) -> tuple[bytes, Near]:
        """The session, and each client's neighbours in it."""
        session = _session(self._context, tuple(adverts[u] for u in sorted(adverts)))
        return session, neighbours(session, adverts, self._context.degree)

    def _shared(self, session: bytes, shares: Mapping[str, str]) -> bytes:
        return bodies.shared_digest(session, {u: deal.deal for u, deal in self._deals(shares).items()})

    def _round(self, adverts: Mapping[str, str], shares: Mapping[str, str], survivors: str) -> _Round:
        told = bodies.load_survivors(survivors, self._members)
        session, near = self._graph(adverts)
        shared = self._shared(session, shares)
        if (told.session, told.shared) != (session, shared):
            raise refusal("wrong_session", "the list of survivors belongs to other messages")
        self._enough(len(told.clients), "updates are in")
        for u in told.clients:
            self._member(u, shares)
        return _Round(
            adverts=self._adverts(adverts),
            deals=self._deals(shares),
            near=near,
            session=session,
            shared=shared,
            u3=told.clients,
            there=frozenset(told.clients),
        )

    def _reveal(self, client: str, body: str, read: _Round) -> Shown:
        if client not in read.there:
            raise refusal("left_out", f"{client!r} is not on the list of survivors", clients=[client])
        fields = bodies.load(body, "reveal", bodies.REVEAL_KEYS, members=self._context.holders)
        self._mine(client, fields)
        if fields["session"] != read.session.hex():
            raise refusal("wrong_session", f"{client} showed shares of another session", clients=[client])
        shown = bodies.load_reveal(fields)
        survived, dropped = read.of(client)
        if shown.secrets.keys() != survived or shown.seeds.keys() != dropped:
            raise BadRequest(
                "reveal: a share of every survivor's secret and of every dropped client's seed is asked for"
            )
        for which, place, of in (("self", 0, shown.secrets), ("mask", 1, shown.seeds)):
            for dealer, share in of.items():
                if (
                    keys.commit_share(read.session, dealer, client, which, share)
                    != read.deals[dealer].commitments[client][place]
                ):
                    raise refusal("bad_share", f"{client} showed a wrong share of {dealer}'s", clients=[client])
        return shown


@lru_cache(maxsize=8)  # every message after the roster names it
def _session(context: Context, adverts: tuple[str, ...]) -> bytes:
    read = [_read_advert(body, context) for body in adverts]
    return bodies.session_digest(context.digest(), {advert.client: advert for advert in read})


@lru_cache(maxsize=1024)  # a roster is read again for every message that depends on the session
def _read_advert(body: str, context: Context) -> Advert:
    fields = bodies.load(body, "advert", Advert.KEYS, members=len(context.cohort))
    return Advert.of(fields, context, context.digest())
