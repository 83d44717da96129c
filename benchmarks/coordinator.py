"""The aims of this project's coordinator, measured: `python -m benchmarks.coordinator`. See docs/benchmarks.md."""

from __future__ import annotations

import argparse
import importlib
import tempfile
from pathlib import Path

from . import report
from .runs import Scale

PARTS = {  # name -> the file with its subject
    "idle": "idle",
    "round": "large_round",
    "writes": "writes",
    "transfer": "transfer",
    "recovery": "recovery",
    "overhead": "small_round",
    "sum": "summing",
}


def main(arguments: list[str] | None = None) -> None:
    options = _options(arguments)
    folder = Path(options.dir)
    scale = Scale(folder=folder, quick=options.quick, agents=options.agents)
    figures: list[report.Figure] = []
    for name in options.only or PARTS:
        report.note(f"{name} …")
        figures += importlib.import_module(f".{PARTS[name]}", __package__).measure(scale)
    report.print_report(report.document(figures, folder=folder, quick=options.quick), options.form)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coordinator", description=__doc__)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", dest="form", action="store_const", const="json", help="one object on one line")
    form.add_argument("--markdown", dest="form", action="store_const", const="markdown", help="the page's table")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="NAME", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--quick", action="store_true", help="every part small: it shows that it runs, not how fast")
    parser.add_argument("--agents", type=int, default=10_000, help="in the parts that are about many [10000]")
    parser.add_argument("--dir", default=tempfile.gettempdir(), help="on the file system to measure [%(default)s]")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
