"""A masked round among virtual clients: the state machines of real ones, talking in one process."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ..aggregation.weighted_sum import ring_sum
from ..clients.job import Result
from ..clients.updates import write_masked
from ..privacy.auxiliary import Totals
from ..privacy.client import ClientSession, Policy
from ..privacy.dp.plan import round_encoding
from ..privacy.fixed_point import mean
from ..privacy.masks import Array
from ..privacy.server import ServerSession
from ..privacy.terms import block_of, context_of
from ..protocol.encoding import canonical_json
from ..protocol.errors import InternalError
from ..protocol.messages import Assignment, Kind
from ..protocol.tensors import Layout


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

    assignment: any one client's; terms, model and settings are the same for all. layout: the model's.
    Raises PrivacyRefusal as a real round would, for terms under which no sum may be read.
    """

    def __init__(self, assignment: Assignment, layout: Layout, keys: Keys) -> None:
        terms = assignment.secure
        assert terms is not None, "a plain round has no terms"
        self._layout, self._terms = layout, terms
        self._block = block_of(assignment, layout, terms)
        self._context = context_of(assignment, layout, terms)
        private = assignment.dp.of_clients and assignment.kind is Kind.TRAIN
        self._encoding = round_encoding(assignment, layout, terms) if private else None
        identities = {u: keys.of(u).public_key().public_bytes_raw() for u in terms.cohort}
        self._server = ServerSession(self._context, identities)
        self._clients = {
            u: ClientSession(self._context, u, keys.of(u), policy=Policy(min_clients=terms.min_clients), known={})
            for u in terms.cohort
        }
        self._uploaded: list[str] = []
        self._ring, self._aux = np.zeros(0, np.uint32), np.zeros(0, np.uint64)
        self._adverts = {u: client.advertise() for u, client in self._clients.items()}
        for u, body in self._adverts.items():
            self._server.check_advert(u, body)
        roster = self._server.roster(self._adverts)
        self._shares = {u: client.share(roster) for u, client in self._clients.items()}
        for u, body in self._shares.items():
            self._server.check_shares(u, body, self._adverts)
        for u, client in self._clients.items():
            client.open(self._server.inbox(u, self._adverts, self._shares))

    def upload(self, client: str, assignment: Assignment, result: Result, path: Path) -> None:
        """Write what the client would send, add it to the sum and delete it: nothing in it means anything alone."""
        rounding = sha256(canonical_json(["rounding", assignment.seed, assignment.round, client])).digest()
        write_masked(path, self._clients[client], assignment, self._layout, result, rounding)
        ring, block = ring_sum((path,), self._context.dim, self._context.aux, self._context.ring_bits)
        path.unlink()
        if self._uploaded:
            np.add(self._ring, ring, out=self._ring)
            np.add(self._aux, block, out=self._aux)
        else:
            self._ring, self._aux = ring, block
        self._uploaded.append(client)

    def unmask(self) -> tuple[Array, Totals]:
        """The weighted mean of the updates, (D,) in the order of an update's file, and the totals.

        Under differential privacy the sum of the clipped updates, (D,) float64. Without a single example there is no
        mean: it is empty. Raises SumTooLarge where the sum may have left the ring.
        """
        uploads, ring, aux = self._uploaded, self._ring, self._aux
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
        totals = self._block.decode(aux)
        if totals.clients != len(uploads):
            raise InternalError(f"the unmasked sum counts {totals.clients} clients, {len(uploads)} uploaded")
        if not totals.weight:
            return np.zeros(0), totals
        if self._encoding:
            return self._encoding.decode(ring), totals
        return mean(ring, weight=totals.weight, dtype=self._layout.widest_float, **self._context.bounds), totals
