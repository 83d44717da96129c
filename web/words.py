"""What the pages call things: states, phases, events, times and sizes in words that a hospital's admin understands."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from ..protocol.sections import CLIPPED, Dp
from ..protocol.views import AssignmentView, EventView, PrivacyView, RunView, SimulationView
from .language import Spoken, _, many
from .reasons import told
from .refusals import in_words

# Each state has a word and a tone. The tone is a class of app.css: live, ok, warn, bad or mute; the word says the same.
RUN = Spoken(
    {
        "running": ("Running", "live"),
        "paused": ("Paused", "warn"),
        "interrupted": ("Interrupted", "warn"),
        "finished": ("Finished", "ok"),
        "failed": ("Failed", "bad"),
        "stopped": ("Stopped", "warn"),
    }
)
CLIENT = Spoken(
    {"pending": ("Waiting for approval", "warn"), "active": ("Approved", "ok"), "revoked": ("Revoked", "bad")}
)

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

ASSIGNMENT = Spoken(
    {
        "offered": ("Asked to take part", "mute"),
        "working": ("Working", "live"),
        "uploaded": ("Update sent", "ok"),
        "counted": ("In the sum", "ok"),
        "failed": ("Failed", "bad"),
        "dropped": ("Dropped out", "bad"),
    }
)
CLIENT_PHASE = {
    "waiting": "Waiting for the next step",
    "downloading": "Downloading the model",
    "training": "Training",
}

UNITS = ("d", "h", "min", "s")
SCRIPT = ("just now", "{} ago", *UNITS, "Live", "Reconnecting", "Copy", "Copied", "Press Ctrl+C")
USUAL_METRICS = (
    "Accuracy",
    "Loss",
    "Train loss",
    "Auc",
    "F1",
    "Recall",
    "Sensitivity",
    "Specificity",
    "Examples",
)  # others are shown as their task names them
LEVEL = {"client": "client-level", "example": "example-level"}  # whose contribution an epsilon bounds
COORDINATOR = "coordinator"  # who paused a run, in the log, where it was no person

# The log: a kind of event and what its data say happened, its tone, and its sentence over the data. `where` is the
# round at the beginning of a sentence, with the attempt if it is not the first; `round` names it inside one. What is
# not here, or lacks a word, is shown as it is.
EVENTS = {
    ("run", "running"): ("live", "Run {name} started by {by}"),
    ("run", "paused"): ("warn", "Run paused by {by}"),
    ("run", "interrupted"): ("warn", "Simulation {reason}"),
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
    ("phase", "measuring"): ("mute", "{where}: measuring and sending"),
    ("phase", "agreeing"): ("mute", "{where}: agreeing on who sent"),
    ("phase", "revealing"): ("mute", "{where}: unmasking the sum"),
    ("phase", "aggregating"): ("mute", "{where}: adding up"),
    ("phase", "committed"): ("ok", "{where} committed"),
    ("phase", "failed"): ("bad", "{where} failed: {reason}"),
    ("client", "working"): ("mute", "{client} started its part of {round}"),
    ("client", "uploaded"): ("ok", "{client} sent its update for {round}"),
    ("client", "failed"): ("bad", "{client} failed in {round}: {reason}"),
    ("client", "dropped"): ("bad", "{client} dropped out of {round}: {reason}"),
    ("client", "pending"): ("warn", "{client} enrolled and waits for approval"),
    ("client", "active"): ("ok", "{client} approved by {by}"),
    ("client", "revoked"): ("bad", "{client} revoked by {by}"),
    ("client", "online"): ("ok", "{client} is online"),
    ("secure", "advert"): ("mute", "{client} sent its keys for {round}"),
    ("secure", "shares"): ("mute", "{client} stored its key backups for {round}"),
    ("secure", "agree"): ("mute", "{client} signed who is in the sum of {round}"),
    ("secure", "reveal"): ("mute", "{client} helped to unmask the sum of {round}"),
    ("privacy", ""): ("mute", "Privacy spent: epsilon {value} at delta {delta}, {level}, by {accountant}"),
    ("model", ""): ("ok", "Version {version} made from {contributors} clients"),
    ("model", "clipped"): (
        "warn",
        "Version {version} made from {contributors} clients; {clipped} of their values were cut to secure.clip_value",
    ),
    ("alias", "promoted"): ("ok", "{model}: {alias} points at version {version}, promoted by {by}"),
    ("alias", "rolled_back"): ("warn", "{model}: {alias} points at version {version} again, rolled back by {by}"),
    ("alias", "removed"): ("warn", "{model}: {alias} removed by {by}; it pointed at version {version}"),
    ("audit", "invited"): ("mute", "{client} invited by {by}"),
    ("audit", "logged in by link"): ("mute", "{account} signed in by link"),
}


def phase(state: str, *, secure: bool, evaluate: bool) -> tuple[str, str] | None:
    """The words for a round's state: while it goes on, and afterwards. None for a state that is no phase."""
    found = next(((now, done) for key, now, done in (SECURE if secure else PLAIN) if key == state), None)
    if found and evaluate:
        found = EVALUATE.get(state, found)
    return (_(found[0]), _(found[1])) if found else None


