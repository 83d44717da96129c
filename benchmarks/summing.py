"""The sum of 100 updates of 100 MB against copying the same bytes in memory, once each, in the same run."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from murmur.aggregation.weighted_sum import Contribution, ring_sum, weighted_mean
from murmur.protocol.tensors import Layout, masked_layout, write_chunks

from .report import Figure, median, note
from .runs import Scale, layout_of, write_model

FILES = 8  # 800 MB do not fit a processor's cache; more would only take memory from the machine
RUNS = 5


def measure(scale: Scale) -> list[Figure]:
    """Ratios of seconds: a plain float32 mean and a masked ring sum to `numpy.copyto` of the same bytes."""
    size, clients, runs = (1 << 20, 16, 1) if scale.quick else (100_000_000, 100, RUNS)
    with tempfile.TemporaryDirectory(dir=scale.folder) as folder:
        plain, layout = _plain_files(Path(folder), size), layout_of(size).update()
        masked, dim = _masked_files(Path(folder), size), size // 4
        cohort = [Contribution(client=f"c{i:03}", path=plain[i % FILES], weight=1.0 + i % 7) for i in range(clients)]
        uploads = [masked[i % FILES] for i in range(clients)]
        found: list[tuple[float, float, float]] = []
        for _ in range(runs):
            copied = _copy(plain, clients)
            mean = _timed(lambda: weighted_mean(cohort, layout))
            ring = _timed(lambda: ring_sum(uploads, dim, 1))
            found.append((copied, mean, ring))
            note(f"sum: copy {copied:.2f} s, mean {mean:.2f} s, ring {ring:.2f} s")
    copies, means, rings = zip(*found, strict=True)
    said = f"{clients} updates of {size / 1e6:.0f} MB, which are {FILES} files taken in turn, in the page cache"
    return [
        Figure(name="sum_plain", value=_ratio(means, copies), unit="x the copy", at_most=3, note=said),
        Figure(name="sum_masked", value=_ratio(rings, copies), unit="x the copy", at_most=3, note=said),
        Figure(name="sum_plain_s", value=median(means), unit="s"),
        Figure(name="sum_masked_s", value=median(rings), unit="s"),
        Figure(name="copy_s", value=median(copies), unit="s", note="between arrays that are resident already"),
    ]


def _copy(paths: list[Path], clients: int) -> float:
    sources = [np.fromfile(path, np.uint8) for path in paths]
    target = np.empty_like(sources[0])
    target.fill(0)
    return _timed(lambda: [np.copyto(target, sources[i % FILES]) for i in range(clients)])


def _plain_files(folder: Path, size: int) -> list[Path]:
    paths = [folder / f"plain{i}" for i in range(FILES)]
    for path in paths:
        write_model(path, size)  # an update to this model has its layout
    return paths


def _masked_files(folder: Path, size: int) -> list[Path]:
    dim = size // 4
    layout: Layout = masked_layout(dim, 1)
    random = np.random.default_rng(1)

    def pieces() -> Iterator[memoryview]:
        yield np.zeros(1, np.uint64).view(np.uint8).data
        yield random.integers(0, 1 << 32, dim, np.uint32).view(np.uint8).data

    paths = [folder / f"masked{i}" for i in range(FILES)]
    for path in paths:
        with path.open("wb") as file:
            write_chunks(file, layout, pieces())
    return paths


def _ratio(ours: tuple[float, ...], copies: tuple[float, ...]) -> float:
    return median([a / b for a, b in zip(ours, copies, strict=True)])


def _timed(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began
