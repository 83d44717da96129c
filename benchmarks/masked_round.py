"""One masked round without HTTP, its stages timed apart: CPU seconds of the clients and of the server."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from murmur.aggregation.weighted_sum import ring_sum
from murmur.privacy.auxiliary import Block
from murmur.privacy.client import ClientSession, Policy
from murmur.privacy.context import Context
from murmur.privacy.fixed_point import mean, weight_bound
from murmur.privacy.masks import Array
from murmur.privacy.server import ServerSession
from murmur.protocol.sections import Secure, Strategy
from murmur.protocol.tensors import masked_layout, write_chunks
from murmur.protocol.thresholds import default_threshold

Found = TypeVar("Found")
DIGEST = "0" * 64
BLOCK = Block()


@dataclass(kw_only=True)
class Spent:
    """CPU seconds of all threads: of one client (the mean over all) or of the server, and what came out."""

    control_s: float = 0.0  # a client's keys, shares, agreement and reveal
    mask_s: float = 0.0  # a client's masked upload: shares opened, quantized, masked
    server_s: float = 0.0  # uploads added up, masks found and taken out, mean decoded
    upload_bytes: float = 0.0
    error: float = 0.0  # the largest of the mean, told by whoever knows the exact one
    mean: Array = field(default_factory=lambda: np.zeros(0))


class Stopwatch:
    """CPU seconds of this process in the calls made through it."""

    def __init__(self) -> None:
        self.spent_s = 0.0

    def __call__(self, work: Callable[[], Found]) -> Found:
        began = time.process_time()
        try:
            return work()
        finally:
            self.spent_s += time.process_time() - began


def terms(n: int, dim: int, *, total: int = 0, degree: int = 0, threshold: int = 0, ring_bits: int = 32) -> Context:
    """A recipe's defaults for n clients; total: what their weights added up to in the round before."""
    cohort = tuple(f"c{i:04}" for i in range(n))
    most = Strategy().weight_cap
    return Context(
        run="benchmark",
        round=2,
        attempt=1,
        kind="train",
        model_sha256=DIGEST,
        layout_sha256=DIGEST,
        settings_sha256=DIGEST,
        dim=dim,
        aux=BLOCK.size,
        cohort=cohort,
        threshold=threshold or default_threshold(n),
        min_clients=3,
        clip_value=Secure().clip_value,
        max_weight=most,
        ring_bits=ring_bits,
        degree=degree,
        total_weight=weight_bound(total, cohort, cohort, most),
    )


def play(
    context: Context, updates: list[Array], weights: list[int], *, folder: Path, dropped: Collection[int] = ()
) -> Spent:
    """A whole round; `dropped` deal their shares and never upload."""
    identities = {u: Ed25519PrivateKey.generate() for u in context.cohort}
    server = ServerSession(context, {u: key.public_key().public_bytes_raw() for u, key in identities.items()})
    control, masking, summing = Stopwatch(), Stopwatch(), Stopwatch()
    clients = {
        u: control(lambda u=u: ClientSession(context, u, identities[u], policy=Policy(), known={}))
        for u in context.cohort
    }
    adverts = {u: control(client.advertise) for u, client in clients.items()}
    roster = server.roster(adverts)
    shares = {u: control(lambda client=client: client.share(roster)) for u, client in clients.items()}
    staying = [u for i, u in enumerate(context.cohort) if i not in dropped]
    layout = masked_layout(context.dim, context.aux, context.ring_bits)
    uploads = {u: folder / u for u in staying}
    for i, u in enumerate(context.cohort):
        if u not in uploads:
            continue
        inbox, client = server.inbox(u, adverts, shares), clients[u]
        weight, values = weights[i], updates[i % len(updates)]
        aux = BLOCK.encode(weight=weight, clipped=0, metrics={})
        (masking if context.dim else control)(lambda client=client, inbox=inbox: client.open(inbox))
        stream = client.mask([values[: context.dim]], weight=weight, aux=aux)
        body = masking(lambda stream=stream: b"".join(stream))
        with uploads[u].open("wb") as file:
            write_chunks(file, layout, [body])
    survivors = server.survivors(adverts, shares, staying)
    agrees = {u: control(lambda u=u: clients[u].agree(survivors)) for u in staying}
    signed = {u: server.signatures(u, adverts, agrees) for u in staying}
    reveals = {u: control(lambda u=u: clients[u].reveal(signed[u])) for u in staying}

    def sums() -> Array:
        ring, aux = ring_sum(uploads.values(), context.dim, context.aux, context.ring_bits)
        server.unmask(adverts=adverts, shares=shares, survivors=survivors, reveals=reveals, ring_sum=ring, aux_sum=aux)
        return mean(ring, weight=BLOCK.decode(aux).weight, dtype=np.float32, **context.bounds)

    found = summing(sums)
    sizes = [path.stat().st_size for path in uploads.values()]
    for path in uploads.values():
        path.unlink()
    return Spent(
        control_s=control.spent_s / len(clients),
        mask_s=masking.spent_s / len(staying),
        server_s=summing.spent_s,
        upload_bytes=sum(sizes) / len(sizes),
        mean=found,
    )