def round_state(state: str, *, secure: bool, evaluate: bool) -> tuple[str, str]:
    """Word and tone of a round, whether it is over or not."""
    if state == "committed":
        return _("Committed"), "ok"
    if state == "failed":
        return _("Failed"), "bad"
    words = phase(state, secure=secure, evaluate=evaluate)
    return (words[0] if words else state.capitalize()), "live"


def assignment(a: AssignmentView, *, secure: bool) -> tuple[str, str]:
    """Word and tone of one client's part of a round."""
    word, tone = ASSIGNMENT[a.state]
    if a.state == "working":
        word = _(CLIENT_PHASE[a.phase]) if a.phase in CLIENT_PHASE else a.phase.capitalize() or word
        if a.phase == "uploading":
            word = _("Sending its masked update") if secure else _("Sending its update")
        elif a.phase == "training" and a.steps:
            word = _("Training, {step:,} of {steps:,}", step=a.step, steps=a.steps)
    elif a.state == "uploaded" and secure:
        word = _("Masked update sent")
    elif a.late:
        word, tone = _("Came too late"), "warn"
    return word, tone


def event(e: EventView, planned: Mapping[str, int] | None = None) -> tuple[str, str]:
    """Sentence and tone of an event; both are plain text, to be escaped.

    planned: how many rounds each run trains, by its id; what follows them is its final evaluation.
    """
    data = e.data
    rounds = (planned or {}).get(e.run or "")
    final = rounds is not None and data.get("round", 0) > rounds
    tone, sentence = EVENTS.get((e.kind, _happened(e, final=final)), ("mute", ""))
    words = {name: _short(value) for name, value in data.items()}
    if e.kind == "client" and "reason" in data:
        words["reason"] = _short(in_words(str(data["reason"]), brief=True))
    if e.kind in ("run", "phase") and "reason" in data:
        said = str(data["reason"])
        words["reason"] = _short(first_sentence(said) if e.kind == "run" else told(said))
    if e.kind == "run" and data.get("by") == COORDINATOR:
        words["by"] = _("the coordinator")
    if isinstance(data.get("cohort"), list):
        words["cohort"] = f"{len(data['cohort']):,}"
    if e.kind == "model" and "clipped" in data:
        words["clipped"] = f"{data['clipped']:.2%}"
    if "accountant" in data:
        words["accountant"] = words["accountant"].upper()
    if level := LEVEL.get(str(data.get("unit"))):
        words["level"] = _(level)
    if "round" in data:
        n, attempt = words["round"], data.get("attempt", 1)
        words["where"] = _("Final evaluation") if final else _("Round {n}", n=n)
        if attempt != 1:
            words["where"] = _("{where}, attempt {attempt}", where=words["where"], attempt=attempt)
        words["round"] = in_round(n, final=final)
    try:
        said = _(sentence).format_map(words) if sentence else ""
    except KeyError:
        said = ""
    if said:
        return said, tone
    facts = ", ".join(f"{k} {_short(v)}" for k, v in data.items())
    return (f"{e.kind}: {facts}" if facts else e.kind), tone


def in_round(n: int | str, *, final: bool) -> str:
    """A round inside a sentence; the one after the last is stored as round N + 1 and called what it is."""
    return _("the final evaluation") if final else _("round {n}", n=n)


def _happened(e: EventView, *, final: bool) -> str:
    """What an event's data say happened. Some states mean several things, which the other data tell apart."""
    data = e.data
    state = data.get("state")
    if (e.kind, state) == ("run", "running") and "name" not in data:
        return "resumed"
    if (e.kind, state) == ("run", "paused") and data.get("by") == COORDINATOR:
        return "held"
    if (e.kind, state) == ("run", "paused") and str(data.get("reason", "")).startswith("interrupted"):
        return "interrupted"
    if (e.kind, state) == ("phase", "selecting") and data.get("reason"):
        return "waiting"
    if (e.kind, state) == ("phase", "collecting") and final:
        return "measuring"
    if e.kind == "model" and data.get("clipped", 0.0) > CLIPPED:
        return "clipped"
    return str(state or data.get("said") or data.get("action") or ("online" if data.get("online") else ""))


