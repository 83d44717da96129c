"""What an agent keeps on disk of an assignment, so that its own death costs a plain round seconds and not hours.

kept/<assignment>/             of a plain round: until the coordinator has the update, or wants it no more
updates/<assignment>.<fence>/  of a masked one, whose keys die with the agent: swept up at its next start
    checkpoint/                the trainer's state, written as it trains
    update, upload             what training gave, and what is sent
    own                        what the client keeps of the run, if anything (see `own`); moved once all is delivered
    result.json                written once training is over; names the update by its SHA-256
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

from ..protocol.encoding import sha256_hex
from ..protocol.messages import Assignment
from .durable import sync_folder
from .job import Result
from .settings import Settings
from .task import FLOWER

log = logging.getLogger(__name__)

SPARE = 4  # folders that no conversation holds: a killed agent is handed its assignments again, or never
SPARE_S = 7 * 86_400.0


class Kept:
    """One assignment's folder; the conversation that took it `leave`s it at its end."""

    def __init__(self, shelf: Shelf, folder: Path, digest: str, *, lasting: bool) -> None:
        self.digest, self.lasting = digest, lasting
        self.folder = folder
        self.update, self.upload, self.checkpoint = folder / "update", folder / "upload", folder / "checkpoint"
        self.own = folder / "own"
        self._result = folder / "result.json"
        self._shelf = shelf

    @property
    def has_checkpoint(self) -> bool:
        return any(
            (*self.checkpoint.glob("*.safetensors"), *self.checkpoint.glob("task-*/*"))
        )  # the engine's, a task's

    def keep(self, result: Result) -> None:
        """Note that training is over, once its update is on disk; a disk that fails costs the note only."""
        if not self.lasting:
            return
        sha256 = _sha256(result.update) if result.update is not None else None
        temporary = self._result.with_suffix(".tmp")
        try:
            with temporary.open("w") as file:
                json.dump({"digest": self.digest, "sha256": sha256, "result": result.to_json()}, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self._result)
            sync_folder(self.folder)
            shutil.rmtree(self.checkpoint, ignore_errors=True)
        except OSError as error:
            log.warning("result not kept", extra={"folder": self.folder.name, "why": str(error)})

    def result(self) -> Result | None:
        """What training gave before the agent died; None, and nothing is left of it, where it does not fit."""
        try:
            noted = json.loads(self._result.read_text())
            found = Result.from_json({**noted["result"], "update": noted["sha256"] and str(self.update)})
            if noted["digest"] != self.digest:
                raise ValueError("it is of other settings or of another task")
            if found.update is not None and _sha256(found.update) != noted["sha256"]:
                raise ValueError("the update was damaged on disk")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("kept result ignored", extra={"folder": self.folder.name, "why": str(error)})
            self._result.unlink(missing_ok=True)
            return None
        log.info("trained already", extra={"folder": self.folder.name, "steps": found.steps})
        return found

    def leave(self, *, discard: bool) -> bool:
        """Give it up; discard: nobody will ask for it again, so that it goes, unless another conversation holds it.

        Returns whether it went.
        """
        return self._shelf.leave(self, discard=discard or not self.lasting)


class Shelf:
    """The folders of all assignments of an agent, safe for several threads."""

    def __init__(self, workdir: Path, *, resume: bool) -> None:
        """resume: whether anything outlives the agent; what a killed one left of masked rounds is deleted anyway."""
        self._lasting, self._passing, self._resume = workdir / "kept", workdir / "updates", resume
        self._held: Counter[Path] = Counter()
        self._lock = threading.Lock()
        for folder in (self._lasting, self._passing):
            folder.mkdir(mode=0o700, exist_ok=True)
        for left in [*self._passing.iterdir(), *(self._lasting.iterdir() if not resume else ())]:
            _delete(left)
        self._prune()

    def take(self, assignment: Assignment, digest: str) -> Kept:
        """The folder of an assignment; with what was kept of it, when the same one is handed out again."""
        lasting = self._resume and assignment.secure is None
        name = f"{assignment.id}.d" if lasting else f"{assignment.id}.{assignment.fence}.d"
        folder = (self._lasting if lasting else self._passing) / name
        with self._lock:
            self._held[folder] += 1
            with suppress(OSError):  # the conversation will meet it as well, and report it
                folder.mkdir(mode=0o700, exist_ok=True)
                os.utime(folder)
                self._prune()
        return Kept(self, folder, digest, lasting=lasting)

    def leave(self, kept: Kept, *, discard: bool) -> bool:
        with self._lock:
            self._held[kept.folder] -= 1
            if self._held[kept.folder] <= 0:
                del self._held[kept.folder]
                if discard:
                    _delete(kept.folder)
                    return True
        return False

    def _prune(self) -> None:
        """Delete what nobody came back for."""
        spare = [path for path in self._lasting.iterdir() if path not in self._held]
        spare.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        for place, path in enumerate(spare):
            if place >= SPARE or time.time() - path.stat().st_mtime > SPARE_S:
                _delete(path)


def work_digest(assignment: Assignment, settings: Settings) -> str:
    """Digest of all that decides what training gives: the model, the run's settings, and the task as it is here."""
    entry = settings.tasks.get(assignment.task)
    what = {
        "assignment": assignment.id,
        "client": settings.name,
        "kind": assignment.kind,
        "round": assignment.round,
        "model": assignment.model,
        "settings": assignment.settings_sha256(),
        "task": entry.model_dump(exclude={"dataset"}) if entry else None,
        "file": _code(entry.reference) if entry else None,
    }
    return sha256_hex(json.dumps(what, sort_keys=True, default=str).encode())


def _code(reference: str) -> str | None:
    """Digest of a task's file: who mends it and starts the agent anew wants no training to go on with the old one."""
    path = Path(reference.removeprefix(FLOWER).rpartition(":")[0])
    try:
        return _sha256(path) if path.suffix == ".py" else None
    except OSError:
        return None  # loading the task says what is wrong with it


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
