"""A simulation as a run in a coordinator's store: shown where real runs are, and gone on with after a kill."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from getpass import getuser
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from ..coordinator.blobs import Blobs, open_blobs
from ..coordinator.settings import Settings
from ..coordinator.simulated import FOLDER, LOCK, held
from ..coordinator.store import Store
from ..coordinator.store.attempts import Key
from ..coordinator.store.privacy import Spent
from ..coordinator.store.simulations import Made, Simulated
from ..privacy.dp.accounting import Event
from ..privacy.dp.plan import view_of
from ..protocol.encoding import canonical_json
from ..protocol.errors import MurmurError, OperatorError, PeerError, PrivacyRefusal
from ..protocol.messages import TRAIN_LOSS
from ..protocol.recipe import Recipe
from ..protocol.sections import Dp
from .history import Round, Totals

Versions = Literal["newest", "all"]
Spendings = dict[str, list[Event]]
FIGURES = ("train_loss", "trained", "clipped", "seconds", "clip_norm", "tested")  # of a Round, as they are kept


@dataclass(kw_only=True, slots=True)
class Progress:
    """Where a simulation stands between two rounds: all that the next one needs besides recipe and clients.

    state: of the server's optimizer. groups: of the clients that were asked, where there are some. weighed: what the
    last cohort's updates weighed together, and whose they were. dp: the next round's. ledger, spent: privacy events of
    the sums, and of each client's own ledger. world: how the newest round went in one. older: versions before the
    newest from which somebody there still trains. start: the test of version 0.
    """

    version: Path
    state: Path | None
    dp: Dp
    groups: dict[str, int] = field(default_factory=dict[str, int])
    weighed: tuple[int, tuple[str, ...]] = 0, ()
    ledger: list[Event] = field(default_factory=list[Event])
    spent: Spendings = field(default_factory=Spendings)
    world: dict[str, Any] | None = None
    start: Totals = field(default_factory=Totals)
    older: dict[int, Path] = field(default_factory=dict[int, Path])
    rounds: list[Round] = field(default_factory=list[Round])

    @property
    def ledgers(self) -> Spendings:
        """All of them by client; "" is the sums'."""
        return {**self.spent, "": self.ledger}