def reason_of(run: RunView) -> str:
    """Why a run is in its state and what follows, for a note on its page; empty where there is nothing to say."""
    why = told(run.reason)
    if run.paused_by is None:
        return why
    if run.paused_by:
        said = why[:1].upper() + why[1:]
        if run.simulation:
            return _("{said}.", said=said)
        return _("{why}. Clients may deliver what they have under way; nothing new begins.", why=said)
    return _("Paused by the coordinator, and goes on by itself: {why}.", why=why)


def privacy(spent: PrivacyView | None) -> str:
    """What a run has spent of its clients' privacy, with all that the number needs to mean something."""
    if not spent:
        return _("Nothing is spent yet.")
    text = privacy_text(spent)
    return _("{said}.", said=text[:1].upper() + text[1:])


def privacy_text(spent: PrivacyView) -> str:
    """`PrivacyView.text` in the viewer's language."""
    found = _(
        "epsilon {value} at delta {delta:g}, {level}, by {accountant}",
        value=_("infinite") if spent.value is None else f"{spent.value:.3g}",
        delta=spent.delta,
        level=_(LEVEL[spent.unit]),
        accountant=spent.accountant.upper(),
    )
    return found + (_(", budget {budget:g}", budget=spent.budget) if spent.budget else "")


def privacy_mode(dp: Dp) -> str:
    """Who adds how much noise to what."""
    if dp.mode == "local":
        return _("Each client adds noise while it trains.")
    clipped = (
        _("Each update is clipped to a bound that follows the updates' norms.")
        if dp.adaptive
        else _("Each update is clipped to the bound of {norm:g}.", norm=dp.clip_norm)
    )
    if dp.mode == "central":
        noise = _("The coordinator adds noise of {times:g} times that to the sum.", times=dp.noise_multiplier)
    else:
        noise = _(
            "The clients add, inside the masks, noise of {times:g} times that to the sum.", times=dp.noise_multiplier
        )
    return f"{clipped} {noise}"


def script() -> str:
    """What app.js says by itself, as JSON."""
    return json.dumps({word: _(word) for word in SCRIPT}, ensure_ascii=False)


def first_sentence(text: str) -> str:
    """The beginning of a reason, for rows and the log; the page of its run has all of it."""
    return told(text.partition(". ")[0])


def _short(value: Any) -> str:
    shown = f"{value:.4g}" if isinstance(value, float) else str(value)
    return shown if len(shown) <= 160 else shown[:159] + "…"


def ago(then: datetime | None, now: datetime) -> str:
    """How long ago, coarsely. app.js counts on in the same words."""
    if then is None:
        return _("never")
    seconds = (now - then).total_seconds()
    return _("just now") if seconds < 5 else _("{span} ago", span=span(seconds))


def span(seconds: float) -> str:
    """A duration in its largest unit: 42 s, 7 min, 3 h, 12 d."""
    seconds = max(0, int(seconds))
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size} {_(unit)}"
    return f"{seconds} {_('s')}"


def took(seconds: float) -> str:
    """A duration with two units, for tables: 8.4 s, 2 min 5 s, 3 h 20 min."""
    _d, h, m, s = (_(unit) for unit in UNITS)
    if seconds < 60:
        return f"{seconds:.1f} {s}"
    minutes, rest = divmod(int(seconds), 60)
    first, second = (
        (f"{minutes} {m}", f"{rest} {s}") if minutes < 60 else (f"{minutes // 60} {h}", f"{minutes % 60} {m}")
    )
    return first if second.startswith("0 ") else f"{first} {second}"


def clock(at: datetime) -> str:
    return at.astimezone(UTC).strftime("%H:%M:%S")


def date(at: datetime) -> str:
    return at.astimezone(UTC).strftime(_("%d %b %Y, %H:%M"))


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
        return _("not a number")
    return f"{value:.3f}" if 0.01 <= abs(value) < 10 else f"{value:.4g}"


def metric(name: str) -> str:
    """The name of a metric, or of a setting, as a heading."""
    return _(heading(name))


def heading(name: str) -> str:
    return name.replace("_", " ").capitalize()


def change(value: float) -> str:
    """A difference with its sign, to three decimals where a metric has three."""
    if not math.isfinite(value):
        return number(math.nan)
    return ("−" if value < 0 else "+") + (f"{abs(value):.3f}" if abs(value) < 10 else f"{abs(value):.4g}")


def simulated(simulation: SimulationView) -> str:
    """Who took part in a simulated run."""
    return many(simulation.clients, "virtual client")
