"""What the site's own page shows, read from the client's folder."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from ..protocol.errors import MurmurError, NotFound, OperatorError
from ..protocol.messages import Assignment
from ..protocol.tensors import read_layout
from ..web import words
from ..web.language import Spoken, _, many
from .ledger import spent
from .outgoing import COUNTED, KINDS
from .policy_words import in_words
from .record import Consent, Counted, Requests, Sent
from .shared import Site
from .switch import Stop

STATES = Spoken(
    {
        "waiting": ("Waits for your consent", "warn"),
        "working": ("Under way", "live"),
        "delivered": ("Delivered", "ok"),
        "late": ("The round went on", "mute"),
        "refused": ("Refused", "warn"),
        "failed": ("Failed", "bad"),
    }
)
CONSENTS = Spoken({"waiting": ("Waits", "warn"), "approved": ("Approved", "ok"), "denied": ("Denied", "bad")})
SAID = ("request", "name", "version", "weight", "tasks", "gpus")  # what can be read in messages beside their metrics
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
            raise NotFound(_("No run {run} has asked anything of this site.", run=run))
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
        numbers, count = sum(t.numel for t in tensors), len(tensors)
        return _(
            "{size}: {numbers} in {tensors}", size=said, numbers=many(numbers, "number"), tensors=many(count, "tensor")
        )

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


def kind(name: str) -> tuple[str, str]:
    """What a kind of message is called and what it holds; a newer agent's kind is called as it is written."""
    found = KINDS.get(name)
    return (_(found[0]), _(found[1])) if found else (name, "")


def kinds_with_rows() -> list[tuple[str, str]]:
    return [kind(name) for name in KINDS if name not in COUNTED]


def budget_left(b: Budget) -> str:
    """What is left of a data set's epsilon, or what was spent of it where nothing bounds it."""
    if b.budget is None:
        return (
            _("unbounded spent, no bound")
            if b.spent is None
            else _("{spent} spent, no bound", spent=words.number(b.spent))
        )
    budget = words.number(b.budget)
    if b.left is None:
        return _("nothing of {budget} left", budget=budget)
    return _("{left} of {budget} left", left=words.number(b.left), budget=budget)


def facts(a: Assignment) -> list[tuple[str, str]]:
    """What a run asks this site to do, as pairs of words."""
    t = a.train
    training = _(
        "{length} in batches of {n:,}, {optimizer} at rate {lr:g}",
        length=many(t.steps, "step") if t.steps else many(t.epochs, "epoch"),
        n=t.batch_size,
        optimizer=t.optimizer,
        lr=t.lr,
    )
    weight = (
        _("the same as every other site")
        if a.weighting == "uniform"
        else _("by its number of examples, {n:,} at most", n=a.max_weight)
    )
    if s := a.secure:
        updates = _(
            "masked; {threshold} of {cohort} clients can unmask a sum of {min_clients} or more",
            threshold=s.threshold,
            cohort=len(s.cohort),
            min_clients=s.min_clients,
        )
    else:
        updates = _("readable: the coordinator sees this site's own")
    return [
        (_("Task"), a.task),
        (_("Training in a round"), training),
        (
            _("Algorithm"),
            (_("plain training") if a.algorithm == "plain" else a.algorithm)
            + (_(", proximal term {mu:g}", mu=a.mu) if a.mu else ""),
        ),
        (_("Weight of its update"), weight),
        (_("Metrics it reports"), ", ".join(a.reported)),
        (_("Updates"), updates),
        (_("Differential privacy"), _("none") if a.dp.mode == "off" else words.privacy_mode(a.dp)),
    ]


def said_of(message: Sent) -> str:
    """What can be read in a message, in one line; empty for those in which nobody but their reader reads anything."""
    said = message.said or {}
    told = {key: said[key] for key in ("request", "name", "version") if key in said}
    if said.get("weight") is not None:
        told["weight"] = f"{said['weight']:g}"
    parts = [f"{said['code']}: {said['detail']}"] if "code" in said else list[str]()
    parts += [f"{_(key)} {value}" for key, value in told.items()]
    for name, total in sorted((said.get("metrics") or {}).items()):
        parts.append(f"{name} {total['sum']:.4g} / {total['count']:g}")
    parts += [f"{_(key)} {', '.join(map(str, said[key]))}" for key in ("tasks", "gpus") if said.get(key)]
    return "; ".join(parts)


def now() -> datetime:
    return datetime.now(UTC)


def at(text: str) -> datetime:
    """A time of the record."""
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        raise OperatorError(f"{text!r} in the record is no time") from None
