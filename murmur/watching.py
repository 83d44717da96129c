"""A run followed to its end: a live board on a terminal, one line a round elsewhere, JSON Lines for programs."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from murmur.client import Client
from murmur.output import FAILED, out, plain, print_json
from murmur.protocol.errors import MurmurError
from murmur.protocol.sections import CLIPPED
from murmur.protocol.views import AssignmentView, EventView, RoundView, RunDetail, RunView

EVERY_S = 1.0  # between two looks at how far the clients are
SHOWN = 20  # clients of a round, on the board
TICKS = "▁▂▃▄▅▆▇█"
TONES = {"ok": "green", "bad": "red", "warn": "yellow", "live": "cyan"}


def watch(client: Client, run_id: str, *, as_json: bool, timeout_s: float | None = None) -> int:
    """Follow a run to its end and print it. Returns the exit code; raises TimeoutError after `timeout_s` seconds."""
    detail = client.run(run_id)
    state = detail.run.state
    if as_json:
        for event in client.watch(run_id, timeout_s=timeout_s):
            print_json(event.model_dump(mode="json"))
            state = _state(event, state)
    else:
        for _event, after in follow(client, detail, timeout_s=timeout_s):
            state = after
        detail = client.run(run_id)
        latest = ", ".join(f"{name} {value:.4g}" for name, value in sorted(detail.run.latest.items()))
        out.print(f"{run_id} is {plain(standing(detail.run))}  {latest}", soft_wrap=True)
    return 0 if state == "finished" else FAILED


def standing(run: RunView) -> str:
    """The state of a run with its reason; a reason that names the state says it alone."""
    if not run.reason or run.reason.startswith(run.word):
        return run.reason or run.word
    return f"{run.word}: {run.reason}"


def kind(run: RunView) -> str:
    """How a run's updates travel, and whether its clients are simulated."""
    groups = run.recipe.secure.groups
    masked = f"masked in {groups} groups" if groups else "masked" if run.recipe.secure.on else "plain"
    return f"{masked}, simulated" if run.simulation else masked


def follow(
    client: Client, detail: RunDetail, screen: Console = out, *, timeout_s: float | None = None
) -> Generator[tuple[EventView, str]]:
    """Yield each event of the run with the run's state, while a board (or, without a terminal, lines) shows it."""
    run, state = detail.run, detail.run.state
    with _board(client, detail, screen):
        for event in client.watch(run.id, timeout_s=timeout_s):
            state = _state(event, state)
            for line in _lines(event, run.rounds, live=screen.is_terminal):
                screen.print(line, soft_wrap=True)
            yield event, state


def _lines(event: EventView, rounds: int, *, live: bool) -> Iterator[str]:
    """What is said of an event; what the board shows anyhow is said without one only."""
    data, round_n = event.data, event.data.get("round", 0)
    if event.kind == "phase" and not live:
        final = round_n > rounds
        if data["state"] == "committed":
            yield "final evaluation done" if final else f"round {round_n} of {rounds} committed"
        elif data["state"] == "selecting" and data.get("reason"):
            yield f"{'final evaluation' if final else f'round {round_n}'} waits: {plain(data['reason'])}"
    elif event.kind == "client" and data.get("state") in ("failed", "dropped"):
        yield f"[yellow]{data['client']}[/]: {plain(data.get('reason', ''))}"
    elif event.kind == "model" and (clipped := data.get("clipped", 0.0)) > CLIPPED:
        yield f"[yellow]round {data['version']}[/]: {clipped:.2%} of the values were cut"
    elif event.kind == "run" and (said := _pause(event)):
        yield said


def _pause(event: EventView) -> str:
    """A pause or its end in words; empty for any other event. The start of a run names it, its going on does not."""
    by, reason = plain(event.data.get("by", "")), plain(event.data.get("reason", ""))
    if event.data.get("state") == "paused":
        said = reason if reason.startswith((f"paused by {by}", "interrupted")) else f"paused: {reason}"
        return f"[yellow]{said}[/]"
    if event.data.get("state") == "running" and "name" not in event.data:
        return f"resumed by {'the coordinator' if by == 'coordinator' else by}"
    return ""


