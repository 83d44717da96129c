"""Ranks of a client of several nodes: started there by torchrun or Slurm, they wait for what rank 0 hears of the agent.

Rank 0 hands each job on to the others, with the model's bytes where they do not see the agent's folder. What ends one
ends all, since a rank that went on would wait for its peers for ever; whoever started them starts them again.
"""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import json
import logging
import os
import queue
import secrets
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ...protocol.errors import OperatorError
from ..job import Cancelled, Job
from ..logs import by_lines
from ..places import Place
from ..task import Task, load_task
from .loop import run_job
from .ranks import Ranks, Store
from .session import Session
from .worker import failure

log = logging.getLogger(__name__)

BEAT_S = 10.0  # rank 0 says nothing at this pace while there is nothing to do, so that a lost rank is found out
LOOK_S = 0.5  # between two looks whether a rank has failed, and whether there is an agent
CAUSE_S = 1.5  # between "a peer is gone" and the news of what happened to it
COME_S = 600.0  # for all ranks to come to the store
CHUNK = 64 << 20  # bytes that are sent to other nodes at a time
FAILED = "failed"  # the store's key under which a rank leaves what happened to it


class Ended(BaseException):
    """The launcher ends this rank; not an Exception, which a task might catch."""


def serve(place: Place, path: Path | None, *, wait_s: float = 600.0) -> int:
    """Do the agent's jobs until it ends; gives the exit code, 0 where it said so in good order.

    path: of the agent's socket, on rank 0, which must be on the agent's machine. wait_s: how long an agent that is not
    there, or went away, is waited for.
    """
    faulthandler.enable()
    by_lines()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end)
    os.environ |= {"RANK": str(place.rank), "WORLD_SIZE": str(place.world), "LOCAL_RANK": str(place.local)}
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // place.here))
    store = _store(place)
    agent = Agent(path, place, store, wait_s) if path is not None and place.rank == 0 else None
    copies: Copies | None = None
    try:
        ranks = Ranks.gather(place, store)
        copies = Copies(ranks, place, agent.folder if agent else None)
        _work(ranks, agent, copies)
    except BaseException as error:
        told = failure(error, place.world)
        if agent is not None:
            agent.lost("the launcher has ended the ranks") if isinstance(error, Ended) else agent.failed(told)
        elif not told.get("echo") and not isinstance(error, Ended):
            with contextlib.suppress(RuntimeError):  # the store is gone with rank 0
                store.set(FAILED, json.dumps({"rank": place.rank, "failed": told}))
                store.check([FAILED])  # an answer: it has arrived
        if isinstance(error, OperatorError):
            log.error("this rank cannot go on", extra={"rank": place.rank, "why": error.detail})
        if copies is not None:
            copies.remove()
        os._exit(1)  # a normal exit would wait for collectives that nobody will join
    copies.remove()
    dist.destroy_process_group()
    return 0


def _end(number: int, _: object) -> None:
    raise Ended(signal.Signals(number).name)


def _store(place: Place) -> Store:
    try:
        store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]: documented
            place.host,
            place.port,
            world_size=place.world,
            is_master=place.rank == 0 and not place.served,
            timeout=timedelta(seconds=COME_S),
            wait_for_workers=False,
        )
    except (RuntimeError, dist.DistError) as error:
        raise OperatorError(
            f"rank {place.rank} cannot meet the others at {place.host}:{place.port}: {str(error).splitlines()[0]}. "
            "--rendezvous host:port says where else, with the name of rank 0's machine"
        ) from None
    return dist.PrefixStore(f"murmur/{place.start}", store)  # pyright: ignore[reportPrivateImportUsage]: documented


def _work(ranks: Ranks, agent: Agent | None, copies: Copies) -> None:
    made: tuple[str, Task, Session] | None = None
    for word in _words(ranks, agent):
        if "end" in word:
            if not word["end"]:
                raise OperatorError("no agent came: start `murmur client join` on rank 0's machine")
            return
        job = copies.fit(Job.from_json(word["job"]))
        named = json.dumps(word["task"])
        if made is None or made[0] != named:
            task = load_task(word["task"]["reference"], word["task"]["options"])
            made = named, task, Session(ranks)
        _, task, session = made
        try:
            result = run_job(task, job, session=session, report=_reporter(agent, job), stop=_stopper(agent, job))
        except Cancelled as words:
            answer: dict[str, Any] = {"cancelled": words.detail}
        else:
            answer = {"done": result.to_json()}
        copies.drop()
        if agent is not None:
            agent.answer(job, answer)


