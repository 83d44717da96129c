"""Alerts to a webhook: what needs somebody's eyes, in the words of the pages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path

import httpx

from ...protocol.errors import Unavailable
from ...protocol.views import EventView, RunView, VersionView
from ...web import words
from .settings import WebhookSettings

TONES = {"bad": ("bad",), "warn": ("bad", "warn")}
SHARE = 0.8  # of a privacy budget, from which on it is told


class WebhookSink:
    """Posts {"text", "level", "run", "event"}; any 2xx answer is taken for heard."""

    def __init__(self, settings: WebhookSettings, *, transport: httpx.BaseTransport | None = None) -> None:
        self._settings = settings
        self._http = httpx.Client(timeout=15, transport=transport)
        self._warned: set[str] = set()
        self._planned: dict[str, int] = {}  # rounds of the runs that were heard of, to know their final evaluation

    def event(self, event: EventView) -> None:
        sentence, tone = words.event(event, self._planned)
        if self._settings.level == "all" or tone in TONES[self._settings.level]:
            self._post(sentence, tone, event.run, event.model_dump(mode="json"))

    def began(self, run: RunView) -> None:
        self._planned[run.id] = run.rounds

    def measured(self, run: RunView, version: int, at: datetime, values: Mapping[str, float]) -> None:
        self._planned[run.id] = run.rounds  # began may have been told to an earlier process
        privacy = run.privacy
        if self._settings.level == "bad" or not privacy or not privacy.budget or run.id in self._warned:
            return
        if privacy.value is None or privacy.value >= SHARE * privacy.budget:
            self._post(f"{run.id} has used most of its privacy budget: {privacy.text}", "warn", run.id, None)
            self._warned.add(run.id)

    def ended(self, run: RunView, version: VersionView, model: Callable[[Path], None]) -> None:
        self._planned.pop(run.id, None)

    def flush(self) -> None: ...

    def close(self) -> None:
        self._http.close()

    def _post(self, text: str, level: str, run: str | None, event: object) -> None:
        where = f"{run}: " if run else ""
        body = {"text": where + text, "level": level, "run": run, "event": event}
        try:
            response = self._http.post(self._settings.url, json=body)
        except httpx.TransportError as error:
            raise Unavailable(f"the webhook cannot be reached: {error}") from None
        if not response.is_success:
            raise Unavailable(f"the webhook answered {response.status_code}")
