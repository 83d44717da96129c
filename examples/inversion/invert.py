"""What an update shows: images read out of plain updates, and noise out of the masked uploads of the same updates.

python examples/inversion/invert.py --data fashion_mnist.npz --to pictures
"""

from __future__ import annotations

import argparse
import hashlib
import struct
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from murmur.clients.engine.loop import run_job
from murmur.clients.engine.state import initial_model
from murmur.clients.job import Job
from murmur.clients.updates import float_pieces
from murmur.privacy.auxiliary import Block
from murmur.privacy.client import ClientSession, Policy
from murmur.privacy.context import Context
from murmur.privacy.fixed_point import decode
from murmur.privacy.server import ServerSession
from murmur.protocol.sections import Train
from murmur.protocol.tensors import Layout
from murmur.protocol.thresholds import default_threshold

# K = clients, D = elements of an update, P = 784 pixels, H = 64 neurons of the first layer

Array = np.ndarray[Any, Any]
P, H = 784, 64
CLIP_VALUE = 1.0  # no value of these updates is larger
BLOCK = Block(clients=64)


class OneImage:
    """A `murmur.Task` of one image: a model whose first layer is linear, and one training step."""

    def __init__(self, image: Array, label: int) -> None:
        pixels = torch.from_numpy(image.astype(np.float32) / 255).reshape(1, P)
        self._data = TensorDataset(pixels, torch.tensor([label]))

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(P, H), nn.ReLU(), nn.Linear(H, 10))

    def data(self, split: str) -> TensorDataset | None:
        return self._data if split == "train" else None

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, target, reduction="sum")


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One client's image, and what comes out of: its plain update, its masked upload, the sum of all; (P,) each."""

    image: Array
    plain: Array
    masked: Array
    summed: Array

    @property
    def cosines(self) -> tuple[float, float, float]:
        """How like the image each of them is: 1 is the image itself, noise is near 0."""
        return cosine(self.plain, self.image), cosine(self.masked, self.image), cosine(self.summed, self.image)


def demonstrate(images: Array, labels: Array) -> list[Shown]:
    """Each image is the data of one client of a round, 3 or more: (K, 28, 28) uint8 and (K,)."""
    with TemporaryDirectory() as folder:
        updates_KD, layout = train(images, labels, Path(folder))
    uploads_KD, sum_D = masked_round(updates_KD, layout)
    summed = invert(sum_D, layout)
    return [
        Shown(image=image.reshape(P) / 255, plain=invert(u, layout), masked=invert(y, layout), summed=summed)
        for image, u, y in zip(images, updates_KD, uploads_KD, strict=True)
    ]


def invert(update_D: Array, layout: Layout) -> Array:
    """The input of a linear layer y = Wx + b, read from one gradient step: dW[i] = db[i] x for every neuron i.

    Source: Phong et al. 2017, "Privacy-Preserving Deep Learning: Revisited and Enhanced", section 3, which proves it
    for one example; of several it gives a mixture.
    """
    found = tensors(update_D, layout)
    weights_HP, bias_H = found["0.weight"].reshape(H, P), found["0.bias"]
    i = int(np.argmax(np.abs(bias_H)))
    return weights_HP[i] / bias_H[i]


def train(images: Array, labels: Array, folder: Path) -> tuple[Array, Layout]:
    """The clients' updates, (K, D), by the training loop of a real agent: one step of SGD on one image."""
    model, update = folder / "model.safetensors", folder / "update.safetensors"
    layout = initial_model(OneImage(images[0], 0), 0, model)
    found: list[Array] = []
    for k, (image, label) in enumerate(zip(images, labels, strict=True)):
        job = Job(id=f"job{k}", kind="train", model=model, update=update, train=Train(lr=0.1), mu=0.0, metrics=(),
                  seed=0, round=1, client=f"client-{k:02}")  # fmt: skip
        run_job(OneImage(image, int(label)), job)
        found.append(np.concatenate([piece.copy() for piece in float_pieces(update, layout)]))
    return np.stack(found), layout


