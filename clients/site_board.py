"""What the site's own page shows, read from the client's folder."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from ..protocol.errors import MurmurError, NotFound, OperatorError
from ..protocol.messages import Assignment
from ..protocol.tensors import read_layout
from ..web import words
from .ledger import spent
from .outgoing import COUNTED, KINDS
from .policy_words import in_words
from .record import Consent, Counted, Requests, Sent
from .shared import Site
from .switch import Stop

STATES = {
    "waiting": ("Waits for your consent", "warn"),
    "working": ("Under way", "live"),
    "delivered": ("Delivered", "ok"),
    "late": ("The round went on", "mute"),
    "refused": ("Refused", "warn"),
    "failed": ("Failed", "bad"),
}
CONSENTS = {"waiting": ("Waits", "warn"), "approved": ("Approved", "ok"), "denied": ("Denied", "bad")}
ROWS_OF = [words_of for kind, words_of in KINDS.items() if kind not in COUNTED]
NEWEST = 12  # messages on the first page
ROWS = 100  # on the page of all


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """What a data set has spent; spent and left are None where there is no number for it."""

    dataset: str
    spent: float | None
    budget: float | None
    trainings: int

    @property
    def left(self) -> float | None:
        return None if self.budget is None or self.spent is None else max(0.0, self.budget - self.spent)


@dataclass(frozen=True, kw_only=True, slots=True)
class Board:
    """The first page as of one instant."""

    now: datetime
    stopped: Stop | None
    runs: list[Requests]
    waiting: list[tuple[Consent, Assignment]]
    consents: dict[str, Consent]
    messages: int
    bytes: int
    updates: int
    masked: int
    sent: list[Sent]
    budgets: list[Budget]


class Boards:
    """Reads them. An epsilon, which takes seconds, is computed once for each state of the ledger."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self._epsilons: dict[tuple[Any, ...], float | None] = {}

    def version(self) -> tuple[object, ...]:
        """Another value once there is something new to show."""
        stop = self.site.switch.stopped()
        return self.site.record.version(), stop

    def first(self) -> Board:
        record = self.site.record
        consents = record.consents()
        runs = record.runs()
        about = {r.last.about.run: r.last.about for r in runs}
        messages, count = record.totals()
        updates, masked = record.updates()
        return Board(
            updates=updates,
            masked=masked,
            now=now(),
            stopped=self.site.switch.stopped(),
            runs=runs,
            waiting=[(c, about[c.run]) for c in consents if c.state == "waiting" and c.run in about],
            consents={c.run: c for c in consents},
            messages=messages,
            bytes=count + sum(c.bytes for c in record.counted()),
            sent=record.sent(limit=NEWEST),
            budgets=self.budgets(),
        )

    def budgets(self) -> list[Budget]:
        """What each data set has spent of its epsilon, those of the installed tasks without a charge among them."""
        settings, charges = self.site.settings, self.site.ledger.charges()
        policy = settings.policy
        names = {entry.dataset for entry in settings.tasks.values()} if policy.epsilon else set[str]()
        found: list[Budget] = []
        for name in sorted(names | {c.dataset for c in charges}):
            mine = [c for c in charges if c.dataset == name and c.state != "void"]
            key = (name, tuple((c.assignment, c.state, c.event.count) for c in mine))
            if key not in self._epsilons:
                self._epsilons[key] = spent(mine, policy.delta).to_json()["value"] if mine else 0.0
            found.append(Budget(dataset=name, spent=self._epsilons[key], budget=policy.epsilon or None,
                                trainings=len(mine)))  # fmt: skip
        return found

    def run(self, run: str) -> dict[str, Any]:
        """One run: what it asks for, each time it asked, what left for it; raises NotFound."""
        asked = self.site.record.assignments(run)
        if not asked:
            raise NotFound(f"No run {run} has asked anything of this site.")
        about = asked[-1].about
        return {
            "about": about,
            "asked": asked[::-1][:ROWS],
            "since": asked[0].at,
            "facts": facts(about),
            "model": self._model(about),
            "sent": self.site.record.sent(run, limit=ROWS),
            "totals": self.site.record.totals(run),
            "consent": next((c for c in reversed(self.site.record.consents()) if c.run == run), None),
        }

    def _model(self, about: Assignment) -> str:
        """Size of the run's model in words; what is in it only while its file is here."""
        said = words.size(about.model_bytes)
        path = self.site.settings.workdir / "models" / f"{about.model}.safetensors"
        try:
            layout = read_layout(path)
        except (OSError, MurmurError):
            return said
        tensors = layout.tensors
        return f"{said}: {words.many(sum(t.numel for t in tensors), 'number')} in {words.many(len(tensors), 'tensor')}"

    def sent(self, page: int) -> tuple[list[Sent], int]:
        """One page of all messages, and how many there are."""
        record = self.site.record
        return record.sent(limit=ROWS, skip=(page - 1) * ROWS), record.totals()[0]

    def counted(self) -> list[Counted]:
        """What is only counted, over all hours."""
        total: dict[str, Counted] = {}
        for c in self.site.record.counted():
            before = total.get(c.kind, Counted(hour="", kind=c.kind, messages=0, bytes=0))
            total[c.kind] = Counted(
                hour=c.hour, kind=c.kind, messages=before.messages + c.messages, bytes=before.bytes + c.bytes
            )
        return [total[kind] for kind in KINDS if kind in total]

    def policy(self) -> list[str]:
        return in_words(self.site.settings.policy)

    def months(self) -> list[str]:
        """The months of which there is something to write a receipt, the newest first."""
        record = self.site.record
        first = [c.hour for c in record.counted()[:1]] + [m.at for m in record.sent()[-1:]]
        if not first:
            return []
        until, (year, month) = now(), map(int, min(first)[:7].split("-"))
        count = (until.year - year) * 12 + until.month - month + 1
        return [f"{year + (month - 1 + i) // 12}-{(month - 1 + i) % 12 + 1:02}" for i in range(count)][::-1]


