"""Secure aggregation, measured beside flwr's: `python -m benchmarks.secagg`. See docs/benchmarks.md."""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from murmur.clients.updates import float_pieces
from murmur.privacy.client import ClientSession, Policy
from murmur.privacy.fixed_point import count_clipped
from murmur.privacy.masks import Masks
from murmur.privacy.server import ServerSession
from murmur.protocol.errors import PrivacyRefusal
from murmur.protocol.tensors import masked_layout, write_chunks

from . import flower_round, masked_round
from .masked_round import BLOCK, Stopwatch, terms
from .report import PACKAGES, Figure, document, median, note, print_report
from .runs import layout_of, write_model

RUNS = 3
GRAPH = (32, 22)  # neighbours and threshold for 100 clients of which a tenth lies and a tenth drops out


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """How much is measured, and where; data: the Fashion-MNIST file, or none."""

    folder: Path
    quick: bool
    data: str

    @property
    def runs(self) -> int:
        return 1 if self.quick else RUNS


def main(arguments: list[str] | None = None) -> None:
    options = _options(arguments)
    scale = Scale(folder=Path(options.dir), quick=options.quick, data=options.data)
    figures: list[Figure] = []
    for name in options.only or PARTS:
        note(f"{name} …")
        figures += PARTS[name](scale)
    found = document(figures, folder=scale.folder, quick=scale.quick, packages=(*PACKAGES, "flwr", "cryptography"))
    print_report(found, options.form)


def against_flwr(scale: Scale) -> list[Figure]:
    """CPU, bytes and error of one round, ours and flwr's one after the other on the same updates."""
    dim, fewer = (20_000, 20_000) if scale.quick else (10_000_000, 1_000_000)
    with _one_processor():
        full = [_pair(scale, 10, dim, dropped=()) for _ in range(scale.runs)]
        holes = [_pair(scale, 20, fewer, dropped=(3, 8, 15))]  # flwr takes minutes for the shares of these

    def ratio(pairs: list[tuple[masked_round.Spent, masked_round.Spent]], what: str) -> float:
        return median([getattr(b, what) / getattr(a, what) for a, b in pairs])

    def ours(pairs: list[tuple[masked_round.Spent, masked_round.Spent]], what: str, which: int = 0) -> float:
        return median([getattr(pair[which], what) for pair in pairs])

    said = f"10 clients x {dim:,} parameters, ours and flwr's {scale.runs} times each"
    lost = f"20 clients x {fewer:,}, 3 dropped after they dealt their shares"
    return [
        Figure(name="client_vs_flwr", value=ratio(full, "mask_s"), unit="x faster", at_least=8, note=said),
        Figure(name="server_vs_flwr", value=ratio(full, "server_s"), unit="x faster", at_least=30, note=said),
        Figure(name="bytes_vs_flwr", value=1 / ratio(full, "upload_bytes"), unit="x its bytes", at_most=0.501),
        Figure(name="error_vs_flwr", value=1 / ratio(full, "error"), unit="x its error", at_most=0.01),
        Figure(name="server_vs_flwr_dropped", value=ratio(holes, "server_s"), unit="x faster", at_least=30, note=lost),
        Figure(name="client_s", value=ours(full, "mask_s"), unit="s", note=said),
        Figure(name="client_s_flwr", value=ours(full, "mask_s", 1), unit="s"),
        Figure(name="server_s", value=ours(full, "server_s"), unit="s"),
        Figure(name="server_s_flwr", value=ours(full, "server_s", 1), unit="s"),
        Figure(name="server_dropped_s", value=ours(holes, "server_s"), unit="s", note=lost),
        Figure(name="server_dropped_s_flwr", value=ours(holes, "server_s", 1), unit="s"),
        Figure(name="upload_bytes", value=ours(full, "upload_bytes") / dim, unit="bytes a parameter"),
        Figure(name="upload_bytes_flwr", value=ours(full, "upload_bytes", 1) / dim, unit="bytes a parameter"),
        Figure(name="error", value=ours(full, "error"), unit="", note="largest of the mean, updates of N(0, 0.01)"),
        Figure(name="error_flwr", value=ours(full, "error", 1), unit=""),
    ]


