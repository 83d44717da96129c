"""A masked round among virtual clients: the state machines of real ones, talking in one process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ..aggregation.weighted_sum import ring_sum
from ..clients.job import Result
from ..clients.updates import write_masked
from ..privacy.auxiliary import Totals
from ..privacy.client import ClientSession
from ..privacy.context import Context, refusal
from ..privacy.dp.plan import round_encoding
from ..privacy.fixed_point import Encoder, Quantizer, chunks, mean
from ..privacy.masks import RING, Array
from ..privacy.policy import Policy
from ..privacy.server import ServerSession
from ..privacy.terms import block_of, context_of
from ..protocol.encoding import canonical_json
from ..protocol.errors import InternalError
from ..protocol.messages import Assignment, Kind, SecureTerms
from ..protocol.recipe import Recipe
from ..protocol.tensors import Layout
from ..protocol.wire import pack_ring


class Keys:
    """The virtual clients' long-term identities, made when one is first asked and kept for the simulation."""

    def __init__(self) -> None:
        self._made: dict[str, Ed25519PrivateKey] = {}

    def of(self, client: str) -> Ed25519PrivateKey:
        if client not in self._made:
            self._made[client] = Ed25519PrivateKey.generate()
        return self._made[client]


class MaskedRound:
    """One masked round: `upload` for each client of the cohort, then `unmask`.

    assignment: any one client's; terms, model and settings are the same for all. layout: the model's. keys: the
    clients' own; None leaves the masks away ("ideal"), which changes no bit of the sum, since they cancel in it.
    Raises PrivacyRefusal as a real round would, for terms under which no sum may be read.
    """

    def __init__(self, assignment: Assignment, layout: Layout, keys: Keys | None) -> None:
        terms = assignment.secure
        assert terms is not None, "a plain round has no terms"
        self._layout = layout
        self._block = block_of(assignment, layout, terms)
        self._context = context_of(assignment, layout, terms)
        private = assignment.dp.of_clients and assignment.kind is Kind.TRAIN
        self._encoding = round_encoding(assignment, layout, terms) if private else None
        policy = Policy(min_clients=terms.min_clients)
        policy.check(self._context)
        self._masks = _Protocol(self._context, policy, keys) if keys else _NoMasks(self._context)
        self._uploaded: list[str] = []
        self._ring, self._aux = np.zeros(self._context.dim, np.uint32), np.zeros(self._context.aux, np.uint64)

    def expect(self, clients: Sequence[str]) -> None:
        """Raise PrivacyRefusal where the updates of these alone could not be unmasked, before anybody trains."""
        self._masks.expect(clients)

    def upload(self, client: str, assignment: Assignment, result: Result, path: Path) -> None:
        """Write what the client would send, add it to the sum and delete it: nothing in it means anything alone."""
        rounding = sha256(canonical_json(["rounding", assignment.seed, assignment.round, client])).digest()
        write_masked(path, self._masks.session(client), assignment, self._layout, result, rounding)
        ring, block = ring_sum((path,), self._context.dim, self._context.aux, self._context.ring_bits)
        path.unlink()
        np.add(self._ring, ring, out=self._ring)
        np.add(self._aux, block, out=self._aux)
        self._uploaded.append(client)

    def unmask(self) -> tuple[Array, Totals]:
        """The weighted mean of the updates, (D,) in the order of an update's file, and the totals.

        Under differential privacy the sum of the clipped updates, (D,) float64. Without a single example there is no
        mean: it is empty. Raises SumTooLarge where the sum may have left the ring.
        """
        ring, aux = self._ring, self._aux
        self._masks.remove(self._uploaded, ring, aux)
        totals = self._block.decode(aux)
        if totals.clients != len(self._uploaded):
            raise InternalError(f"the unmasked sum counts {totals.clients} clients, {len(self._uploaded)} uploaded")
        if not totals.weight:
            return np.zeros(0), totals
        if self._encoding:
            return self._encoding.decode(ring), totals
        return mean(ring, weight=totals.weight, dtype=self._layout.widest_float, **self._context.bounds), totals


def terms_of(recipe: Recipe, cohort: tuple[str, ...], total_weight: int) -> SecureTerms:
    """What a coordinator tells those who are summed together of how they mask."""
    graph = recipe.mask_graph(len(cohort))
    return SecureTerms(
        cohort=cohort,
        degree=graph.degree,
        threshold=graph.threshold,
        min_clients=recipe.fewest,
        clip_value=recipe.secure.clip_value,
        ring_bits=recipe.secure.ring_bits,
        total_weight=total_weight,
    )


class _Protocol:
    """The state machines of the clients and of the server, up to the shares that everyone holds of the others'."""

    def __init__(self, context: Context, policy: Policy, keys: Keys) -> None:
        identities = {u: keys.of(u).public_key().public_bytes_raw() for u in context.cohort}
        self._server = ServerSession(context, identities)
        self._clients = {u: ClientSession(context, u, keys.of(u), policy=policy, known={}) for u in context.cohort}
        self._adverts = {u: client.advertise() for u, client in self._clients.items()}
        for u, body in self._adverts.items():
            self._server.check_advert(u, body)
        roster = self._server.roster(self._adverts)
        self._shares = {u: client.share(roster) for u, client in self._clients.items()}
        for u, body in self._shares.items():
            self._server.check_shares(u, body, self._adverts)
        for u, client in self._clients.items():
            client.open(self._server.inbox(u, self._adverts, self._shares))

    def expect(self, clients: Sequence[str]) -> None:
        self._server.survivors(self._adverts, self._shares, clients)

    def session(self, client: str) -> ClientSession:
        return self._clients[client]

    def remove(self, uploads: Sequence[str], ring: Array, aux: Array) -> None:
        """Take the masks out of the sums, in place, as the clients in `uploads` agree to and reveal."""
        survivors = self._server.survivors(self._adverts, self._shares, uploads)
        agrees = {u: self._clients[u].agree(survivors) for u in uploads}
        for u, body in agrees.items():
            self._server.check_agree(u, body, survivors)
        reveals = {u: self._clients[u].reveal(self._server.signatures(u, self._adverts, agrees)) for u in uploads}
        for u, body in reveals.items():
            self._server.check_reveal(u, body, self._adverts, self._shares, survivors)
        self._server.unmask(
            adverts=self._adverts,
            shares=self._shares,
            survivors=survivors,
            reveals=reveals,
            ring_sum=ring,
            aux_sum=aux,
        )


class _NoMasks:
    """The same integers with nothing added to them."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def expect(self, clients: Sequence[str]) -> None:
        """As many as the real ones need, of whom a large cohort's also must lie well on the ring of neighbours."""
        if len(clients) < self._context.fewest:
            raise refusal("too_few", f"{len(clients)} updates are in, at least {self._context.fewest} are needed")

    def session(self, client: str) -> _NoMasks:
        return self

    def mask(
        self, values_D: Iterable[Array], *, weight: int, aux: Array, rounding: bytes, encoder: Encoder | None
    ) -> Iterator[memoryview]:
        """What `ClientSession.mask` gives, if every mask were zero."""
        yield aux.view(np.uint8).data
        encoder = encoder or Quantizer(weight=weight, rounding=rounding, **self._context.bounds)
        for position, values in chunks(values_D, self._context.dim):
            words = np.empty(len(values), RING)
            encoder.quantize(values, words, position)
            yield pack_ring(words, self._context.ring_bits).data

    def remove(self, uploads: Sequence[str], ring: Array, aux: Array) -> None:
        pass
