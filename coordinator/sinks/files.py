"""CSV and JSON Lines: files that grow, and that go on where they ended, whatever ended the process."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path

from ...protocol.errors import OperatorError
from ...protocol.views import EventView, RunView, VersionView

COLUMNS = ("at", "run", "name", "version", "metric", "value")


class _Growing:
    """A file of lines; a last one that was not finished is cut off, and lines that are there are not written again."""

    def __init__(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
        except OSError as error:
            raise OperatorError(f"cannot write {path}: {error.strerror}") from None
        self._file.seek(0)
        data = self._file.read()
        whole = data.rfind(b"\n") + 1
        self._file.truncate(whole)
        self._there = set(data[:whole].splitlines())

    @property
    def empty(self) -> bool:
        return not self._there

    def write(self, line: str) -> None:
        raw = line.encode()
        if raw not in self._there:
            self._there.add(raw)
            self._file.write(raw + b"\n")

    def flush(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class _FileSink:
    def __init__(self, path: Path) -> None:
        self._lines = _Growing(path)

    def event(self, event: EventView) -> None: ...

    def began(self, run: RunView) -> None: ...

    def measured(self, run: RunView, version: int, at: datetime, values: Mapping[str, float]) -> None: ...

    def ended(self, run: RunView, version: VersionView, model: Callable[[Path], None]) -> None: ...

    def flush(self) -> None:
        self._lines.flush()

    def close(self) -> None:
        self._lines.close()


class CsvSink(_FileSink):
    """One line for each number."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        if self._lines.empty:
            self._row(COLUMNS)

    def measured(self, run: RunView, version: int, at: datetime, values: Mapping[str, float]) -> None:
        for metric, value in sorted(values.items()):
            self._row((at.isoformat(), run.id, run.name, version, metric, repr(value)))

    def _row(self, row: tuple[object, ...]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="").writerow(row)
        self._lines.write(text.getvalue())


class JsonlSink(_FileSink):
    """Every event, as it is in the log."""

    def event(self, event: EventView) -> None:
        self._lines.write(json.dumps(event.model_dump(mode="json"), separators=(",", ":")))
