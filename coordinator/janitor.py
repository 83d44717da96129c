"""What has to be looked after now and then: files that nothing names, full disks, simulations that were killed."""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path

from ..protocol.errors import StorageFull
from .blobs import Blobs
from .simulated import left
from .store import Store

log = logging.getLogger(__name__)

SWEEP_S = 3600.0
FIRST_S = 60.0  # after the start, when agents that were kept waiting have been served
GRACE_S = 86_400.0  # a model may be uploaded today and its run started tomorrow
ROOM_S = 2.0  # between two looks whether there is room again


class Janitor:
    def __init__(self, store: Store, blobs: Blobs, simulations: Path | None) -> None:
        """simulations: where those of this machine have their folders."""
        self._store, self._blobs, self._simulations = store, blobs, simulations
        self._looked_at = time.monotonic()
        self._swept_at = self._looked_at - SWEEP_S + FIRST_S

    def tend(self) -> None:
        """Do what is due."""
        now = time.monotonic()
        if now - self._looked_at >= ROOM_S:
            self._looked_at = now
            self._let_go_on()
            self._hold()
            self._clear()
        if now - self._swept_at >= SWEEP_S:
            self._swept_at = now
            self._sweep()

    def pause(self, run: str, error: StorageFull) -> None:
        """Let a run stand still that finds no room; it goes on by itself once there is some."""
        if self._store.runs.pause(run, error.detail):
            log.error("run paused", extra={"run": run, "why": error.detail})

    def _let_go_on(self) -> None:
        for run in self._store.runs.held():
            try:
                self._blobs.require(2 * self._store.runs.newest_bytes(run))  # a version, and as much for updates
            except StorageFull:
                continue
            if self._store.runs.resume(run):
                log.info("run goes on: there is room again", extra={"run": run})

    def _hold(self) -> None:
        """Pause what would not find room for its next version: its uploads are refused, and time is against clients."""
        for run in sorted({key.run for key in self._store.rounds.open()}):
            try:
                self._blobs.require(self._store.runs.newest_bytes(run))
            except StorageFull as error:
                self.pause(run, error)

    def _clear(self) -> None:
        """Say of simulations whose process was killed that they were interrupted; delete what ended ones left."""
        for place in left(self._simulations) if self._simulations else ():
            if self._store.simulations.left(place.name):
                shutil.rmtree(place, ignore_errors=True)

    def _sweep(self) -> None:
        live = self._store.assignments.parts_under_way()
        swept = self._blobs.sweep(self._store.rounds.named_blobs, live, grace_s=GRACE_S, now=time.time())
        if swept.blobs or swept.parts:
            log.info("unused files deleted", extra={"blobs": swept.blobs, "parts": swept.parts, "bytes": swept.bytes})
