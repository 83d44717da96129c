"""What happened in a simulated world, for the command line."""

from __future__ import annotations

from murmur.output import out, print_table
from murmur.simulation.timeline import Timeline
from murmur.web.words import many, size, took

SHOWN = 20  # attempts in the table; of more, evenly from the first to the last


def show_world(timeline: Timeline) -> None:
    """A table of the attempts, then time, bytes and who was heard."""
    attempts = timeline.attempts
    stale, partial = any(a.staleness for a in attempts), any(a.partial for a in attempts)
    names = ["round", "after", "took", "asked", "heard", *(["partial"] if partial else ()), "lost", "late"]
    names += ["stale"] if stale else []
    rows = [
        (
            a.n if a.attempt == 1 else f"{a.n}, attempt {a.attempt}",
            took(a.ends_s),
            took(a.ends_s - a.begins_s),
            a.asked,
            a.heard,
            *((a.partial,) if partial else ()),
            a.lost,
            a.late,
            *((a.staleness,) if stale else ()),
            size(a.down_bytes),
            size(a.up_bytes),
        )
        for a in attempts
    ]
    if len(rows) > SHOWN:
        rows = [rows[round(i * (len(rows) - 1) / (SHOWN - 1))] for i in range(SHOWN)]
    print_table("In the world", (*names, "down", "up"), rows)
    down, up = timeline.bytes
    out.print(f"{took(timeline.seconds)} in the world, {size(down)} to the clients, {size(up)} from them")
    fair = timeline.fairness()
    never = f", {many(int(fair['never']), 'client')} never" if fair["never"] else ""
    least, most = int(fair["least"]), int(fair["most"])
    times = (
        f"{many(most, 'time')} each" if least == most else f"{least} to {most} times, {fair['median']:g} at the median"
    )
    out.print(
        f"Clients were heard {times}{never}; Jain's index {fair['jain']:.2f}; the slowest quarter gave "
        f"{fair['slowest_quarter']:.0%} of the updates",
        soft_wrap=True,
    )
