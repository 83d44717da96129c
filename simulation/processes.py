"""Worker processes that each train parts of a cohort; their sums come back through memory that is shared.

A worker is forked once, with the federation as it is, so nothing of it is ever pickled. What is asked and answered are
lines of JSON with names and numbers; the version is a file that all read, sums lie in an anonymous mapping, which no
name in /dev/shm outlives. A cohort is cut into the same parts whatever the number of workers, and their sums are added
in order: the result does not depend on how many workers there are or who was faster.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import shutil
import signal
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import cast

import numpy as np
import torch

from ..clients.engine.ranks import Ranks
from ..clients.job import Result
from ..clients.own import Own
from ..privacy.masks import Array
from ..protocol.errors import OperatorError
from ..protocol.messages import Assignment, Kind
from ..protocol.recipe import Recipe
from ..protocol.tensors import FLOATS, Layout
from .cohorts import Asked, Part, Summed, Unsuited, joined, parts
from .federation import Federation
from .workers import Either, Told, error_of, suits_vectorized, told_error

AHEAD = 2  # parts that a worker may have asked for or unread: one is trained while the sum of another waits its turn
_PDEATHSIG = 1  # of prctl(2)


class Processes:
    """Workers, each with one thread; they are gone once this is, or its process, however it ends."""

    name = "processes"

    def __init__(self, federation: Federation, recipe: Recipe, layout: Layout, folder: Path, workers: int = 0) -> None:
        """workers: 0 for one on each core that this process may use.

        Raises OperatorError where there is a GPU: a process that was forked cannot use it.
        """
        if Ranks.alone().device.type != "cpu":
            raise OperatorError('backend = "processes" is for CPUs, and there is a GPU: "auto" uses it')
        self._recipe, self._wire, self._folder = recipe, layout.update(), folder
        self._together = suits_vectorized(federation, recipe, layout)
        count = workers or len(os.sched_getaffinity(0))
        self._slots = Slots(self._wire, count * AHEAD)
        self._workers: list[_Worker] = []
        self._closed = weakref.finalize(self, _end, self._workers)
        for number in range(count):
            self._workers.append(self._start(number, federation, layout))

    def _start(self, number: int, federation: Federation, layout: Layout) -> _Worker:
        ours, theirs = cast("tuple[Connection, Connection]", Pipe())  # of sockets, where there is fork
        others = [worker.line for worker in self._workers]
        with warnings.catch_warnings():  # Python 3.12 warns of threads; a worker has none that it would need
            warnings.simplefilter("ignore", DeprecationWarning)
            parent, pid = os.getpid(), os.fork()
        if pid:
            theirs.close()
            return _Worker(pid, ours, self._slots.at[number : number + 1])
        status = 1
        try:
            _die_with(parent)
            for line in (ours, *others):
                line.close()
            home = self._folder / f"worker-{number}"
            home.mkdir(exist_ok=True)
            own = Own(self._folder / "clients")
            _Work(federation, self._recipe, layout, home, own, self._slots, number).run(theirs)
            status = 0
        except (EOFError, OSError):
            status = 0  # nobody is there to be told
        finally:
            os._exit(status)

    def close(self) -> None:
        self._closed()
        for home in self._folder.glob("worker-*"):
            shutil.rmtree(home)

    def mean(self, asked: Asked) -> Summed:
        while True:
            try:
                return joined(self._parts(asked)).mean(self._wire, asked.assignment.kind)
            except Unsuited:
                self._together = False  # for all workers, or the sum would depend on who had which clients

    def _parts(self, asked: Asked) -> Iterator[Part]:
        told = [
            {"do": "part", "together": self._together, "cohort": list(part)}
            for part in parts(asked.cohort, together=self._together)
        ]
        for answer, slot in self._answers(asked, told):
            sums = self._slots.sums(slot) if asked.assignment.kind is Kind.TRAIN else {}
            measured = {name: (total, count) for name, (total, count) in answer["measured"].items()}
            yield Part(sums=sums, weight=answer["weight"], measured=measured)

    def each(self, asked: Asked) -> Iterator[tuple[str, Result]]:
        told: list[Told] = [{"do": "each", "cohort": [client]} for client in asked.cohort]
        for client, (answer, _) in zip(asked.cohort, self._answers(asked, told), strict=True):
            yield client, Result.from_json(answer["result"])

    def _answers(self, asked: Asked, told: Sequence[Told]) -> Iterator[tuple[Told, int]]:
        """What workers answer, in the order of what they are told, each with the slot that is its until the next."""
        common = {"assignment": asked.assignment.model_dump(mode="json"), "version": str(asked.version)}
        free = [worker * AHEAD + k for k in range(AHEAD) for worker in range(len(self._workers))]
        busy: dict[int, int] = {}  # by worker, the number of what it is at
        done: dict[int, tuple[Told, int]] = {}
        following = 0
        try:
            for number in range(len(told)):
                while number not in done:
                    for slot in [*free]:
                        worker = slot // AHEAD
                        if worker not in busy and following < len(told):
                            free.remove(slot)
                            busy[worker] = following
                            self._workers[worker].tell({**common, **told[following], "slot": slot})
                            following += 1
                    for worker in self._ready(busy):
                        which = busy.pop(worker)
                        answer = self._workers[worker].answer(told[which]["cohort"])
                        done[which] = answer, answer["slot"]
                yield done[number]
                free.append(done.pop(number)[1])
        except Unsuited:  # it will be asked otherwise, once what is under way has run out
            for worker in busy:
                self._workers[worker].line.recv_bytes()
            raise
        except BaseException:
            self.close()
            raise

    def _ready(self, busy: dict[int, int]) -> list[int]:
        lines = {self._workers[worker].line: worker for worker in busy}
        return [lines[line] for line in wait([*lines]) if isinstance(line, Connection)]


class Slots:
    """Sums in shared memory, and for each worker the number in its cohort of the client that it is at."""

    def __init__(self, wire: Layout, count: int) -> None:
        self._wire, self._bytes = wire, 8 * sum(t.numel for t in wire.tensors)
        self._memory = mmap.mmap(-1, max(1, 8 * count + self._bytes * count))
        self.at: Array = np.frombuffer(self._memory, np.int64, count)
        self._first = 8 * count

    def sums(self, slot: int) -> dict[str, Array]:
        """By tensor, to read or to fill: float64, or int64 for what travels as integers."""
        found: dict[str, Array] = {}
        offset = self._first + slot * self._bytes
        for t in self._wire.tensors:
            dtype = np.float64 if t.dtype in FLOATS else np.int64
            found[t.name] = np.frombuffer(self._memory, dtype, t.numel, offset).reshape(t.shape)
            offset += 8 * t.numel
        return found


class _Worker:
    """A worker as its parent sees it."""

    def __init__(self, pid: int, line: Connection, at: Array) -> None:
        self.pid, self.line, self._at = pid, line, at

    def tell(self, told: Told) -> None:
        with suppress(OSError):  # it is found dead when its answer is read
            self.line.send_bytes(json.dumps(told).encode())

    def answer(self, cohort: Sequence[str]) -> Told:
        """What it answers about this part of a cohort; raises what went wrong."""
        try:
            found: Told = json.loads(self.line.recv_bytes())
        except (EOFError, OSError):
            raise OperatorError(f"a worker process {self._end()} while it trained {self._client(cohort)}") from None
        if "error" in found:
            raise error_of(found)
        return found

    def _client(self, cohort: Sequence[str]) -> str:
        at = int(self._at[0])
        return cohort[at] if 0 <= at < len(cohort) else f"one of {', '.join(cohort)}"

    def _end(self) -> str:
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.pid = 0
        return f"was killed ({signal.Signals(-status).name})" if status < 0 else f"ended with status {status}"


class _Work:
    """What a worker does."""

    def __init__(
        self, federation: Federation, recipe: Recipe, layout: Layout, home: Path, own: Own, slots: Slots, number: int
    ) -> None:
        torch.set_num_threads(1)
        self._slots, self._number, self._home, self._given = slots, number, home, 0
        self._either = Either(federation, recipe, layout, home, own=own, on_client=self._note)

    def run(self, line: Connection) -> None:
        """Answer until the line is closed."""
        while True:
            told: Told = json.loads(line.recv_bytes())
            self._note(-1)
            try:
                answer = self._answer(told)
            except Exception as error:
                answer = told_error(error)
            line.send_bytes(json.dumps(answer | {"slot": told["slot"]}).encode())

    def _note(self, at: int) -> None:
        self._slots.at[self._number] = at

    def _answer(self, told: Told) -> Told:
        assignment = Assignment.model_validate(told["assignment"])
        asked = Asked(assignment=assignment, cohort=told["cohort"], version=Path(told["version"]))
        if told["do"] == "each":
            (_, result) = next(iter(self._either.each(asked)))
            if result.update is not None:  # its reader deletes it, when this worker has gone on to another
                self._given += 1
                result = replace(result, update=result.update.rename(self._home / f"update-{self._given}"))
            return {"result": result.to_json()}
        part = self._either.part(asked, together=told["together"])
        for name, sums in self._slots.sums(told["slot"]).items() if part.sums else ():
            np.copyto(sums, part.sums[name], casting="same_kind")
        return {"weight": part.weight, "measured": part.measured}


def _die_with(parent: int) -> None:
    """Let the kernel end this process with its parent; on systems without that, the line's end does, a part later."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, who ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was gone before the kernel knew
        os._exit(1)


def _end(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.line.close()
        if worker.pid:
            os.kill(worker.pid, signal.SIGKILL)
            os.waitpid(worker.pid, 0)
    workers.clear()
