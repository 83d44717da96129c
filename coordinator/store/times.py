"""Seconds since 1970, as the tables keep them, to the aware UTC times that views carry."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import overload

ONLINE_S = 60.0  # how long a client may be silent beyond what it was told to be


@overload
def utc(seconds: float) -> datetime: ...
@overload
def utc(seconds: None) -> None: ...
@overload
def utc(seconds: float | None) -> datetime | None: ...
def utc(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)
