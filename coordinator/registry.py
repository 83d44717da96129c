"""Where versions come from, put together from the rows, and the card that says so."""

from __future__ import annotations

from ..protocol.errors import NotFound
from ..protocol.registry import LineageView
from ..protocol.views import PrivacyView, RunDetail, VersionView
from .store import Store


def named(store: Store, versions: list[VersionView]) -> list[VersionView]:
    """The versions with the aliases that point at them."""
    names: dict[tuple[str, int], tuple[str, ...]] = {}
    for a in store.registry.aliases():
        key = (a.version.run, a.version.n)
        names[key] = (*names.get(key, ()), a.alias)
    return [v.model_copy(update={"aliases": names[key]}) if (key := (v.run, v.n)) in names else v for v in versions]


def lineage(store: Store, run: str, n: int) -> LineageView:
    """All that is known of where a version comes from; raises NotFound."""
    detail = store.runs.detail(run)
    versions = named(store, store.runs.versions(run))
    version = next((v for v in versions if v.n == n), None)
    if version is None:
        raise NotFound(f"the run {run!r} has no version {n}")
    origin = store.registry.origin(run, n)
    return LineageView(
        version=version,
        run=detail.run,
        aliases=version.aliases,
        contributors=len({name for v in versions if v.n <= n for name in v.who}),
        code=origin.code,
        recipe=origin.recipe,
        manifest=origin.manifest,
        origin=origin.version,
        metrics=tuple(m for m in detail.metrics if m.version == n),
        privacy=_privacy(store, detail, n),
    )


def _privacy(store: Store, detail: RunDetail, n: int) -> PrivacyView | None:
    """What the run had spent when its version n was made: as it was told then, or its total where n is the last."""
    total = detail.run.privacy
    if total is None or not n:
        return None
    if n == detail.run.version and detail.run.over:
        return total
    told = store.registry.spent(detail.run.id, n)
    return PrivacyView.model_validate(total.model_dump() | told) if told else None