def _pair(scale: Scale, n: int, dim: int, *, dropped: tuple[int, ...]) -> tuple[masked_round.Spent, masked_round.Spent]:
    random = np.random.default_rng(n)
    updates = [random.normal(0, 0.01, dim).astype(np.float32) for _ in range(n)]
    weights = [int(w) for w in random.integers(300, 900, n)]
    staying = [i for i in range(n) if i not in dropped]
    exact = np.zeros(dim)
    for i in staying:
        exact += updates[i].astype(np.float64) * weights[i]
    exact /= sum(weights[i] for i in staying)
    with tempfile.TemporaryDirectory(dir=scale.folder) as folder:
        context = terms(n, dim, total=sum(weights))
        ours = masked_round.play(context, updates, weights, folder=Path(folder), dropped=dropped)
    theirs = flower_round.play(updates, weights, dropped=dropped)
    for found in (ours, theirs):
        found.error = float(np.abs(found.mean - exact).max())
    note(
        f"client {ours.mask_s:.4f} s, flwr {theirs.mask_s:.3f} s; server {ours.server_s:.3f} s, {theirs.server_s:.2f} s"
    )
    return ours, theirs


@contextlib.contextmanager
def _one_processor() -> Generator[None]:
    """One thread on one processor: CPU seconds of threads that share a core say little."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def large(scale: Scale) -> list[Figure]:
    """The same at ten million parameters, ours alone, and ten masks against ten plain additions."""
    dim = 100_000 if scale.quick else 10_000_000
    random = np.random.default_rng(1)
    update = random.normal(0, 0.01, dim).astype(np.float32)
    with _one_processor(), tempfile.TemporaryDirectory(dir=scale.folder) as folder:
        context = terms(10, dim, total=6000)
        spent = [masked_round.play(context, [update], [600] * 10, folder=Path(folder)) for _ in range(scale.runs)]
    keys = [(bytes([i]) * 32, bool(i % 2)) for i in range(10)]
    words, other = np.zeros(dim, np.uint32), np.ones(dim, np.uint32)
    ratios: list[float] = []
    for _ in range(2 * scale.runs + 1):
        masking, adding = Stopwatch(), Stopwatch()
        masking(lambda: Masks(keys, words.dtype).apply(words))
        for _ in keys:
            adding(lambda: np.add(words, other, out=words))
        ratios.append(masking.spent_s / adding.spent_s)
    said = f"10 clients x {dim:,} parameters; CPU seconds of all threads"
    return [
        Figure(name="masks_vs_adds", value=median(ratios), unit="x np.add", at_most=3, note=f"10 masks of {dim:,}"),
        Figure(name="large_client_s", value=median([s.mask_s for s in spent]), unit="s", note=said),
        Figure(name="large_server_s", value=median([s.server_s for s in spent]), unit="s", note=said),
    ]


def stream(scale: Scale) -> list[Figure]:
    """An upload of a hundred million parameters, from the trainer's file to the bytes to send."""
    dim = 1_000_000 if scale.quick else 100_000_000
    layout = layout_of(4 * dim)
    with tempfile.TemporaryDirectory(dir=scale.folder) as folder:
        update = Path(folder, "update")
        write_model(update, 4 * dim)  # an update to this model has its layout
        next(_uploaded(update, dim))  # keys, threads' stacks and libraries are not what grows with the model
        before = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        began = time.monotonic()
        clipped = sum(count_clipped(values, 8.0) for values in float_pieces(update, layout))
        with open(os.devnull, "wb") as sink:
            write_chunks(sink, masked_layout(dim, BLOCK.size), _uploaded(update, dim))
        took_s = time.monotonic() - began
        growth = _resident("VmHWM") - before
    assert clipped == 0
    said = f"{dim:,} parameters, masks of 9 peers and its own"
    return [
        Figure(name="stream_rss_growth", value=max(growth, 0.0), unit="MB", at_most=16, note=said),
        Figure(name="stream_s", value=took_s, unit="s", note=f"{said}; to /dev/null"),
    ]


