"""Who holds which images: class mixes drawn from a Dirichlet distribution, the same for the same seed. Only numpy."""

from __future__ import annotations

from typing import Any

import numpy as np

from murmur.protocol.errors import OperatorError

# K = clients, C = classes

Array = np.ndarray[Any, Any]


def class_shares(clients: int, classes: int, alpha: float, seed: int) -> Array:
    """(K, C): the part of each class's images that goes to each client; columns sum to 1.

    alpha: small gives each client few classes, 100 or more nearly the same mix to all.
    Source: Yurochkin et al. 2019, "Bayesian Nonparametric Federated Learning of Neural Networks", section 4,
    arXiv:1905.12022.
    """
    if clients < 1 or not alpha > 0:
        raise OperatorError(f"clients = {clients} and alpha = {alpha:g}: both must be positive")
    shares_CK = np.random.default_rng(seed).dirichlet(np.full(clients, alpha), classes)
    if not np.isfinite(shares_CK).all():
        raise OperatorError(f"alpha = {alpha:g} is too small for {clients} clients: no shares can be drawn")
    return shares_CK.T


def divide(labels: Array, shares_KC: Array, seed: int, smallest: int = 0) -> list[Array]:
    """Indices of each client's images, sorted: every image goes to exactly one client.

    smallest: a client with fewer images gets the rest, drawn from those who have most.
    """
    rng = np.random.default_rng(seed)
    parts: list[list[Array]] = [[] for _ in shares_KC]
    for c, share_K in enumerate(shares_KC.T):
        images = rng.permutation(np.flatnonzero(labels == c))
        cuts = np.rint(np.cumsum(share_K)[:-1] * len(images)).astype(np.int64)
        for part, given in zip(parts, np.split(images, cuts), strict=True):
            part.append(given)
    held = [rng.permutation(np.concatenate(part)) for part in parts]
    if smallest * len(held) > len(labels):
        raise OperatorError(f"{len(labels)} images cannot give {len(held)} clients {smallest} each")
    for k in range(len(held)):
        while (missing := smallest - len(held[k])) > 0:
            rich = max(range(len(held)), key=lambda j: (len(held[j]), j))
            taken = min(missing, len(held[rich]) - smallest)
            held[k] = np.concatenate([held[k], held[rich][:taken]])
            held[rich] = held[rich][taken:]
    return [np.sort(part) for part in held]
