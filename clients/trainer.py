"""The trainer as the agent sees it: give it jobs, get results, survive whatever happens in between. No torch here.

    agent ── fork server (torch preloaded) ── rank 0 .. rank n-1
      └──── one socket pair to each rank: jobs one way, progress and outcome the other, and its end ends the rank

Ranks stay warm from job to job. When one dies or fails, all are killed and the next job starts new ones, which takes
a fork and not an import of torch.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import re
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from ..protocol.errors import MurmurError, OperatorError, from_problem
from .job import Cancelled, Job, Progress, Result
from .nodes import NodeRanks, Nodes
from .pieces import Pieces
from .plans import check_plan
from .processes import RankProcesses, start_fork_server

log = logging.getLogger(__name__)

CANCEL_GRACE_S = 5.0  # to reach the next batch; ranks that are slower are killed
CAUSE_WAIT_S = 1.0  # between "my peer is gone" and the news of what happened to it


class TrainerFailed(MurmurError):
    """A rank died or raised an error that is not ours; the job gave nothing, the next one starts with new ranks.

    kind: the error's class, "died", or "gone" for a rank that died before it took the job. The detail ends with the
    end of the traceback, or with how the rank died. killed: a signal ended it, and no error that the task raised.
    """

    code, status, title = "trainer_failed", 500, "Training failed"

    def __init__(self, rank: int = 0, kind: str = "", detail: str = "", *, killed: bool = False) -> None:
        super().__init__(f"rank {rank}: {kind}: {detail}")
        self.rank, self.kind, self.killed = rank, kind, killed


class OutOfMemory(TrainerFailed):
    """The GPU's memory or the machine's was not enough; the next job starts with new ranks."""

    code, title = "out_of_memory", "Training ran out of memory: a smaller train.micro_batch needs less of it"

    def __init__(self, rank: int = 0, kind: str = "", detail: str = "") -> None:
        super().__init__(rank, kind, f"{detail}\n{self.title}")


class Trainer:
    """Runs jobs of one task in processes of their own; `run` one at a time, `cancel` and `close` from any thread.

    processes: how many train together; "auto" is one per GPU, or one. workdir: an existing folder of this agent's own.
    log_file: takes what the ranks print; by default they share the agent's output. nodes: where ranks come to that a
    launcher has started on several machines; none are forked then, and all of them train every job.
    """

    def __init__(
        self,
        reference: str,
        options: Mapping[str, Any],
        *,
        processes: int | Literal["auto"] = 1,
        workdir: Path,
        log_file: Path | None = None,
        nodes: Nodes | None = None,
    ) -> None:
        self.reference, self.options = reference, dict(options)
        self.processes = (gpu_count() or 1) if processes == "auto" else processes
        if self.processes < 1:
            raise OperatorError(f"processes = {processes}: a trainer needs one at least")
        self._workdir = workdir.resolve()
        self._log_file = log_file.resolve() if log_file else None
        self._nodes = nodes
        self._group: RankProcesses | NodeRanks | None = None
        self._busy = threading.Lock()  # held while ranks are started or a job runs
        self._job: Job | None = None
        self._pieces = Pieces()
        self._cancelled_at: float | None = None
        self._closed = False
        if nodes is None:
            start_fork_server()
        # Without this, multiprocessing's own exit handler would wait for ranks that wait for us.
        self._at_exit = _closer(weakref.ref(self))
        atexit.register(self._at_exit)

    def warm(self) -> None:
        """Start the ranks in the background, so that the first job does not wait for imports."""
        if self._nodes is None:
            threading.Thread(target=self._warm, name="warm trainer", daemon=True).start()

    def run(self, job: Job, on_progress: Callable[[Progress], None] | None = None) -> Result:
        """Run a job to its end and give its result; on_progress is called in this thread, about once a second.

        Raises Cancelled; OperatorError and others of our errors as the engine raised them; TrainerFailed for the rest.
        After an error all ranks are gone, and the next job starts new ones; after Cancelled they are there still, if
        they heard it in time. Where train.micro_batch is "auto", running out of memory costs new ranks and half of it.
        """
        with self._busy:
            self._cancelled_at = None
            self._job = job
            try:
                check_plan(job, gpu_count())
                outcomes = self._outcomes(job, on_progress)
            finally:
                self._job = None
            if words := [outcome["cancelled"] for outcome in outcomes if "cancelled" in outcome]:
                raise Cancelled(words[0])
            return Result.from_json(outcomes[0]["done"])

    def _outcomes(self, job: Job, on_progress: Callable[[Progress], None] | None) -> list[dict[str, Any]]:
        """What each rank says at the end of the job, or of its last try where pieces of its batches get smaller."""
        world = self._world(job)
        while True:
            try:
                return self._try(world, self._pieces.fit(job, world), on_progress)
            except OutOfMemory:
                if not self._pieces.shrink(job, world):
                    raise

    def _world(self, job: Job) -> int:
        """How many processes train this job."""
        if self._nodes is None:
            return job.parallel.world(self.processes)
        there = self._live_group().world
        if (asked := job.parallel.world(there)) != there:
            raise OperatorError(
                f"the plan asks for {asked} processes, and {there} were started on this client's nodes: start as many, "
                "or set parallel.data = 0"
            )
        return there

    def _try(self, world: int, job: Job, on_progress: Callable[[Progress], None] | None) -> list[dict[str, Any]]:
        keep = False
        try:
            warm = self._group is not None and self._group.world == world
            try:
                outcomes = self._ask(self._live_group(world), job, on_progress)
            except TrainerFailed as failed:
                if not (warm and failed.kind == "gone"):
                    raise
                self._end()  # it died while it waited, so lately that nobody had told: not this job's trouble
                outcomes = self._ask(self._live_group(world), job, on_progress)
            keep = True
            return outcomes
        except MurmurError:
            if self._closed:
                raise Cancelled("the trainer is closed") from None
            raise
        finally:
            if not keep:
                self._end()

    def cancel(self) -> None:
        """Make the job that runs now, if any, end with Cancelled: at its next batch, or after 5 s by force."""
        job, group = self._job, self._group
        if job is not None:
            self._cancelled_at = self._cancelled_at or time.monotonic()
            if group is not None:
                group.send({"cancel": job.id})

    def close(self) -> None:
        """End the ranks; a job that runs ends with Cancelled. May be called twice, and from any thread."""
        self._closed = True
        if group := self._group:
            group.kill()
        with self._busy:
            self._end()
        if self._nodes is not None:
            self._nodes.close()
        atexit.unregister(self._at_exit)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the ranks, rank 0 first; none before the first job or `warm`."""
        group = self._group
        return group.pids if group else ()

    def _warm(self) -> None:
        with self._busy, contextlib.suppress(MurmurError, OSError):  # the first job meets the same, and tells
            self._live_group(self.processes)

    def _live_group(self, world: int = 0) -> RankProcesses | NodeRanks:
        """The ranks that there are, or new ones; world: 0 for as many as a launcher has started."""
        if self._closed:
            raise Cancelled("the trainer is closed")
        if self._group is None or not self._group.alive or world not in (0, self._group.world):
            self._end()
            self._group = self._new_group(world)
            log.info("ranks started", extra={"task": self.reference, "pids": self._group.pids})
        return self._group

    def _new_group(self, world: int) -> RankProcesses | NodeRanks:
        if self._nodes is None:
            group = RankProcesses(world, self.reference, self.options, self._workdir, self._log_file)
            group.start()
            return group
        came = self._nodes.meet(self.reference, self.options, lambda: self._closed or self._cancelled_at is not None)
        if world not in (0, came.world):
            came.end()
            raise OperatorError(f"the ranks on this client's nodes were {world}, and {came.world} have come again")
        return came

    def _end(self) -> None:
        if self._group is not None:
            self._group.end()
            self._group = None

    def _ask(
        self, group: RankProcesses | NodeRanks, job: Job, on_progress: Callable[[Progress], None] | None
    ) -> list[dict[str, Any]]:
        """What each rank says at the job's end, once all have; of several troubles the first cause is raised."""
        group.send({"job": job.to_json()})
        begun: set[int] = set()
        ended: dict[int, dict[str, Any]] = {}
        echo: MurmurError | None = None
        echo_until = 0.0
        failed: set[int] = set()
        told_cancel = False
        while len(ended) < group.speakers:
            for rank, message in group.hear(timeout_s=0.25):
                if "failed" in message:
                    failed.add(rank)
                    if not message["failed"].get("echo"):
                        raise _failure(rank, message["failed"])
                    # It only lost a peer. What happened to that one is the news, and it is on its way.
                    if echo is None:
                        echo, echo_until = _failure(rank, message["failed"]), time.monotonic() + CAUSE_WAIT_S
                elif "died" in message:
                    if rank in failed:
                        continue
                    kind = "died" if rank in begun else "gone"
                    raise TrainerFailed(rank, kind, message["died"], killed=bool(message.get("signal")))
                elif message.get("job") == job.id:
                    begun.add(rank)
                    if "done" in message or "cancelled" in message:
                        ended[rank] = message
                    elif "progress" in message and on_progress:
                        on_progress(Progress.from_json(message["progress"]))
            if echo is not None and time.monotonic() > echo_until:
                raise echo
            if self._cancelled_at is not None:
                if not told_cancel:  # `cancel` may have come before the ranks were there to hear it
                    group.send({"cancel": job.id})
                    told_cancel = True
                if time.monotonic() > self._cancelled_at + CANCEL_GRACE_S:
                    raise Cancelled("the ranks did not stop in time and were killed")
            if self._closed:
                raise Cancelled("the trainer is closed")
        return [ended[rank] for rank in sorted(ended)]


def _failure(rank: int, told: dict[str, Any]) -> MurmurError:
    if "problem" in told:
        return from_problem(told["problem"])
    kind = OutOfMemory if told.get("memory") else TrainerFailed
    return kind(rank, told["kind"], told["detail"])


def _closer(trainer: weakref.ref[Trainer]) -> Callable[[], None]:
    def close() -> None:
        if alive := trainer():
            alive.close()

    return close


def gpu_count() -> int:
    """NVIDIA GPUs that this process may use, found without torch: CUDA_VISIBLE_DEVICES, else the device files."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = sum(bool(re.fullmatch(r"nvidia\d+", entry)) for entry in os.listdir("/dev"))
    if visible is None:
        return devices
    return min(devices, sum(bool(part.strip()) and part.strip() != "-1" for part in visible.split(",")))
