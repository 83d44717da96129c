"""What the pages call things: states, phases, events, times and sizes in words that a hospital's admin understands."""

from __future__ import annotations

import math
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from ..protocol.sections import CLIPPED, Dp
from ..protocol.views import AssignmentView, EventView, PrivacyView, RunView, SimulationView
from .refusals import in_words

# Each state has a word and a tone. The tone is a class of app.css: live, ok, warn, bad or mute; the word says the same.
RUN = {
    "running": ("Running", "live"),
    "paused": ("Paused", "warn"),
    "finished": ("Finished", "ok"),
    "failed": ("Failed", "bad"),
    "stopped": ("Stopped", "warn"),
}
CLIENT = {"pending": ("Waiting for approval", "warn"), "active": ("Approved", "ok"), "revoked": ("Revoked", "bad")}

# The phases of a round in their order: state, what one reads while it goes on, what one reads afterwards.
PLAIN = (
    ("selecting", "Choosing clients", "Clients chosen"),
    ("collecting", "Training and sending", "Updates received"),
    ("aggregating", "Making the new version", "New model version"),
)
SECURE = (
    ("selecting", "Choosing clients", "Clients chosen"),
    ("keys", "Exchanging keys", "Keys exchanged"),
    ("shares", "Storing key backups", "Key backups stored"),
    ("collecting", "Training, masking, sending", "Masked updates received"),
    ("agreeing", "Agreeing on who sent", "Senders agreed"),
    ("revealing", "Unmasking the sum", "Sum unmasked"),
    ("aggregating", "Making the new version", "New model version"),
)
EVALUATE = {
    "collecting": ("Measuring and sending", "Measurements received"),
    "aggregating": ("Adding up the quality", "Quality known"),
}

ASSIGNMENT = {
    "offered": ("Asked to take part", "mute"),
    "working": ("Working", "live"),
    "uploaded": ("Update sent", "ok"),
    "counted": ("In the sum", "ok"),
    "failed": ("Failed", "bad"),
    "dropped": ("Dropped out", "bad"),
}
CLIENT_PHASE = {
    "waiting": "Waiting for the next step",
    "downloading": "Downloading the model",
    "training": "Training",
    "uploading": "Sending",
}

COORDINATOR = "coordinator"  # who paused a run, in the log, where it was no person
ABSENT_NAMES = 3  # of a reason, in a table's row; more are counted

# The log: a kind of event and what its data say happened, its tone, and its sentence over the data. `where` is the
# round, with the attempt if it is not the first. What is not here, or lacks a word, is shown as it is.
EVENTS = {
    ("run", "running"): ("live", "Run {name} started by {by}"),
    ("run", "paused"): ("warn", "Run paused by {by}"),
    ("run", "held"): ("warn", "Run paused by the coordinator: {reason}"),
    ("run", "resumed"): ("live", "Run resumed by {by}"),
    ("run", "finished"): ("ok", "Run finished"),
    ("run", "stopped"): ("warn", "Run stopped by {by}"),
    ("run", "failed"): ("bad", "Run failed: {reason}"),
    ("phase", "selecting"): ("live", "{where}: choosing clients"),
    ("phase", "waiting"): ("warn", "{where} waits: {reason}"),
    ("phase", "keys"): ("mute", "{where}: {cohort} clients chosen, exchanging keys"),
    ("phase", "shares"): ("mute", "{where}: storing key backups"),
    ("phase", "collecting"): ("mute", "{where}: training and sending"),
    ("phase", "agreeing"): ("mute", "{where}: agreeing on who sent"),
    ("phase", "revealing"): ("mute", "{where}: unmasking the sum"),
    ("phase", "aggregating"): ("mute", "{where}: adding up"),
    ("phase", "committed"): ("ok", "{where} committed"),
    ("phase", "failed"): ("bad", "{where} failed: {reason}"),
    ("client", "working"): ("mute", "{client} started its part of round {round}"),
    ("client", "uploaded"): ("ok", "{client} sent its update for round {round}"),
    ("client", "failed"): ("bad", "{client} failed in round {round}: {reason}"),
    ("client", "dropped"): ("bad", "{client} dropped out of round {round}: {reason}"),
    ("client", "pending"): ("warn", "{client} enrolled and waits for approval"),
    ("client", "active"): ("ok", "{client} approved by {by}"),
    ("client", "revoked"): ("bad", "{client} revoked by {by}"),
    ("client", "online"): ("ok", "{client} is online"),
    ("secure", "advert"): ("mute", "{client} sent its keys for round {round}"),
    ("secure", "shares"): ("mute", "{client} stored its key backups for round {round}"),
    ("secure", "agree"): ("mute", "{client} signed who is in the sum of round {round}"),
    ("secure", "reveal"): ("mute", "{client} helped to unmask the sum of round {round}"),
    ("privacy", ""): ("mute", "Privacy spent: epsilon {value} at delta {delta}, {unit}-level, by {accountant}"),
    ("model", ""): ("ok", "Version {version} made from {contributors} clients"),
    ("model", "clipped"): (
        "warn",
        "Version {version} made from {contributors} clients; {clipped} of their values were cut to secure.clip_value",
    ),
    ("alias", "promoted"): ("ok", "{model}: {alias} points at version {version}, promoted by {by}"),
    ("alias", "rolled_back"): ("warn", "{model}: {alias} points at version {version} again, rolled back by {by}"),
    ("audit", "invited"): ("mute", "{client} invited by {by}"),
    ("audit", "logged in by link"): ("mute", "{account} signed in by link"),
}


