"""What each client of a world is like: drawn by seed, or as a trace says.

W = windows of all clients
"""

from __future__ import annotations

import csv
import math
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np

from ..protocol.errors import OperatorError
from .world import DAY_H, World

HOUR_S = 3600.0
_EARLY_S = 1e-6  # who comes at a moment is there at it, whatever the rounding of floats
COLUMNS = ("client", "examples_per_s", "down_mbit_s", "up_mbit_s", "online")
_WINDOW = re.compile(r"(\d{1,4}):([0-5]\d)-(\d{1,4}):([0-5]\d)")
Windows = tuple[tuple[float, float], ...]  # (begin, length) in seconds, of a period that comes again and again


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """A client's machine. windows: when it is there, in seconds of each period; apart from each other."""

    examples_per_s: float
    down_mbit_s: float
    up_mbit_s: float
    windows: Windows = ((0.0, DAY_H * HOUR_S),)
    period_s: float = DAY_H * HOUR_S

    def until(self, at_s: float) -> float:
        """When it leaves that is there now; infinity where it stays for ever, `at_s` where it is away."""
        for begin, length in self.windows:
            if length >= self.period_s:
                return math.inf
            if (since := (at_s - begin + _EARLY_S) % self.period_s) < length:
                return at_s + length - since + _EARLY_S
        return at_s


class Devices(Mapping[str, Device]):
    """The devices of all clients, and who is there when."""

    def __init__(self, devices: Mapping[str, Device]) -> None:
        self._devices, self._ids = dict(devices), list(devices)
        rows = [(k, begin, length, d.period_s) for k, d in enumerate(devices.values()) for begin, length in d.windows]
        table = np.array(rows, np.float64).reshape(-1, 4)
        self._owner_W, self._begin_W, self._length_W, self._period_W = table[:, 0].astype(int), *table[:, 1:].T

    def __getitem__(self, client: str) -> Device:
        return self._devices[client]

    def __iter__(self) -> Iterator[str]:
        return iter(self._devices)

    def __len__(self) -> int:
        return len(self._devices)

    @property
    def period_s(self) -> float:
        """After which everything comes again: who has not been there in it never is."""
        return float(self._period_W.max(initial=0.0))

    def there(self, at_s: float) -> list[str]:
        """Who can be asked at a moment, in the order of ids."""
        open_W = (at_s - self._begin_W + _EARLY_S) % self._period_W < self._length_W
        return [self._ids[k] for k in self._owner_W[open_W]]

    def next_arrival(self, after_s: float) -> float:
        """The first moment after this one at which somebody comes; infinity where nobody ever does."""
        comes_W = self._length_W < self._period_W
        if not comes_W.any():
            return math.inf
        since_W = (after_s - self._begin_W + _EARLY_S) % self._period_W
        return after_s + _EARLY_S + float((self._period_W - since_W)[comes_W].min())


def draw_devices(world: World, ids: Sequence[str], seed: int) -> Devices:
    """Each client's device. The same world, id and seed give the same device on any machine, whoever else is there.

    Raises OperatorError for a trace that cannot be read, or that lacks a client.
    """
    rows = read_trace(Path(world.trace), world.period_h) if world.trace else []
    named = {row["client"]: row for row in rows if "client" in row}
    if named and (absent := [client for client in ids if client not in named]):
        raise OperatorError(
            f"{world.trace} has no row for {absent[0]!r} ({len(absent)} of {len(ids)} clients are not in it): add "
            "them, or leave out the column `client`, and each client draws a row"
        )
    found: dict[str, Device] = {}
    for client in ids:
        draw = random.Random(f"{seed}/world/{client}")
        quantiles = [max(draw.random(), 2**-53) for _ in range(4)]
        drawn = {
            "examples_per_s": world.examples_per_s.at(quantiles[0]),
            "down_mbit_s": world.down_mbit_s.at(quantiles[1]),
            "up_mbit_s": world.up_mbit_s.at(quantiles[2]),
        }
        row = named[client] if named else rows[int(draw.random() * len(rows))] if rows else {}
        told = {name: float(row[name]) for name in drawn if name in row}
        if "online" in row:
            windows, period_s = parse_windows(row["online"], world.period_h), world.period_h * HOUR_S
        else:
            begin_h = world.online.begins_h + world.online.spread_h * NormalDist().inv_cdf(quantiles[3])
            windows, period_s = (
                _joined([(begin_h * HOUR_S, world.online.hours * HOUR_S)], DAY_H * HOUR_S),
                DAY_H * HOUR_S,
            )
        found[client] = Device(**(drawn | told), windows=windows, period_s=period_s)
    return Devices(found)