class Stored:
    """One run, written round by round. Each write is one transaction: a kill loses the round under way, nothing else.

    data: a coordinator's data folder, running or not; MURMUR_DATABASE and MURMUR_BLOBS count as for it. versions:
    whether every version's file is kept, or the first one's and the newest's only. call: how the command line was
    called, so that it can go on without being told again.
    """

    def __init__(
        self, data: Path | str, *, versions: Versions = "newest", call: Mapping[str, Any] | None = None
    ) -> None:
        settings = Settings.model_validate({"data": Path(data)})
        self._folder, self._versions, self._call = settings.data / FOLDER, versions, dict(call or {})
        self._folder.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(self._folder):  # several that make one new database would each find it half made
            self._store = Store(settings.database_url, clock=time.time)
        self._blobs: Blobs = open_blobs(settings.blobs_location, settings.data / "cache")
        self.id, self._fence, self._by = "", 0, _user()
        self._files: dict[int, str] = {}  # versions whose files are needed yet; the first one's is kept anyway
        self._noted: dict[str, int] = {}  # events of each client's ledger that are stored; "": of the sums'

    @property
    def place(self) -> Path:
        """The run's own folder until it has ended: what clients keep between their jobs lies there."""
        assert self.id, "no run has begun"
        return self._folder / self.id

    def close(self) -> None:
        self._store.close()

    def unfinished(self) -> list[tuple[str, int]]:
        """Runs that the same call began and did not end, with the number of rounds that each has done; newest first."""
        return self._store.simulations.unfinished(_digest(self._call))

    def find(self, run_id: str) -> Simulated:
        """A run as it stands; raises NotFound."""
        return self._store.simulations.find(run_id)

    @contextmanager
    def new(self, recipe: Recipe) -> Generator[Path]:
        """A block in which a new run of this recipe is simulated; gives the run's own folder."""
        self.id, self._recipe = f"{recipe.name[:20]}-{secrets.token_hex(4)}", recipe
        with self._alone():
            yield self.place

    @contextmanager
    def taken_over(self, run_id: str, clients: int) -> Generator[Simulated]:
        """A block in which a run of so many clients goes on from its last committed round.

        Raises NotFound, Conflict where it has ended or is being simulated, OperatorError for another federation.
        """
        found = self.find(run_id)
        if found.about["clients"] != clients:
            raise OperatorError(f"{run_id} is a run of {found.about['clients']} clients, the federation has {clients}")
        self.id, self._recipe = run_id, found.recipe
        with self._alone():
            found = self._store.simulations.go_on(run_id, by=self._by)
            self._fence, self._newest = found.fence, found.newest
            for path in self.place.iterdir():  # of the round that was under way
                if path.is_file() and path.name != LOCK:
                    path.unlink()
            yield found

    def begin(self, start: Path, *, clients: int, backend: str, secure: str) -> None:
        """Write the run with its version 0."""
        about = {"clients": clients, "backend": backend, "secure": secure}
        about |= {"call": self._call, "command": _digest(self._call)} if self._call else {}
        self._newest = self._made(start, None, ())
        self._files = {0: self._newest.sha256}
        self._fence = self._store.simulations.start(self.id, self._recipe, about, self._newest, by=self._by)

    def recall(self, found: Simulated) -> Progress:
        """Where the run that was taken over stands, its files in `place`."""
        n = len(found.rounds)
        version = self._fetched(found.newest.sha256, f"version-{n}.safetensors")
        state = self._fetched(found.newest.optimizer, f"state-{n}.safetensors") if found.newest.optimizer else None
        at = Progress(version=version, state=state, dp=found.recipe.dp_of_round(found.clip_norm))
        older: dict[str, str] = {}
        for number, (cohort, kept) in enumerate(found.rounds, start=1):
            figures = kept["figures"]
            figures["tested"] = _totals(figures.get("tested", {}))
            at.rounds.append(Round(n=number, cohort=cohort, measured=_totals(kept["measured"]), **figures))
            at.groups |= kept.get("groups", {})
            at.weighed = (kept.get("weighed", 0), cohort)
            older = kept.get("older", {})
            at.ledger += map(Event.from_json, kept.get("ledger", ()))
            for client, events in kept.get("spent", {}).items():
                at.spent.setdefault(client, []).extend(map(Event.from_json, events))
        at.older = {int(v): self._fetched(blob, f"version-{v}.safetensors") for v, blob in older.items()}
        self._files = {int(v): blob for v, blob in older.items()} | {n: found.newest.sha256}
        self._noted = {client: len(events) for client, events in at.ledgers.items()}
        return at

    def commit(self, done: Round, at: Progress) -> None:
        """Write a round, with the version that came of it. Raises Conflict where the run was stopped meanwhile."""
        kept: dict[str, Any] = {"measured": done.measured, "figures": {name: getattr(done, name) for name in FIGURES}}
        if at.groups:
            kept["groups"] = {client: at.groups[client] for client in done.cohort}
        if at.weighed[0]:
            kept["weighed"] = at.weighed[0]
        if at.world:
            kept["world"] = at.world
        if at.older:
            kept["older"] = {str(v): self._files[v] for v in at.older}
        new = {client: events[self._noted.get(client, 0) :] for client, events in at.ledgers.items()}
        if sums := new.pop(""):
            kept["ledger"] = [event.to_json() for event in sums]
        if spent := {client: [e.to_json() for e in events] for client, events in new.items() if events}:
            kept["spent"] = spent
        before, self._newest = self._newest, self._made(at.version, at.state, done.cohort)
        self._files[done.n] = self._newest.sha256
        self._store.simulations.commit(
            Key(self.id, done.n, 1),
            self._fence,
            self._newest,
            {
                done.n - 1: done.measured | (_of_test(at.start) if done.n == 1 else {}),
                done.n: {TRAIN_LOSS: (done.train_loss * done.trained, done.trained)} | _of_test(done.tested),
            },
            kept,
            spent=Spent(event=sums[-1], total=view_of(self._recipe, at.ledger)) if sums else None,
            clip_norm=at.dp.clip_norm if at.dp.of_clients and at.dp.adaptive else None,
            facts={"clipped": done.clipped} if done.clipped else {},
        )
        self._noted = {client: len(events) for client, events in at.ledgers.items()}
        if not self._blobs.has(self._newest.sha256):  # a run with the very same versions has forgotten its own
            self._made(at.version, at.state, ())
        if before.optimizer and self._versions == "newest":
            self._forget(before.optimizer, done.n - 1)
        self._forget_between(at.older)

    def finish(self, n: int, measured: Totals, why: str = "") -> Path:
        """Write what round n measured of the final version, end the run, and give that version's file.

        why: it ends before its last round.
        """
        self._store.simulations.finish(Key(self.id, n, 1), self._fence, measured, why)
        self._forget_between()
        return self._blobs.path(self._newest.sha256)

    def give_up(self, why: str) -> Path:
        """End the run before its last round, and give its newest version's file."""
        self._store.simulations.fail(self.id, self._fence, why)
        self._forget_between()
        return self._blobs.path(self._newest.sha256)

    @contextmanager
    def _alone(self) -> Generator[None]:
        """Hold the run against other processes of this machine; what breaks it off stands at the run afterwards.

        An error that going on would meet again ends the run.
        """
        with held(self.place):
            try:
                yield
            except BaseException as error:
                if self._fence and not isinstance(error, PeerError | OperatorError | PrivacyRefusal):
                    with suppress(MurmurError):
                        self._store.simulations.interrupt(self.id, self._fence, type(error).__name__, by=self._by)
                    raise
                if self._fence:
                    self._store.simulations.fail(self.id, self._fence, str(error))
                shutil.rmtree(self.place)
                raise
            shutil.rmtree(self.place)

    def _made(self, version: Path, state: Path | None, contributors: Sequence[str]) -> Made:
        optimizer = self._adopted(state) if state else None
        size = version.stat().st_size
        return Made(sha256=self._adopted(version), bytes=size, optimizer=optimizer, contributors=contributors)

    def _adopted(self, path: Path) -> str:
        with self._blobs.new() as copy:
            shutil.copyfile(path, copy)
            return self._blobs.adopt(copy)

    def _fetched(self, blob: str, name: str) -> Path:
        return Path(shutil.copyfile(self._blobs.path(blob), self.place / name))

    def _forget_between(self, needed: Collection[int] = ()) -> None:
        """Delete the files of the versions between the first and the newest but those that are needed yet."""
        between = [n for n in self._files if 0 < n < max(self._files) and n not in needed]
        for n in between if self._versions == "newest" else ():
            self._forget(self._files.pop(n), n)

    def _forget(self, blob: str, n: int) -> None:
        """Delete a file of version n that is needed no more, unless another version has the same bytes."""
        if not self._store.simulations.named({blob}, self.id, n):
            self._blobs.delete(blob)


@contextmanager
def opened(store: Stored | Path | str | None, resume: str, folder: Path | str | None) -> Generator[Stored | None]:
    """A store that was given, or one in a data folder, closed at the end; None for None.

    Raises OperatorError for what does not go together.
    """
    if store is None and resume:
        raise OperatorError("a run goes on in the store that it is in: give store, too")
    if store is not None and folder is not None:
        raise OperatorError("the versions lie in the store or in a folder: give one of store and folder")
    if store is None or isinstance(store, Stored):
        yield store
        return
    with closing(Stored(store)) as stored:
        yield stored


@contextmanager
def _one_at_a_time(folder: Path) -> Generator[None]:
    held = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)


def _totals(kept: Mapping[str, Sequence[float]]) -> Totals:
    return {name: (total, count) for name, (total, count) in kept.items()}


def _of_test(totals: Totals) -> Totals:
    """Under names of their own beside what a cohort measured."""
    return {f"test_{name}": total for name, total in totals.items()}


def _digest(call: Mapping[str, Any]) -> str:
    return sha256(canonical_json(call)).hexdigest()


def _user() -> str:
    try:
        return getuser()[:64]
    except (OSError, KeyError, ImportError):  # a container's user may have no name
        return "simulator"
