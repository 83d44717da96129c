"""Who holds which examples: a data set divided among virtual clients, the same for the same seed. Only numpy.

N = examples, K = clients, C = classes, F = features
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from ..protocol.errors import OperatorError

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class Partition:
    """Each client's examples, as sorted indices; an example stands at one client, or at none.

    names: of the clients, where the data give them one. described: how it was made, with its seed, in one line.
    """

    parts: tuple[Array, ...]
    described: str
    names: tuple[str, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, client: int) -> Array:
        return self.parts[client]

    @cached_property
    def sizes(self) -> Array:
        """(K,) examples of each client."""
        return np.array([len(part) for part in self.parts])

    def counts(self, labels: Any) -> Array:
        """(K, C): how many examples of each class each client has; classes in the order of their labels."""
        classes, codes = np.unique(np.asarray(labels), return_inverse=True)
        return np.array([np.bincount(codes[part], minlength=len(classes)) for part in self.parts])

    def facts(self, labels: Any = None) -> dict[str, float]:
        """In figures: clients, examples, the smallest, median and largest client; with labels, how far their mixes of
        classes lie from that of all together (total variation, the mean over clients weighted by their examples)."""
        sizes = self.sizes
        found = {
            "clients": float(len(self)),
            "examples": float(sizes.sum()),
            "smallest": float(sizes.min()),
            "median": float(np.median(sizes)),
            "largest": float(sizes.max()),
        }
        if labels is not None and sizes.sum():
            counts_KC = self.counts(labels)
            whole_C = counts_KC.sum(0) / counts_KC.sum()
            apart_K = np.abs(counts_KC / np.maximum(sizes, 1)[:, None] - whole_C).sum(1) / 2
            found["skew"] = float((apart_K * sizes).sum() / sizes.sum())
        return found


def iid(examples: int, clients: int, *, seed: int = 0) -> Partition:
    """Shuffled and dealt out: sizes differ by one at most."""
    _check(examples, clients, 1)
    parts = np.array_split(np.random.default_rng(seed).permutation(examples), clients)
    return _made(parts, f"iid, seed {seed}")


def dirichlet(labels: Any, clients: int, alpha: float, *, seed: int = 0, smallest: int = 1) -> Partition:
    """Label skew: each class is divided by shares drawn from Dir(alpha); sizes differ as well.

    alpha: 0.1 gives each client few classes, 100 or more nearly the same mix to all. smallest: a client with fewer
    examples gets the rest, drawn from those who have most.
    Source: Yurochkin et al. 2019, "Bayesian Nonparametric Federated Learning of Neural Networks", section 4,
    arXiv:1905.12022.
    """
    labels = np.asarray(labels)
    classes = np.unique(labels)
    shares_KC = class_shares(clients, len(classes), alpha, seed)
    return _made(
        divide(labels, shares_KC, seed + 1, smallest, classes=classes),
        f"Dirichlet by label, alpha {alpha:g}, seed {seed}",
    )


def class_shares(clients: int, classes: int, alpha: float, seed: int) -> Array:
    """(K, C): the part of each class that goes to each client; columns sum to 1. See `dirichlet`."""
    if clients < 1 or not alpha > 0:
        raise OperatorError(f"clients = {clients} and alpha = {alpha:g}: both must be positive")
    shares_CK = np.random.default_rng(seed).dirichlet(np.full(clients, alpha), classes)
    if not np.isfinite(shares_CK).all():
        raise OperatorError(f"alpha = {alpha:g} is too small for {clients} clients: no shares can be drawn")
    return shares_CK.T


def divide(labels: Array, shares_KC: Array, seed: int, smallest: int = 0, *, classes: Any = None) -> list[Array]:
    """Indices of each client's examples, sorted: every example goes to exactly one client.

    classes: (C,) the label of each column of the shares; by default 0, 1, 2 … smallest: as of `dirichlet`.
    """
    rng = np.random.default_rng(seed)
    _check(len(labels), len(shares_KC), smallest)
    parts: list[list[Array]] = [[] for _ in shares_KC]
    for label, share_K in zip(range(shares_KC.shape[1]) if classes is None else classes, shares_KC.T, strict=True):
        held = rng.permutation(np.flatnonzero(labels == label))
        cuts = np.rint(np.cumsum(share_K)[:-1] * len(held)).astype(np.int64)
        for part, given in zip(parts, np.split(held, cuts), strict=True):
            part.append(given)
    return _with_smallest([rng.permutation(np.concatenate(part)) for part in parts], smallest)


def shards(labels: Any, clients: int, per_client: int = 2, *, seed: int = 0) -> Partition:
    """The pathological split: sorted by label, cut into clients * per_client pieces, per_client of them to each.

    Source: McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data",
    section 3, arXiv:1602.05629.
    """
    labels = np.asarray(labels)
    if per_client < 1:
        raise OperatorError(f"per_client = {per_client}: each client needs a shard")
    _check(len(labels), clients * per_client, 1)
    pieces = np.array_split(np.argsort(labels, kind="stable"), clients * per_client)
    dealt = np.random.default_rng(seed).permutation(len(pieces)).reshape(clients, per_client)
    parts = [np.concatenate([pieces[n] for n in row]) for row in dealt]
    return _made(parts, f"{per_client} shards of sorted labels each, seed {seed}")


def quantity(examples: int, clients: int, sigma: float = 1.0, *, seed: int = 0, smallest: int = 1) -> Partition:
    """Quantity skew: the same mix for all, sizes proportional to exp(sigma * N(0, 1)).

    Source: Li et al. 2020, "Federated Optimization in Heterogeneous Networks", appendix C.1, arXiv:1812.06127, whose
    sizes are lognormal.
    """
    if not 0 <= sigma <= 10:
        raise OperatorError(f"sigma = {sigma:g}: of the logarithm of a size, between 0 and 10")
    _check(examples, clients, smallest)
    rng = np.random.default_rng(seed)
    share_K = np.exp(sigma * rng.standard_normal(clients))
    cuts = np.rint(np.cumsum(share_K / share_K.sum())[:-1] * examples).astype(np.int64)
    parts = _with_smallest(np.split(rng.permutation(examples), cuts), smallest)
    return _made(parts, f"sizes lognormal, sigma {sigma:g}, seed {seed}")


def by_feature(features: Any, clients: int, mix: float = 0.0, *, seed: int = 0) -> Partition:
    """Feature skew: examples in the order of a feature, cut into equal pieces, one to each client.

    features: (N,), or (N, F), of which the direction of largest variance is taken (flattened where there are more
    dimensions). mix: the part of the examples, drawn by lot, that is dealt out evenly instead.
    """
    values = np.asarray(features, np.float64)
    if not 0 <= mix <= 1:
        raise OperatorError(f"mix = {mix:g}: a part of the examples, between 0 and 1")
    _check(len(values), clients, 1)
    if not np.isfinite(values).all():
        raise OperatorError("the features hold NaN or infinity: examples cannot be put into an order by them")
    if values.ndim > 1:
        values = _score(values.reshape(len(values), -1))
    rng = np.random.default_rng(seed)
    order = np.argsort(values, kind="stable")
    drawn = rng.random(len(order)) < mix
    order[drawn] = rng.permutation(order[drawn])
    return _made(np.array_split(order, clients), f"in the order of a feature, {mix:.0%} dealt evenly, seed {seed}")


def by_group(groups: Any, *, smallest: int = 1) -> Partition:
    """The natural division: one client for each value of a column, as writer, role or hospital, in sorted order.

    smallest: values with fewer examples have no client.
    """
    values, codes = np.unique(np.asarray(groups), return_inverse=True)
    order = np.argsort(codes, kind="stable")
    parts = np.split(order, np.cumsum(np.bincount(codes, minlength=len(values)))[:-1])
    kept = [(str(value), part) for value, part in zip(values.tolist(), parts, strict=True) if len(part) >= smallest]
    if not kept:
        raise OperatorError(f"no value of the column has {smallest} examples: lower smallest")
    names, parts = zip(*kept, strict=True)
    return Partition(
        parts=tuple(parts), names=tuple(names), described=f"by the values of a column, {len(kept)} of them"
    )


METHODS: Mapping[str, Callable[..., Partition]] = {
    "iid": iid,
    "dirichlet": dirichlet,
    "shards": shards,
    "quantity": quantity,
    "feature": by_feature,
    "group": by_group,
}


def _made(parts: Sequence[Array], described: str) -> Partition:
    return Partition(parts=tuple(np.sort(part) for part in parts), described=f"{len(parts)} clients, {described}")


def _check(examples: int, clients: int, smallest: int) -> None:
    if clients < 1:
        raise OperatorError(f"clients = {clients}: there must be one at least")
    if clients * smallest > examples:
        raise OperatorError(f"{examples} examples cannot give {clients} clients {smallest} each")


def _with_smallest(held: list[Array], smallest: int) -> list[Array]:
    """Nobody has fewer than `smallest`: what is missing comes from those who have most."""
    for k in range(len(held)):
        while (missing := smallest - len(held[k])) > 0:
            rich = max(range(len(held)), key=lambda j: (len(held[j]), j))
            taken = min(missing, len(held[rich]) - smallest)
            held[k] = np.concatenate([held[k], held[rich][:taken]])
            held[rich] = held[rich][taken:]
    return [np.sort(part) for part in held]


def _score(features_NF: Array) -> Array:
    """(N,) along the direction of largest variance, by power iteration; its sign is that of its largest part."""
    centred_NF = features_NF - features_NF.mean(0)
    direction_F = centred_NF.std(0) + 1e-12
    for _ in range(50):
        direction_F = centred_NF.T @ (centred_NF @ direction_F)
        norm = float(np.linalg.norm(direction_F))
        if not norm:
            return np.zeros(len(features_NF))
        direction_F = direction_F / norm
    return centred_NF @ (direction_F * np.sign(direction_F[np.argmax(np.abs(direction_F))]))