def read_trace(path: Path, period_h: float = DAY_H) -> list[dict[str, str]]:
    """The rows of a trace, checked: a CSV file with some of the columns `COLUMNS`, in any order.

    online: "always", "never", or windows such as "22:00-06:00 12:00-13:30", whose hours go up to `period_h`.
    Raises OperatorError that names the file and the line.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows = [{k: (v or "").strip() for k, v in row.items() if k is not None} for row in reader]  # pyright: ignore[reportUnnecessaryComparison]: of cells without a column
            columns = list(reader.fieldnames or ())
    except OSError as error:
        raise OperatorError(f"cannot read the trace {path}: {error.strerror}") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise OperatorError(f"{path} is not CSV: {error}") from None
    if not rows or set(columns) - set(COLUMNS):
        odd = ", ".join(sorted(set(columns) - set(COLUMNS))) or "no rows"
        raise OperatorError(f"{path} has {odd}: a trace has the columns {', '.join(COLUMNS)}, or some of them")
    seen = set[str]()
    for number, row in enumerate(rows, 2):
        try:
            _check_row(row, seen, period_h)
        except ValueError as error:
            raise OperatorError(f"{path}, line {number}: {error}") from None
    return rows


def _check_row(row: Mapping[str, str], seen: set[str], period_h: float) -> None:
    for name, text in row.items():
        if name == "client":
            if not text or text in seen:
                raise ValueError(f"client {text!r} stands there twice" if text else "the client has no name")
            seen.add(text)
        elif name == "online":
            parse_windows(text, period_h)
        elif not 0 < _number(name, text) < math.inf:
            raise ValueError(f"{name} = {text}: a finite number above 0 belongs there")


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{name} is {text!r}, not a number") from None


def parse_windows(text: str, period_h: float) -> Windows:
    """Windows from "always", "never" or "22:00-06:00 12:00-13:30"; raises ValueError for anything else."""
    if text == "always":
        return ((0.0, period_h * HOUR_S),)
    if text == "never":
        return ()
    found: list[tuple[float, float]] = []
    for part in text.split() or [text]:
        if not (matched := _WINDOW.fullmatch(part)):
            raise ValueError(f"online is {part!r}; it takes always, never, or windows such as 22:00-06:00")
        h0, m0, h1, m1 = map(int, matched.groups())
        begin, end = (h0 + m0 / 60) * HOUR_S, (h1 + m1 / 60) * HOUR_S
        if max(begin, end) > period_h * HOUR_S:
            raise ValueError(f"{part} leaves the {period_h:g} hours after which windows come again (period_h)")
        found.append((begin, (end - begin) % (period_h * HOUR_S) or period_h * HOUR_S))
    return _joined(found, period_h * HOUR_S)


def _joined(windows: Iterable[tuple[float, float]], period_s: float) -> Windows:
    """The same times as windows that do not touch; one that is always open begins at 0."""
    pieces: list[tuple[float, float]] = []
    for begin, length in windows:
        begin %= period_s
        pieces += [
            (begin, min(begin + length, period_s)),
            (0.0, max(0.0, min(begin + length, 2 * period_s) - period_s)),
        ]
    merged: list[tuple[float, float]] = []
    for begin, end in sorted(p for p in pieces if p[1] > p[0]):
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((begin, end))
    if len(merged) > 1 and merged[0][0] == 0 and merged[-1][1] == period_s:  # over midnight
        merged = [*merged[1:-1], (merged[-1][0], period_s + merged[0][1])]
    return tuple((begin, end - begin) for begin, end in merged)
