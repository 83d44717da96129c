"""How many examples a piece of a batch has where `train.micro_batch = "auto"`: as many as memory takes. No torch."""

from __future__ import annotations

import logging
from dataclasses import replace

from .job import Job

log = logging.getLogger(__name__)


class Pieces:
    """A size that is halved when memory runs out and stays so for later jobs.

    It begins with a process's whole part of a batch. Whoever catches the error runs the job again, from its start: the
    result is then that of a job which asked for the smaller number in the first place.
    """

    def __init__(self) -> None:
        self.size = 0  # 0: memory has never run out

    def fit(self, job: Job, world: int) -> Job:
        """The job with a number in place of "auto"; world: processes that share its batches."""
        if job.train.micro_batch != "auto":
            return job
        share = -(-job.train.batch_size // world)
        size = min(self.size or share, share)
        return replace(job, train=job.train.model_copy(update={"micro_batch": size}))

    def shrink(self, job: Job, world: int) -> bool:
        """After memory ran out in what `fit` gave: whether there is a smaller size to try the job again with."""
        was = self.fit(job, world).train.micro_batch
        if job.train.micro_batch != "auto" or was == "auto" or was < 2:
            return False
        self.size = was // 2
        log.warning("memory ran out, the job begins anew", extra={"was": was, "micro_batch": self.size})
        return True
