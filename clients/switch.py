"""The site's stop switch: a file in the client's folder, which stops its agent at once and over every restart."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from ..protocol.errors import PrivacyRefusal
from .durable import sync_folder

FILE = "stopped.json"


@dataclass(frozen=True, slots=True)
class Stop:
    """Since when this site takes part in nothing, in UTC, and who said so; empty where a hand made the file."""

    at: str = ""
    by: str = ""


class Switch:
    """Safe for several processes: whether the file is there is all that counts, not what stands in it."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE

    def stopped(self) -> Stop | None:
        if not self._path.exists():
            return None
        try:
            noted = json.loads(self._path.read_text())
            return Stop(str(noted["at"]), str(noted["by"]))
        except (OSError, ValueError, KeyError, TypeError):
            return Stop()

    def stop(self, by: str) -> None:
        """Take part in nothing from now on; on disk when this returns. A second time it changes nothing."""
        if self._path.exists():
            return
        temporary = self._path.with_suffix(".tmp")
        with temporary.open("w") as file:
            json.dump({"at": datetime.now(UTC).isoformat(timespec="seconds"), "by": by}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._path)
        sync_folder(self._path.parent)

    def resume(self) -> None:
        self._path.unlink(missing_ok=True)
        sync_folder(self._path.parent)


def refusal() -> PrivacyRefusal:
    return PrivacyRefusal(
        "policy_stopped", "somebody there has stopped it; it takes part in nothing until it is resumed"
    )
