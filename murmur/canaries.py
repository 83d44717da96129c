"""`murmur audit privacy`: what canaries prove about a run's epsilon, beside the epsilon that was accounted for it."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from murmur.output import out, print_json, print_table
from murmur.protocol.errors import OperatorError
from murmur.protocol.recipe import changed, load_recipe, parse_recipe

if TYPE_CHECKING:
    from murmur.simulation.auditing import Audit, Unit

DELTA = 1e-5
UNITS = {"example": "one example of one client", "client": "one client's whole participation"}
ASSUMPTIONS = (
    "a canary in or out is what the accounted epsilon is about: the same unit, added or removed",
    "whoever guesses sees the final model and knows the canaries, not the coins",
    "no other run showed these coins; a bound of 0 proves nothing",
)


def audit_privacy(
    target: str,
    *,
    unit: Unit,
    canaries: int,
    examples: int,
    clients: int,
    rounds: int | None,
    seed: int,
    delta: float | None,
    confidence: float,
    accounted: str | None,
    secure: bool,
    options: dict[str, Any],
    changes: dict[str, Any],
    as_json: bool,
) -> bool:
    """Audit and print; False when the bound refutes the accounted epsilon.

    accounted: a number, or a JSON file with "epsilon" and "delta"; the audit then takes that delta.
    """
    claim, claimed_delta = read_claim(accounted) if accounted else (None, None)
    if delta is not None and claimed_delta is not None and delta != claimed_delta:
        raise OperatorError(f"--delta {delta:g}, but the accounted epsilon is for delta = {claimed_delta:g}")
    from murmur.simulation.auditing import audit_run

    path, unnamed = Path(target) / "recipe.toml", {"name": "audit", "task": "audit"}
    recipe = load_recipe(path, **changes) if path.exists() else parse_recipe(changed(unnamed, changes))
    with out.status("auditing: one run with canaries") if out.is_terminal and not as_json else nullcontext():
        found = audit_run(
            target,
            recipe,
            unit=unit,
            canaries=canaries,
            examples=examples,
            clients=clients,
            rounds=rounds,
            seed=seed,
            delta=next(d for d in (delta, claimed_delta, DELTA) if d is not None),
            confidence=confidence,
            secure=secure,
            options=options,
        )
    holds = claim is None or found.finding.epsilon <= claim
    if as_json:
        print_json(_json(found, claim, holds))
    else:
        _show(found, claim)
    return holds


def read_claim(given: str) -> tuple[float, float | None]:
    """The accounted epsilon, and its delta where a file tells it; raises OperatorError for anything else."""
    try:
        return _epsilon(float(given), given), None
    except ValueError:
        pass
    try:
        values = json.loads(Path(given).read_text())
        return _epsilon(float(values["epsilon"]), given), float(values["delta"])
    except (OSError, ValueError, TypeError, KeyError):
        raise OperatorError(
            f'{given!r} is neither a number nor a JSON file such as {{"epsilon": 3.2, "delta": 1e-5}}'
        ) from None


def _epsilon(value: float, given: str) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise OperatorError(f"{given}: an epsilon is a finite number and not below 0")
    return value


def _json(found: Audit, claim: float | None, holds: bool) -> dict[str, Any]:
    f = found.finding
    return {
        "unit": UNITS[found.unit], "canaries": f.canaries, "included": found.included, "guesses": f.guesses,
        "correct": f.correct, "tries": f.tries, "epsilon_at_least": f.epsilon, "delta": f.delta,
        "confidence": f.confidence, "epsilon_accounted": claim, "holds": holds, "assumptions": list(ASSUMPTIONS),
    }  # fmt: skip


def _show(found: Audit, claim: float | None) -> None:
    f = found.finding
    rows = (
        ("epsilon, accounted", "none given" if claim is None else f"{claim:g}"),
        ("epsilon, at least", f"{f.epsilon:.3f}"),
        ("delta", f"{f.delta:g}"),
        ("confidence", f"{f.confidence:g}, the best of {f.tries} numbers of guesses included"),
        ("unit", UNITS[found.unit]),
        ("canaries", f"{f.canaries}, {found.included} of them in the run by fair coins"),
        ("guesses", f"{f.correct} of {f.guesses} right"),
    )
    print_table("Privacy of one run", ("", ""), rows)
    if claim is not None and f.epsilon > claim:
        out.print("[bold red]The accounted epsilon does not hold[/], or one of these does not:", soft_wrap=True)
    elif claim is None and found.history.recipe.dp.mode == "off":
        out.print("No differential privacy: no epsilon is claimed, and none holds. This rests on:", soft_wrap=True)
    else:
        out.print("An audit refutes or does not refute; it never proves that a run is private. It rests on:",
                  soft_wrap=True)  # fmt: skip
    for line in ASSUMPTIONS:
        out.print(f"  - {line}", soft_wrap=True)
    out.print("Steinke, Nasr and Jagielski 2023, arXiv:2305.08846, corollary 5.4", style="dim", soft_wrap=True)
