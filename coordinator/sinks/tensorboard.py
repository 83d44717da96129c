"""TensorBoard's files, by tensorboardX: a folder for each run, the recipe as text, metrics by version."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from ...protocol.errors import OperatorError
from ...protocol.views import EventView, RunView, VersionView


class TensorboardSink:
    def __init__(self, folder: Path) -> None:
        try:
            import tensorboardX
        except ImportError:
            raise OperatorError("TensorBoard's files need the extra: pip install 'murmur[tensorboard]'") from None
        self._folder = folder
        self._make: Callable[[str], Any] = tensorboardX.SummaryWriter
        self._writers: dict[str, Any] = {}

    def _writer(self, run: str) -> Any:
        if run not in self._writers:
            self._writers[run] = self._make(str(self._folder / run))
        return self._writers[run]

    def event(self, event: EventView) -> None: ...

    def began(self, run: RunView) -> None:
        recipe = json.dumps(run.recipe.model_dump(mode="json"), indent=2)
        text = "\n".join(f"    {line}" for line in recipe.splitlines())
        self._writer(run.id).add_text("recipe", text, 0, walltime=run.created_at.timestamp())

    def measured(self, run: RunView, version: int, at: datetime, values: Mapping[str, float]) -> None:
        for name, value in sorted(values.items()):
            self._writer(run.id).add_scalar(name, value, version, walltime=at.timestamp())

    def ended(self, run: RunView, version: VersionView, model: Callable[[Path], None]) -> None:
        if run.id in self._writers:
            self._writers.pop(run.id).close()

    def flush(self) -> None:
        for writer in self._writers.values():
            writer.flush()

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()