def _uploaded(update: Path, dim: int) -> Iterator[memoryview]:
    """One of ten clients' upload, as a stream."""
    context = terms(10, dim, total=6000)
    keys = {u: Ed25519PrivateKey.generate() for u in context.cohort}
    server = ServerSession(context, {u: key.public_key().public_bytes_raw() for u, key in keys.items()})
    clients = {u: ClientSession(context, u, keys[u], policy=Policy(), known={}) for u in context.cohort}
    adverts = {u: client.advertise() for u, client in clients.items()}
    roster = server.roster(adverts)
    shares = {u: client.share(roster) for u, client in clients.items()}
    me = context.cohort[4]
    clients[me].open(server.inbox(me, adverts, shares))
    aux = BLOCK.encode(weight=600, clipped=0, metrics={})
    yield from clients[me].mask(float_pieces(update, layout_of(4 * dim)), weight=600, aux=aux)


def _resident(what: str) -> float:
    """MB of this process, now (VmRSS) or at most since the peak was last forgotten (VmHWM)."""
    line = next(text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith(what))
    return int(line.split()[1]) * 1024 / 1e6


def control(scale: Scale) -> list[Figure]:
    """A client's keys, shares, agreement and reveal among a hundred, on the complete graph and on a sparse one."""
    n = 12 if scale.quick else 100
    degree, threshold = (4, 4) if scale.quick else GRAPH

    def spent(**graph: int) -> float | None:
        with tempfile.TemporaryDirectory(dir=scale.folder) as folder, contextlib.suppress(PrivacyRefusal):
            context, none = terms(n, 0, **graph), [np.zeros(0, np.float32)]
            return median(
                [
                    1e3 * masked_round.play(context, none, [1] * n, folder=Path(folder)).control_s
                    for _ in range(scale.runs)
                ]
            )
        return None  # these terms are not possible here

    said = f"{n} clients; CPU of one of them"
    sparse = f"{said}, {degree} neighbours, {threshold} shares"
    return [
        Figure(name="control_complete", value=spent(), unit="ms", at_most=80, note=said),
        Figure(
            name="control_sparse", value=spent(degree=degree, threshold=threshold), unit="ms", at_most=40, note=sparse
        ),
    ]


def run(scale: Scale) -> list[Figure]:
    """Wall time of a Fashion-MNIST simulation, masked against plain, in turn."""
    if not scale.data:
        note("run: left out, --data names no fashion_mnist.npz")
        return []
    from murmur import simulate

    cohort, rounds = (3, 1) if scale.quick else (10, 3)

    def took_s(secure: bool) -> float:
        began = time.monotonic()
        options = {"data": scale.data}
        simulate("examples/fashion_mnist", clients=100, cohort=cohort, rounds=rounds, secure=secure, options=options)
        return time.monotonic() - began

    took_s(False)  # reads the data, loads torch
    pairs = [(took_s(True), took_s(False)) for _ in range(scale.runs)]
    said = f"{cohort} of 100 clients, {rounds} rounds of the example's recipe, simulated"
    return [
        Figure(name="masked_run", value=median([a / b for a, b in pairs]), unit="x plain", at_most=1.15, note=said),
        Figure(name="masked_run_s", value=median([a for a, _ in pairs]), unit="s"),
        Figure(name="plain_run_s", value=median([b for _, b in pairs]), unit="s"),
    ]


PARTS = {"stream": stream, "flwr": against_flwr, "large": large, "control": control, "run": run}


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.secagg", description=__doc__)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", dest="form", action="store_const", const="json", help="one object on one line")
    form.add_argument("--markdown", dest="form", action="store_const", const="markdown", help="the page's table")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="NAME", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--quick", action="store_true", help="every part small: it shows that it runs, not how fast")
    parser.add_argument("--data", default="", help="fashion_mnist.npz, for the part `run`; without it that is left out")
    parser.add_argument("--dir", default=tempfile.gettempdir(), help="where uploads lie meanwhile [%(default)s]")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