def masked_round(updates_KD: Array, layout: Layout) -> tuple[Array, Array]:
    """What a coordinator gets of a masked round: each upload read as if it were an update, (K, D), and the sum, (D,).

    The clients and the server are those of a real round; the messages are handed over in place of being sent.
    """
    cohort = tuple(f"client-{k:02}" for k in range(len(updates_KD)))
    context = Context(
        run="inversion", round=1, attempt=1, kind="train", model_sha256="0" * 64, layout_sha256=layout.digest(),
        settings_sha256=hashlib.sha256(b"one step").hexdigest(), dim=updates_KD.shape[1], aux=BLOCK.size,
        cohort=cohort, threshold=default_threshold(len(cohort)), min_clients=3, clip_value=CLIP_VALUE, max_weight=1,
    )  # fmt: skip
    identities = {u: Ed25519PrivateKey.generate() for u in cohort}
    server = ServerSession(context, {u: key.public_key().public_bytes_raw() for u, key in identities.items()})
    clients = {u: ClientSession(context, u, identities[u], policy=Policy(), known={}) for u in cohort}
    adverts = {u: clients[u].advertise() for u in cohort}
    shares = {u: clients[u].share(server.roster(adverts)) for u in cohort}
    ring_KD = np.empty(updates_KD.shape, np.uint32)
    aux_sum = np.zeros(BLOCK.size, np.uint64)
    for k, u in enumerate(cohort):
        clients[u].open(server.inbox(u, adverts, shares))
        aux = BLOCK.encode(weight=1, clipped=0, metrics={})
        upload = b"".join(clients[u].mask([updates_KD[k]], weight=1, aux=aux))
        aux_sum += np.frombuffer(upload[: aux.nbytes], np.uint64)
        ring_KD[k] = np.frombuffer(upload[aux.nbytes :], np.uint32)
    told = server.survivors(adverts, shares, cohort)
    agrees = {u: clients[u].agree(told) for u in cohort}
    reveals = {u: clients[u].reveal(server.signatures(u, adverts, agrees)) for u in cohort}
    ring_sum = ring_KD.sum(0, dtype=np.uint32)
    server.unmask(adverts=adverts, shares=shares, survivors=told, reveals=reveals, ring_sum=ring_sum, aux_sum=aux_sum)
    scale = {"clip_value": CLIP_VALUE, "max_weight": 1, "n": len(cohort)}
    return np.stack([decode(y, **scale) for y in ring_KD]), decode(ring_sum, **scale)


def tensors(update_D: Array, layout: Layout) -> dict[str, Array]:
    """An update's tensors by name, flat."""
    names = layout.update().tensors
    ends = np.cumsum([t.numel for t in names])
    return {t.name: update_D[end - t.numel : end] for t, end in zip(names, ends, strict=True)}


def cosine(a: Array, b: Array) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def picture(shown: Sequence[Shown]) -> Array:
    """(28 K + margins, 4 x 28 + margins) uint8: a row for each client, in the columns what `Shown` holds."""
    rows: list[Array] = []
    for one in shown:
        tiles = [tile(v) for v in (one.image, one.plain, one.masked, one.summed)]
        rows.append(np.concatenate([np.pad(t, 2, constant_values=255) for t in tiles], axis=1))
    return np.concatenate(rows).repeat(3, 0).repeat(3, 1)


def tile(values_P: Array) -> Array:
    """An image in its own range of grey: what matters is whether there is one."""
    low, high = values_P.min(), values_P.max()
    return np.rint((values_P - low) * (255 / max(high - low, 1e-12))).astype(np.uint8).reshape(28, 28)


def write_png(path: Path, grey: Array) -> None:
    """An 8-bit greyscale PNG, (height, width) uint8. Source: the PNG specification, sections 5 and 11.2."""
    height, width = grey.shape
    lines = b"".join(b"\0" + row.tobytes() for row in grey)
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), (b"IDAT", zlib.compress(lines, 9)),
              (b"IEND", b""))  # fmt: skip
    body = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def main() -> None:
    parser = argparse.ArgumentParser(description="Invert plain updates and the masked uploads of the same updates.")
    parser.add_argument("--data", type=Path, required=True, help="fashion_mnist.npz; see ../fashion_mnist/README.md")
    parser.add_argument("--to", type=Path, default=Path("pictures"), help="folder for inversion.png")
    parser.add_argument("--clients", type=int, default=5, help="clients of the round, with one image each")
    given = parser.parse_args()
    if not given.data.is_file() or given.clients < 3:
        sys.exit(f"--data: there is no {given.data}" if given.clients >= 3 else "--clients: a masked round needs 3")
    with np.load(given.data, allow_pickle=False) as file:
        shown = demonstrate(file["x_train"][: given.clients], file["y_train"][: given.clients])
    say = sys.stdout.write
    say("cosine to the image   plain update   masked upload   sum of all\n")
    for k, one in enumerate(shown):
        plain, masked, summed = one.cosines
        say(f"client-{k:02}             {plain:12.6f}   {masked:13.4f}   {summed:10.4f}\n")
    given.to.mkdir(parents=True, exist_ok=True)
    write_png(given.to / "inversion.png", picture(shown))
    say(f"{given.to / 'inversion.png'}: image, from the plain update, from the masked upload, from the sum\n")


if __name__ == "__main__":
    main()