def _reporter(agent: Agent | None, job: Job) -> Callable[[Any], None] | None:
    return None if agent is None else lambda p: agent.send({"progress": p.to_json(), "job": job.id})


def _stopper(agent: Agent | None, job: Job) -> Callable[[], bool] | None:
    return None if agent is None else lambda: agent.cancelled == job.id


def _words(ranks: Ranks, agent: Agent | None) -> Iterator[dict[str, Any]]:
    """What the agent asks for, on every rank: JSON, for nothing is unpickled that came over a network."""
    while True:
        word = b""
        if agent is not None:
            with contextlib.suppress(queue.Empty):
                word = json.dumps(agent.asked.get(timeout=BEAT_S)).encode()
        if told := _told(ranks, word):
            yield json.loads(told)


def _told(ranks: Ranks, word: bytes) -> bytes:
    """Rank 0's bytes, on every rank."""
    size = torch.tensor([len(word)])
    ranks.tell(size)
    text = torch.frombuffer(bytearray(word if ranks.rank == 0 else bytes(int(size))) or bytearray(1), dtype=torch.uint8)
    ranks.tell(text)
    return text.numpy().tobytes()[: int(size)]


class Agent:
    """Rank 0's way to the agent, which may come later than the ranks, go, and come again.

    asked: its messages. cancelled: the job that it does not want any more, or that it went away from.
    """

    def __init__(self, path: Path, place: Place, store: Store, wait_s: float) -> None:
        self.folder = path.parent
        self.asked: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.cancelled = ""
        self._path, self._wait_s, self._store = path, wait_s, store
        self._hello = {"world": place.world, "nodes": place.nodes, "pid": os.getpid()}
        self._link: Connection | None = None
        self._sending, self._busy = threading.Lock(), ""
        threading.Thread(target=self._read, name="agent", daemon=True).start()
        another: Any = store  # its clone() is not in torch's stubs
        threading.Thread(target=self._watch, args=(another.clone(),), name="ranks", daemon=True).start()

    def send(self, message: Mapping[str, Any]) -> None:
        """Tell the agent, if it is there."""
        with self._sending, contextlib.suppress(OSError):
            if self._link is not None:
                self._link.send_bytes(json.dumps(message).encode())

    def answer(self, job: Job, message: Mapping[str, Any]) -> None:
        self._busy = ""
        self.send({**message, "job": job.id})

    def failed(self, told: dict[str, Any]) -> None:
        """Tell what rank 0 died of: if it is that another one is gone, then of what that one has died."""
        if not told.get("echo"):
            self.send({"failed": told})
        else:
            self.lost("a process on this client's nodes is gone: " + told["detail"].splitlines()[-1])

    def lost(self, words: str) -> None:
        """Tell what a rank has left behind, or else that the ranks are gone; the agent's next job needs new ones."""
        until = time.monotonic() + CAUSE_S
        while time.monotonic() < until:
            with contextlib.suppress(RuntimeError):
                if self._store.check([FAILED]):
                    return self.send(json.loads(self._store.get(FAILED)))
            time.sleep(0.1)
        self.send({"died": words, "signal": int(signal.SIGTERM)})

    def _watch(self, store: Store) -> None:
        """End this process when another rank has failed: with NCCL it would not notice for minutes."""
        while True:
            time.sleep(LOOK_S)
            with contextlib.suppress(RuntimeError):
                if store.check([FAILED]):
                    self.send(json.loads(store.get(FAILED)))
                    os._exit(1)

    def _read(self) -> None:
        while (link := self._connected()) is not None:
            with contextlib.suppress(OSError, EOFError):
                while self._take(json.loads(link.recv_bytes())):
                    pass
                return
            self.cancelled = self._busy
            with self._sending:
                self._link = None
                link.close()
            log.warning("the agent is gone", extra={"waits_s": self._wait_s})
        self.asked.put({"end": False})

    def _connected(self) -> Connection | None:
        """A new connection; None where no agent came in time."""
        until = time.monotonic() + self._wait_s
        log.info("waiting for the agent", extra={"socket": str(self._path), "host": socket.gethostname()})
        while time.monotonic() < until:
            link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                link.connect(str(self._path))
            except OSError:
                link.close()
                time.sleep(LOOK_S)
                continue
            with self._sending:
                self._link = Connection(link.detach())
            self.send({"hello": self._hello})
            return self._link
        return None

    def _take(self, message: dict[str, Any]) -> bool:
        """Whether there is more to come."""
        if "cancel" in message:
            self.cancelled = str(message["cancel"])
        elif "end" in message:
            if self._busy:
                os._exit(1)  # the others lose this peer, and end as well
            self.asked.put({"end": True})
        else:
            self.cancelled, self._busy = "", str(message["job"]["id"])
            self.asked.put(message)
            self.send({"begun": True, "job": self._busy})
        return "end" not in message


