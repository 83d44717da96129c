"""How a version serves each client, from their own reports; nothing where updates are masked."""

from __future__ import annotations

from datetime import UTC, datetime
from xml.etree import ElementTree

from murmur.protocol.recipe import Recipe
from murmur.protocol.views import RunDetail, RunView, SiteReport
from murmur.web.fairness import fairness

AT = datetime(2026, 3, 2, 9, tzinfo=UTC)


def detail(*reports: tuple[str, float, dict[str, float]]) -> RunDetail:
    recipe = Recipe.model_validate({"name": "r", "task": "t", "secure": {"on": False}})
    run = RunView.model_validate(
        {"id": "r", "name": "r", "state": "running", "recipe": recipe, "round": 3, "rounds": 9, "version": 3}
        | {"created_at": AT, "finished_at": None}
    )
    found = [SiteReport(client=c, version=2, weight=w, metrics=m) for c, w, m in reports]
    return RunDetail(run=run, current=None, reports=tuple(found))


def test_the_worst_the_best_the_gap_and_the_largest_site():
    found = fairness(
        detail(
            ("a", 60, {"accuracy": 0.9, "loss": 0.1}),
            ("<b>", 30, {"accuracy": 0.5, "loss": 0.7}),
            ("c", 10, {"accuracy": 0.7, "loss": 0.3}),
        )
    )
    assert found is not None
    assert (found.metric, found.version, found.worst, found.best) == ("accuracy", 2, ("<b>", 0.5), ("a", 0.9))
    assert abs(found.gap - 0.4) < 1e-12 and found.largest == ("a", 0.6) and found.one_is_half
    picture = ElementTree.fromstring(found.strip)
    dots = [(float(c.attrib["cx"]), c[0].text) for c in picture.iter("circle")]
    # The ends are 8 from the edges of 320, and the middle lies in the middle.
    assert dots == [(8.0, "<b>: 0.500"), (160.0, "c: 0.700"), (312.0, "a: 0.900")]


def test_of_losses_the_highest_is_the_worst_and_equal_weights_name_nobody():
    found = fairness(detail(("a", 1, {"loss": 0.1}), ("b", 1, {"loss": 0.7})))
    assert found is not None and found.worst == ("b", 0.7) and found.largest is None and not found.one_is_half


def test_one_client_or_none_or_a_value_that_is_no_number_is_no_comparison():
    assert fairness(detail()) is None
    assert fairness(detail(("a", 1, {"accuracy": 0.5}))) is None
    assert fairness(detail(("a", 1, {"accuracy": 0.5}), ("b", 1, {}))) is None
    assert fairness(detail(("a", 1, {"accuracy": 0.5}), ("b", 1, {"accuracy": float("nan")}))) is None
