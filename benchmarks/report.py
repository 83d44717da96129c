"""Figures with their aims, the machine they were measured on, and the three ways to print them."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGES = ("murmur", "fastapi", "uvicorn", "uvloop", "httptools", "sqlalchemy", "pydantic", "numpy", "torch")


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One measured number. With no aim it is only reported; `value` is None where there was nothing to measure."""

    name: str
    value: float | None
    unit: str
    at_most: float | None = None
    below: float | None = None
    at_least: float | None = None
    note: str = ""

    @property
    def aim(self) -> str:
        for sign, limit in (("<=", self.at_most), ("<", self.below), (">=", self.at_least)):
            if limit is not None:
                return f"{sign} {limit:g}"
        return ""

    @property
    def met(self) -> bool | None:
        if not self.aim:
            return None
        if self.value is None:
            return False
        if self.at_most is not None:
            return self.value <= self.at_most
        if self.below is not None:
            return self.value < self.below
        return self.value >= (self.at_least or 0.0)

    def row(self) -> dict[str, Any]:
        row: dict[str, Any] = {"name": self.name, "value": self.value, "unit": self.unit}
        if self.aim:
            row |= {"aim": self.aim, "met": self.met}
        return row | ({"note": self.note} if self.note else {})


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the values lie; nearest rank."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(share * len(ranked)))]


def document(
    figures: Iterable[Figure], *, folder: Path, quick: bool, packages: Sequence[str] = PACKAGES
) -> dict[str, Any]:
    """What `--json` prints: the aims, the other figures, and where they were measured."""
    figures = list(figures)
    return {
        "aims": [f.row() for f in figures if f.aim],
        "figures": [f.row() for f in figures if not f.aim],
        "quick": quick,
        "machine": machine(folder),
        "versions": versions(packages),
    }


def print_report(found: dict[str, Any], form: str) -> None:
    """Print a document as one line of JSON, as the table of docs/benchmarks.md, or for a terminal."""
    if form == "json":
        print(json.dumps(found))
    elif form == "markdown":
        print(_markdown(found))
    else:
        print(_plain(found))


def _rows(found: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    said = {True: "yes", False: "**no**"}
    aims = [(r["name"], _number(r["value"], r["unit"]), r["aim"], said[r["met"]]) for r in found["aims"]]
    return aims + [(r["name"], _number(r["value"], r["unit"]), "", "") for r in found["figures"]]


def _markdown(found: dict[str, Any]) -> str:
    lines = [_where(found), "", "| figure | measured | aim | met |", "|---|---|---|---|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in _rows(found)])


def _plain(found: dict[str, Any]) -> str:
    rows = [("figure", "measured", "aim", "met"), *_rows(found)]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    notes = [f"{r['name']}: {r['note']}" for r in found["aims"] + found["figures"] if r.get("note")]
    return "\n".join([*lines, "", *notes, _where(found)])


def _where(found: dict[str, Any]) -> str:
    m = found["machine"]
    packages = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    return (
        f"{m['date']}, {m['cores']} cores of {m['cpu']}, {m['memory_gb']} GB, Linux {m['kernel']}, {m['file_system']}; "
        f"load {m['load']} at the end; {packages}."
    )


def _number(value: float | None, unit: str) -> str:
    if value is None:
        return "none"
    text = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{text} {unit}".rstrip()


def machine(folder: Path) -> dict[str, Any]:
    """Where this was measured; `folder` names the file system."""
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "kernel": platform.release(),
        "file_system": _file_system(folder),
        "load": round(os.getloadavg()[0], 1),
    }


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def note(text: str) -> None:
    """Say on stderr how far the measurement is; stdout is the report's."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _file_system(folder: Path) -> str:
    """Type of the file system that a folder lies on: the mount with the longest name that it is below."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    here = folder.resolve()
    below = [m for m in mounts if here.is_relative_to(m[1])]
    return max(below, key=lambda m: len(m[1]))[2] if below else "unknown"