def phase(state: str, *, secure: bool, evaluate: bool) -> tuple[str, str] | None:
    """The words for a round's state: while it goes on, and afterwards. None for a state that is no phase."""
    found = next(((now, done) for key, now, done in (SECURE if secure else PLAIN) if key == state), None)
    if found and evaluate:
        found = EVALUATE.get(state, found)
    return found


def round_state(state: str, *, secure: bool, evaluate: bool) -> tuple[str, str]:
    """Word and tone of a round, whether it is over or not."""
    if state == "committed":
        return "Committed", "ok"
    if state == "failed":
        return "Failed", "bad"
    words = phase(state, secure=secure, evaluate=evaluate)
    return (words[0] if words else state.capitalize()), "live"


def assignment(a: AssignmentView, *, secure: bool) -> tuple[str, str]:
    """Word and tone of one client's part of a round."""
    word, tone = ASSIGNMENT[a.state]
    if a.state == "working":
        word = CLIENT_PHASE.get(a.phase, a.phase.capitalize() or word)
        if a.phase == "uploading":
            word += " its masked update" if secure else " its update"
        elif a.phase == "training" and a.steps:
            word += f", {a.step:,} of {a.steps:,}"
    elif a.state == "uploaded" and secure:
        word = "Masked update sent"
    elif a.late:
        word, tone = "Came too late", "warn"
    return word, tone


def event(e: EventView) -> tuple[str, str]:
    """Sentence and tone of an event; both are plain text, to be escaped."""
    data = e.data
    tone, sentence = EVENTS.get((e.kind, _happened(e)), ("mute", ""))
    words = {name: _short(value) for name, value in data.items()}
    if e.kind == "client" and "reason" in data:
        words["reason"] = _short(in_words(str(data["reason"]), brief=True))
    if e.kind == "run" and "reason" in data:
        words["reason"] = _short(first_sentence(str(data["reason"])))
    if e.kind == "run" and data.get("by") == COORDINATOR:
        words["by"] = "the coordinator"
    if isinstance(data.get("cohort"), list):
        words["cohort"] = f"{len(data['cohort']):,}"
    if e.kind == "model" and "clipped" in data:
        words["clipped"] = f"{data['clipped']:.2%}"
    if "round" in data:
        words["where"] = f"Round {words['round']}" + (
            f", attempt {words['attempt']}" if data.get("attempt", 1) != 1 else ""
        )
    try:
        said = sentence.format_map(words)
    except KeyError:
        said = ""
    if said:
        return said, tone
    facts = ", ".join(f"{k} {_short(v)}" for k, v in data.items())
    return (f"{e.kind}: {facts}" if facts else e.kind), tone


def _happened(e: EventView) -> str:
    """What an event's data say happened. Three states mean two things each, which the other data tell apart."""
    data = e.data
    state = data.get("state")
    if (e.kind, state) == ("run", "running") and "name" not in data:
        return "resumed"
    if (e.kind, state) == ("run", "paused") and data.get("by") == COORDINATOR:
        return "held"
    if (e.kind, state) == ("phase", "selecting") and data.get("reason"):
        return "waiting"
    if e.kind == "model" and data.get("clipped", 0.0) > CLIPPED:
        return "clipped"
    return str(state or data.get("said") or data.get("action") or ("online" if data.get("online") else ""))