def _state(event: EventView, before: str) -> str:
    return event.data.get("state", before) if event.kind == "run" else before


def log_line(event: EventView, rounds: int) -> str:
    """An event of a run of so many rounds in one line: when, and what happened in words."""
    from murmur.web import words

    sentence, tone = words.event(event, {event.run or "": rounds})
    colour = TONES.get(tone, "default")
    return f"[dim]{event.at.astimezone():%F %T}[/]  [{colour}]{plain(sentence)}[/]"


@contextmanager
def _board(client: Client, detail: RunDetail, screen: Console) -> Generator[None]:
    """The run's board at the foot of a terminal, looked at anew every second; nothing elsewhere."""
    if not screen.is_terminal:
        yield
        return
    ended = threading.Event()
    with Live(board(detail, datetime.now(UTC)), console=screen, auto_refresh=False) as live:

        def look() -> None:
            while not ended.wait(EVERY_S):
                try:
                    live.update(board(client.run(detail.run.id), datetime.now(UTC)), refresh=True)
                except MurmurError:
                    continue  # a coordinator that is away for a while; the events wait for it likewise

        looker = threading.Thread(target=look, daemon=True)
        looker.start()
        try:
            yield
        finally:
            ended.set()
            looker.join()


def board(detail: RunDetail, now: datetime) -> RenderableType:
    """A run at a glance: its rounds, the time that is left, its metric, its epsilon, and each client of the round."""
    run, current = detail.run, detail.current
    secure = run.recipe.secure.on
    rows: list[RenderableType] = [f"[bold]{run.id}[/]  {run.recipe.strategy.name}, {kind(run)}, {plain(standing(run))}"]
    bar = Table.grid(padding=(0, 2))
    bar.add_row(
        ProgressBar(total=run.rounds, completed=run.round, width=40),
        f"{run.round} of {run.rounds} rounds",
        _left(run, now),
        f"[dim]{_phase(current)}[/]" if current and not run.over else "",
    )
    rows.append(bar)
    if line := _metric(detail):
        rows.append(line)
    if run.privacy:
        rows.append(plain(run.privacy.text))
    if current and current.assignments and not run.over:
        rows.append(_clients(current.assignments, secure=secure))
    return Group(*rows)


def _phase(current: RoundView) -> str:
    return f"final evaluation: {current.state}" if current.kind == "evaluate" else current.state


def _left(run: RunView, now: datetime) -> str:
    if run.over or not run.round:
        return ""
    left_s = (now - run.created_at).total_seconds() / run.round * (run.rounds - run.round)
    minutes, seconds = divmod(round(left_s), 60)
    return f"[dim]about {minutes // 60}:{minutes % 60:02}:{seconds:02} left[/]"


def _metric(detail: RunDetail) -> str:
    """The first of the recipe's metrics that is known, accuracy before others, over the versions."""
    known = {point.name for point in detail.metrics}
    name = next((n for n in ("accuracy", *detail.run.recipe.metrics) if n in known), "")
    values = [p.value for p in sorted(detail.metrics, key=lambda p: p.version) if p.name == name]
    return f"{name} {values[-1]:.4g}  [cyan]{sparkline(values)}[/]" if values else ""


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """The last `width` values as a row of bars, the lowest and the highest of them at the ends of the scale."""
    shown = values[-width:]
    low, span = min(shown), max(shown) - min(shown)
    return "".join(TICKS[round((v - low) / span * (len(TICKS) - 1)) if span else 0] for v in shown)


def _clients(assignments: Sequence[AssignmentView], *, secure: bool) -> Table:
    from murmur.web.words import assignment

    table = Table.grid(padding=(0, 2))
    for a in assignments[:SHOWN]:
        word, tone = assignment(a, secure=secure)
        colour = TONES.get(tone, "dim")
        part = ProgressBar(total=a.steps, completed=a.step, width=20) if a.phase == "training" and a.steps else ""
        table.add_row(plain(a.client), f"[{colour}]{plain(word)}[/]", part)
    if len(assignments) > SHOWN:
        table.add_row(f"[dim]and {len(assignments) - SHOWN} more[/]", "", "")
    return table