def facts(a: Assignment) -> list[tuple[str, str]]:
    """What a run asks this site to do, as pairs of words."""
    t = a.train
    length = words.many(t.steps, "step") if t.steps else words.many(t.epochs, "epoch")
    found = [
        ("Task", a.task),
        ("Training in a round", f"{length} in batches of {t.batch_size:,}, {t.optimizer} at {t.lr:g}"),
        ("Algorithm", a.algorithm + (f", proximal term {a.mu:g}" if a.mu else "")),
        (
            "Its weight",
            "1, whatever its data" if a.weighting == "uniform" else f"its examples, {a.max_weight:,} at most",
        ),
        ("Metrics it reports", ", ".join(a.reported)),
    ]
    if a.secure is not None:
        s = a.secure
        found.append(("Updates", f"masked; {s.threshold} of {len(s.cohort)} clients can unmask a sum of "
                                 f"{s.min_clients} or more"))  # fmt: skip
    else:
        found.append(("Updates", "readable: the coordinator sees this site's own"))
    found.append(("Differential privacy", "none" if a.dp.mode == "off" else words.privacy_mode(a.dp)))
    return found


def said_of(message: Sent) -> str:
    """What can be read in a message, in one line; empty for those in which nobody but their reader reads anything."""
    said = message.said or {}
    parts = [f"{said['code']}: {said['detail']}"] if "code" in said else list[str]()
    parts += [f"{key} {said[key]}" for key in ("request", "name", "version") if key in said]
    if said.get("weight") is not None:
        parts.append(f"weight {said['weight']:g}")
    for name, total in sorted((said.get("metrics") or {}).items()):
        parts.append(f"{name} {total['sum']:.4g} / {total['count']:g}")
    for key in ("tasks", "gpus"):
        if said.get(key):
            parts.append(f"{key} {', '.join(map(str, said[key]))}")
    return "; ".join(parts)


def now() -> datetime:
    return datetime.now(UTC)


def at(text: str) -> datetime:
    """A time of the record."""
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        raise OperatorError(f"{text!r} in the record is no time") from None