def reason_of(run: RunView) -> str:
    """Why a run is in its state and what follows, for a note on its page; empty where there is nothing to say."""
    if run.paused_by is None:
        return run.reason
    if run.paused_by:
        said = run.reason[:1].upper() + run.reason[1:]
        return f"{said}. Clients may deliver what they have under way; nothing new begins."
    return f"Paused by the coordinator, and goes on by itself: {run.reason}."


def privacy(spent: PrivacyView | None) -> str:
    """What a run has spent of its clients' privacy, with all that the number needs to mean something."""
    return f"{spent.text[:1].upper()}{spent.text[1:]}." if spent else "Nothing is spent yet."


def privacy_mode(dp: Dp) -> str:
    """Who adds how much noise to what."""
    if dp.mode == "local":
        return "Each client adds noise while it trains."
    who = "The coordinator adds" if dp.mode == "central" else "The clients add, inside the masks,"
    bound = "a bound that follows the updates' norms" if dp.adaptive else f"the bound of {dp.clip_norm:g}"
    return f"Each update is clipped to {bound}. {who} noise of {dp.noise_multiplier:g} times that to the sum."


def first_sentence(text: str) -> str:
    """The beginning of a reason, for rows and the log; the page of its run has all of it."""
    return text.partition(". ")[0]


def absent(clients: Iterable[tuple[str, str]]) -> list[str]:
    """Who is missing and why, those of one reason together: "va, st-mary: not heard for 60 s"."""
    by_reason: dict[str, list[str]] = {}
    for client, reason in clients:
        by_reason.setdefault(in_words(reason, brief=True), []).append(client)
    found: list[str] = []
    for reason, names in sorted(by_reason.items(), key=lambda item: -len(item[1])):
        more = len(names) - ABSENT_NAMES
        listed = ", ".join(names[:ABSENT_NAMES]) + (f" and {more:,} more" if more > 0 else "")
        found.append(f"{listed}: {reason}" if reason else listed)
    return found


def _short(value: Any) -> str:
    shown = f"{value:.4g}" if isinstance(value, float) else str(value)
    return shown if len(shown) <= 160 else shown[:159] + "…"


def ago(then: datetime | None, now: datetime) -> str:
    """How long ago, coarsely. app.js counts on in the same words."""
    if then is None:
        return "never"
    seconds = (now - then).total_seconds()
    return "just now" if seconds < 5 else f"{span(seconds)} ago"


def span(seconds: float) -> str:
    """A duration in its largest unit: 42 s, 7 min, 3 h, 12 d."""
    seconds = max(0, int(seconds))
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"


def took(seconds: float) -> str:
    """A duration with two units, for tables: 8.4 s, 2 min 5 s, 3 h 20 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    first, second = (f"{minutes} min", f"{rest} s") if minutes < 60 else (f"{minutes // 60} h", f"{minutes % 60} min")
    return first if second.startswith("0 ") else f"{first} {second}"


def clock(at: datetime) -> str:
    return at.astimezone(UTC).strftime("%H:%M:%S")


def date(at: datetime) -> str:
    return at.astimezone(UTC).strftime("%d %b %Y, %H:%M")


def size(count: int) -> str:
    """Bytes in decimal units, as file managers show them: 512 B, 14.2 kB, 3.1 MB."""
    if count < 1000:
        return f"{count} B"
    value = float(count)
    for unit in ("kB", "MB", "GB"):
        value /= 1000
        if value < 999.95:
            return f"{value:.1f} {unit}"
    return f"{value / 1000:.1f} TB"


def number(value: float | None) -> str:
    """A metric in four digits; a dash where there is none, and plain words where it is no number."""
    if value is None:
        return "–"
    if math.isnan(value):
        return "not a number"
    return f"{value:.3f}" if 0.01 <= abs(value) < 10 else f"{value:.4g}"


def metric(name: str) -> str:
    """The name of a metric as a heading."""
    return name.replace("_", " ").capitalize()


def change(value: float) -> str:
    """A difference with its sign, to three decimals where a metric has three."""
    if not math.isfinite(value):
        return number(math.nan)
    return ("−" if value < 0 else "+") + (f"{abs(value):.3f}" if abs(value) < 10 else f"{abs(value):.4g}")


def many(count: int, one: str, more: str = "") -> str:
    """1 client, 2 clients."""
    return f"{count:,} {one if count == 1 else more or one + 's'}"


def simulated(simulation: SimulationView) -> str:
    """Who took part in a simulated run."""
    return many(simulation.clients, "virtual client")