class Copies:
    """The files of a job on nodes that do not see the agent's folder; where all see it nothing is copied.

    Methods are collectives.
    """

    def __init__(self, ranks: Ranks, place: Place, folder: Path | None) -> None:
        """folder: the agent's, on rank 0."""
        self._ranks = ranks
        first = torch.zeros(place.world, dtype=torch.int64)
        first[place.rank] = place.local == 0
        dist.all_reduce(first)
        self._firsts = [int(rank) for rank in first.nonzero()]
        self._group: Any = dist.new_group(self._firsts, backend="gloo")
        name = hashlib.sha256(f"{place.host}:{place.port}/{place.start}/{place.node}".encode()).hexdigest()[:16]
        self._folder = Path(tempfile.gettempdir()) / f"murmur-{os.getuid()}-{name}"
        self._away, self._writes = place.node > 0, place.node > 0 and place.local == 0
        self.shared = self._is_shared(folder)
        if not self.shared:
            log.info("the nodes do not share the agent's folder: models are sent", extra={"node": place.node})

    def fit(self, job: Job) -> Job:
        """The job with files that this rank can read."""
        if self.shared:
            return job
        if self._writes:
            shutil.rmtree(self._folder, ignore_errors=True)  # of a start that was killed
            self._folder.mkdir(mode=0o700)
        model = self._bring(job.model, "model")
        own = self._bring(job.own, "own") if job.own is not None else None
        self._ranks.least(0.0)  # those beside the first of their node wait here for the files to be whole
        update = self._folder / "update" if self._away else job.update
        # Each rank would look for its own checkpoint, and the agent could not take those of other machines away.
        return replace(job, model=model, own=own, update=update, checkpoint=None)

    def drop(self) -> None:
        """Take the copies away, once nobody needs them any more."""
        if not self.shared:
            self._ranks.least(0.0)
            self.remove()

    def remove(self) -> None:
        if self._writes:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _bring(self, path: Path, name: str) -> Path:
        mine = self._folder / name if self._away else path
        if self._ranks.rank in self._firsts:
            size = torch.tensor([path.stat().st_size if self._ranks.rank == 0 else 0])
            dist.broadcast(size, src=0, group=self._group)
            if int(size):
                whole = torch.from_file(str(mine), shared=self._away, size=int(size), dtype=torch.uint8)
                for chunk in whole.split(CHUNK):
                    dist.broadcast(chunk, src=0, group=self._group)
        return mine

    def _is_shared(self, folder: Path | None) -> bool:
        """Whether all nodes see the agent's folder: they look for a file with a name that nobody else could have."""
        mark = folder / f"seen.{secrets.token_hex(8)}" if folder is not None else Path()
        if folder is not None:
            mark.touch()
        sees = Path(os.fsdecode(_told(self._ranks, os.fsencode(mark)))).exists()
        shared = bool(self._ranks.least(float(sees)))
        if folder is not None:
            mark.unlink()
        return shared
