"""The card of a model version: Markdown with a YAML head, as model hubs read it. No name of a client is in it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from ..protocol.errors import OperatorError
from ..protocol.recipe import Recipe
from ..protocol.registry import LineageView
from . import words

UNKNOWN = "unknown"  # the identifier that model hubs have for a licence that nobody has stated
MOST_LICENCE = 64


def model_card(lineage: LineageView, *, licence: str = "") -> str:
    """The card of a version, from what the coordinator knows of it.

    licence: an identifier such as apache-2.0, of whoever releases the model; nothing else states one. Raises
    OperatorError for what is no identifier.
    """
    if licence and (len(licence) > MOST_LICENCE or not licence.replace("-", "").replace(".", "").isalnum()):
        raise OperatorError(f"{licence[:80]!r} is no identifier of a licence: give one such as apache-2.0")
    parts = (_head(lineage, licence), _what(lineage), _lineage(lineage), _metrics(lineage), _privacy(lineage))
    return "\n".join([*(line for part in parts for line in part), *_limits(lineage), *_licence(licence)]) + "\n"


def _head(of: LineageView, licence: str) -> Iterator[str]:
    v = of.version
    facts: dict[str, Any] = {
        "model": of.run.name,
        "task": of.run.recipe.task,
        "run": v.run,
        "version": v.n,
        "sha256": v.sha256,
        "parent": v.parent,
        "contributors": of.contributors,
        "recipe_sha256": of.recipe,
        "code_sha256": of.code or None,
    }
    yield "---"
    yield f"license: {licence or UNKNOWN}"
    yield f"model_name: {json.dumps(of.run.name)}"
    yield "tags: [federated-learning, murmur]"
    yield "murmur:"
    yield from (f"  {name}: {json.dumps(value)}" for name, value in facts.items() if value is not None)
    yield "---"
    yield ""


def _what(of: LineageView) -> Iterator[str]:
    v, r = of.version, of.run.recipe
    yield f"# {of.run.name}, version {v.n}"
    yield ""
    if not v.n:
        yield f"The model that a run of the task `{r.task}` started from. No organization's data is in it."
    else:
        who = words.many(of.contributors, "organization")
        yield (
            f"A model for the task `{r.task}`, trained by federated learning: {who} trained on data of their own, "
            f"which stayed where it is, and what they learned was combined. It came out of round {v.n} of {r.rounds}."
        )
    if of.aliases:
        yield ""
        yield f"When this card was written, {_listed(of.aliases)} pointed at this version."
    yield ""


def _lineage(of: LineageView) -> Iterator[str]:
    v, r = of.version, of.run.recipe
    yield "## Lineage"
    yield ""
    rows: list[tuple[str, str]] = [
        ("version", f"{v.n} of the run `{v.run}`"),
        ("SHA-256", f"`{v.sha256}`"),
        ("made from", f"`{v.parent}`" if v.parent else _start(of)),
        ("made", f"{words.date(v.created_at)} UTC"),
    ]
    if v.n:
        asked = v.contributors + len(v.missing)
        rows += [
            (
                "contributors",
                f"{of.contributors} in all rounds up to this one; in this one {v.contributors} of {asked} asked",
            ),
            ("local training", _training(r)),
            ("updates", _updates(r)),
        ]
        if of.origin:
            rows.append(("the run started from", f"`{of.origin}`"))
    rows += [
        ("recipe", f"SHA-256 `{of.recipe}`"),
        ("code", _code(of)),
    ]
    if of.manifest:
        rows.append(("manifest of the round", f"SHA-256 `{of.manifest}`, checked by `murmur audit verify`"))
    yield from _table(("", ""), rows)


def _start(of: LineageView) -> str:
    return f"`{of.origin}`, a version of another run" if of.origin else "nothing: it is what the run started from"


def _training(r: Recipe) -> str:
    how = f"{r.train.steps:,} steps" if r.train.steps else words.many(r.train.epochs, "epoch")
    return f"{r.strategy.name}, {how} a round, {r.train.optimizer} at {r.train.lr:g}, batches of {r.train.batch_size}"


def _updates(r: Recipe) -> str:
    if not r.secure.on:
        return "plain: the coordinator could read each one"
    if r.secure.groups:
        return f"masked: the coordinator could read the sums of {r.secure.groups} groups"
    return "masked: the coordinator could read their sum"


def _code(of: LineageView) -> str:
    if not of.code:
        return "not known; each organization trained with the task that it has installed"
    return (
        f"SHA-256 `{of.code}` of the task's file with which the run was started; each organization trained with the "
        "task that it has installed, which the coordinator does not see"
    )


def _metrics(of: LineageView) -> Iterator[str]:
    yield "## Metrics"
    yield ""
    if of.metrics:
        yield from _table(
            ("metric", "value", "examples"),
            [(m.name, words.number(m.value), f"{m.count:,.0f}") for m in sorted(of.metrics, key=lambda m: m.name)],
        )
        yield (
            "Reported by the organizations themselves, each on the data it kept for testing; the mean over all "
            "their examples together. Nobody has checked them."
        )
    else:
        yield "None were reported for this version."
    yield ""
    yield (
        "Fairness: no figures for single organizations or groups of people are known here. A mean can hide that the "
        "model is worse for some of them: each organization should measure that on its own data."
    )
    yield ""


def _privacy(of: LineageView) -> Iterator[str]:
    dp = of.run.recipe.dp
    yield "## Privacy"
    yield ""
    if of.privacy:
        yield f"Differential privacy: {of.privacy.text}, after {words.many(of.privacy.spent, 'sum')}."
        if of.privacy.meaning:
            yield of.privacy.meaning
        yield ""
        yield "Assumed:"
        yield ""
        yield from (f"- {line}" for line in of.privacy.assumptions)
        if of.run.privacy and of.run.privacy != of.privacy:
            yield ""
            yield f"Whoever sees the run's later versions as well has: {of.run.privacy.text}."
    elif not of.version.n:
        yield "Nothing was spent: nobody's data is in it."
    elif dp.mode == "local":
        yield (
            "Each organization added noise while it trained (DP-SGD). What that comes to is in the ledger of each, "
            "which the coordinator does not see."
        )
    elif dp.mode == "off":
        yield "No differential privacy: nothing bounds what the model tells of the data that it was trained on."
    else:
        yield "The run adds noise; what it comes to at this version is not known."
    if of.origin:
        yield ""
        yield f"What {of.origin} had spent before is not part of this."
    yield ""


def _limits(of: LineageView) -> Iterator[str]:
    yield "## Limits"
    yield ""
    if of.version.n and not of.run.over:
        yield "- The run had not ended when this card was written."
    if of.run.state in ("failed", "stopped"):
        yield f"- The run was not brought to its end: it {'failed' if of.run.state == 'failed' else 'was stopped'}."
    if gone := len(of.version.missing):
        yield f"- {words.many(gone, 'organization')} asked for this round {'is' if gone == 1 else 'are'} not in it."
    yield "- It was measured on data of the organizations that trained it. What it does elsewhere is not known."
    yield "- For what it may be used, and for what not, is stated by whoever releases it, not here."
    yield ""


def _licence(licence: str) -> Iterator[str]:
    yield "## Licence"
    yield ""
    yield licence or "Not stated. Whoever releases the model states it; until then nobody else may use it."


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)
    yield ""
