"""The audit log: who did what, each entry naming the hash of the one before, so that none can be changed unnoticed.

A chain holds against changes in the middle. That the end was cut off, or all of it written anew, shows only beside
what somebody has kept: an export, or no more than the number and hash of an entry.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime

from pydantic import Field

from .encoding import canonical_json
from .views import View


class AuditView(View):
    """One entry. subject: what it was done to; before: `sha256` of entry n - 1, empty in the first."""

    n: int
    at: datetime
    by: str
    action: str
    subject: str
    details: dict[str, str] = Field(default_factory=dict)
    before: str
    sha256: str

    @property
    def digest(self) -> str:
        """What `sha256` must be: the hash over everything else, as canonical JSON, the time in microseconds of UTC."""
        values = self.model_dump(exclude={"sha256"}) | {
            "at": self.at.astimezone(UTC).isoformat(timespec="microseconds")
        }
        return hashlib.sha256(canonical_json(values)).hexdigest()


class LogReport(View):
    """What a check of the log found: how many entries were read, the newest one's hash, and what does not fit."""

    entries: int
    head: str = ""
    wrong: tuple[str, ...] = Field(default=())

    @property
    def ok(self) -> bool:
        return not self.wrong


def verify_log(entries: Iterable[AuditView], kept: Mapping[int, str] | None = None) -> LogReport:
    """Check a whole log, oldest entry first: nothing missing, nothing changed, each from the one before it.

    kept: hashes by number, of entries that were exported earlier; they must be in this log as they were.
    """
    n, before, wrong, left = 0, "", list[str](), dict(kept or {})
    for entry in entries:
        if entry.n != n + 1:
            wrong.append(f"entry {entry.n} stands where entry {n + 1} should")
        elif entry.before != before:
            wrong.append(f"entry {entry.n} does not follow from entry {n}: it names another hash")
        if entry.sha256 != entry.digest:
            wrong.append(f"entry {entry.n} was changed: its hash does not fit what it says")
        if left.pop(entry.n, entry.sha256) != entry.sha256:
            wrong.append(f"entry {entry.n} is another one than what was kept of it")
        n, before = entry.n, entry.sha256
    if left and max(left) > n:
        wrong.append(f"the log ends at entry {n}, but entry {max(left)} was kept: its end was cut off")
    return LogReport(entries=n, head=before, wrong=tuple(wrong))
