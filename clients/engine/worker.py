"""A rank: a process that waits for jobs, runs them with its peers, and dies with the agent."""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import queue
import re
import signal
import threading
import traceback
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ...protocol.errors import MurmurError
from ..job import Cancelled, Job
from ..logs import by_lines, to_stderr
from ..task import load_task
from .loop import run_job
from .ranks import Ranks, out_of_memory
from .session import Session

TRACEBACK_CHARS = 3000  # the end of it, which names the line; a message on the wire takes 4096


def main(
    rank: int, world: int, reference: str, options: Mapping[str, Any], connection: Connection, rendezvous: Path
) -> None:
    """Serve jobs until the other end of the connection closes; then, and whenever the agent dies, this process ends.

    Messages are JSON objects. In: {"job": Job} and {"cancel": id}. Out, with {"job": id}: {"begun"}, {"progress"}, and
    at the end {"done": Result} or {"cancelled": words}; or {"failed"} as the last before the exit.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the agent decides what it means
    faulthandler.enable()
    by_lines()
    to_stderr(logging.WARNING)
    logging.getLogger("murmur").setLevel(logging.INFO)
    inbox = _Inbox(connection)
    try:
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world))
        ranks = Ranks.join(rank, world, rendezvous)
        task, session = load_task(reference, options), Session(ranks)
        while True:
            job = inbox.jobs.get()
            inbox.send({"begun": True, "job": job.id})
            try:
                result = run_job(
                    task,
                    job,
                    session=session,
                    report=lambda p, job=job: inbox.send({"progress": p.to_json(), "job": job.id}),
                    stop=lambda job=job: inbox.cancelled == job.id,
                )
            except Cancelled as words:
                inbox.send({"cancelled": words.detail, "job": job.id})
            else:
                inbox.send({"done": result.to_json(), "job": job.id})
    except BaseException as error:
        # Told before this rank's sockets close, so that the agent hears the cause before its echoes from the peers.
        inbox.send({"failed": failure(error, world)})
        os._exit(1)  # a normal exit would wait for collectives that nobody will join


class _Inbox:
    """Reads the connection in a thread, and ends this process, at once, when the agent is gone.

    A parent-death signal would not do: a rank's parent is the fork server, which outlives the agent.
    """

    def __init__(self, connection: Connection) -> None:
        self.jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self.cancelled = ""
        self._connection, self._lock = connection, threading.Lock()
        threading.Thread(target=self._read, name="inbox", daemon=True).start()

    def send(self, message: dict[str, Any]) -> None:
        with self._lock:
            self._connection.send_bytes(json.dumps(message).encode())

    def _read(self) -> None:
        try:
            while True:
                message = json.loads(self._connection.recv_bytes())
                if "cancel" in message:
                    self.cancelled = str(message["cancel"])
                else:
                    self.cancelled = ""  # the same job may be asked for again
                    self.jobs.put(Job.from_json(message["job"]))
        except BaseException:
            # The end of the file is the common case; a message that cannot be read leaves nothing better to do.
            os.kill(os.getpid(), signal.SIGKILL)


def failure(error: BaseException, world: int) -> dict[str, Any]:
    """What the agent is told: the error itself where it is ours, else its kind and the end of its traceback."""
    if isinstance(error, MurmurError):
        return {"problem": error.problem()}
    text = "".join(traceback.format_exception(error)).strip()
    lost = r"gloo|NCCL|[Cc]onnection (closed|reset|refused)|[Bb]roken pipe"
    echo = world > 1 and isinstance(error, (RuntimeError, dist.DistError)) and bool(re.search(lost, str(error)))
    told = {"kind": type(error).__name__, "detail": text[-TRACEBACK_CHARS:], "echo": echo}
    return told | {"memory": True} if out_of_memory(error) else told
