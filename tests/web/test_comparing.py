"""Runs side by side: where each was for what cost, in what their recipes differ; and the list's filter."""

from __future__ import annotations

import math
import re

import pytest
from fastapi.testclient import TestClient

from murmur.protocol.recipe import Recipe
from murmur.protocol.views import RunDetail
from murmur.web import comparing, svg

from .fakes import FakeConsole, demo

BOTH = "/runs/compare?id=heart-disease&id=heart-pilot"


def of(console: FakeConsole, *ids: str) -> list[comparing.Compared]:
    return comparing.compared([console.run(i) for i in ids], [console.versions(i) for i in ids])


def with_accuracy(console: FakeConsole, id: str, *values: float) -> None:
    detail = console.details[id]
    point = detail.metrics[0]
    points = [point.model_copy(update={"version": n, "name": "accuracy", "value": v}) for n, v in enumerate(values, 1)]
    console.details[id] = detail.model_copy(update={"metrics": tuple(points)})


def with_recipe(detail: RunDetail, **changes: object) -> RunDetail:
    values = detail.run.recipe.model_dump(mode="json") | changes
    return detail.model_copy(update={"run": detail.run.model_copy(update={"recipe": Recipe.model_validate(values)})})


def test_a_version_has_cost_every_model_and_update_until_then() -> None:
    console = demo()
    first, second = of(console, "heart-pilot")[0].points["accuracy"][:2]
    # four clients fetched 18,432 bytes each and sent 73,912
    assert first.bytes == 4 * (18_432 + 73_912)
    assert second.bytes == 2 * first.bytes
    closed = console.run("heart-pilot").rounds[0].closed_at
    assert closed is not None
    assert first.seconds == (closed - console.run("heart-pilot").run.created_at).total_seconds()


def test_the_cost_is_told_at_the_best_that_all_have_reached() -> None:
    console = demo()
    with_accuracy(console, "heart-pilot", 0.5, 0.7, 0.6)
    with_accuracy(console, "heart-disease", 0.65, 0.72, 0.9)
    found = comparing.costs(of(console, "heart-pilot", "heart-disease"), "accuracy")
    assert found is not None
    target, rows = found
    assert target == 0.7
    assert [(c.best, c.first and c.first.version) for c in rows] == [(0.7, 2), (0.9, 2)]


def test_a_loss_is_better_the_lower_it_is() -> None:
    console = demo()
    target, rows = comparing.costs(of(console, "heart-pilot", "heart-disease"), "loss") or (math.nan, [])
    losses = {id: [m.value for m in console.run(id).metrics if m.name == "loss"] for id in console.details}
    assert target == max(min(losses["heart-pilot"]), min(losses["heart-disease"]))
    assert all(c.first is not None and c.first.value <= target for c in rows)


def test_what_no_run_has_measured_has_no_cost() -> None:
    console = demo()
    assert comparing.costs(of(console, "heart-pilot"), "f1") is None
    with_accuracy(console, "heart-pilot")
    rows = (comparing.costs(of(console, "heart-pilot", "heart-disease"), "accuracy") or (0, []))[1]
    assert math.isnan(rows[0].best) and rows[0].first is None


def test_only_settings_that_differ_are_listed() -> None:
    console = demo()
    console.details["heart-pilot"] = with_recipe(
        console.details["heart-disease"], name="x", seed=8, train={"epochs": 2, "batch_size": 32, "lr": 0.1}
    )
    found = comparing.differing(of(console, "heart-disease", "heart-pilot"))
    assert found == [("seed", ["7", "8"]), ("train.lr", ["0.05", "0.1"])]


def test_a_logarithmic_axis_leaves_out_what_is_not_positive() -> None:
    points = [svg.Point(x=float(i), y=y) for i, y in enumerate((100.0, 10.0, 0.0, 1.0))]
    picture = str(svg.line([svg.Series(name="s", points=points)], label="l", x_range=(0, 3), log=True))
    ticks = re.findall(r'text-anchor="end" font-size="11">([^<]+)<', picture)
    assert ticks == ["1", "2", "5", "10", "20", "50", "100"]
    assert picture.count("M") == 4  # two pieces of line, each with its area
    heights = [float(y) for y in re.findall(r'<circle cx="[\d.]+%" cy="([\d.]+)" r="4"', picture)]
    assert heights[2] - heights[1] == pytest.approx(heights[1] - heights[0], abs=0.1)  # 1, 10 and 100 are as far apart


def test_a_logarithmic_axis_over_little_has_round_numbers() -> None:
    assert [round(10**tick, 6) for tick in svg.log_ticks(-0.37, -0.16)] == [0.45, 0.5, 0.55, 0.6, 0.65]


def test_of_several_lines_each_point_is_pointed_at_for_itself(admin: TestClient) -> None:
    page = admin.get(BOTH).text
    assert page.count('<rect class="hit"') == 0 and page.count('<circle class="hit"') > 20
    assert "heart-pilot, version 12:" in page and "heart-disease, version 17:" in page


def test_runs_are_compared_over_versions_seconds_and_bytes(viewer: TestClient) -> None:
    assert "2 runs over versions" in viewer.get(BOTH).text
    assert "2 runs over seconds" in viewer.get(f"{BOTH}&by=seconds").text
    assert " MB<" in viewer.get(f"{BOTH}&by=bytes&scale=log").text
    assert "secure.on" in viewer.get(BOTH).text
    assert viewer.get(f"{BOTH}&by=wish").status_code == 422
    assert viewer.get("/runs/compare?id=nothing").status_code == 404


def test_the_list_to_compare_from_needs_no_run_and_takes_four(admin: TestClient, console: FakeConsole) -> None:
    assert 'type="checkbox"' in admin.get("/runs/compare").text
    for n in range(3):
        console.add_run(f"more-{n}", 2)
    page = admin.get("/runs/compare?" + "&".join(f"id={id}" for id in console.details)).text
    assert page.count(" checked>") == 4 and "the first 4 are shown" in page


def test_the_list_is_filtered_by_name_state_and_task(viewer: TestClient) -> None:
    def shown(query: str) -> list[str]:
        return re.findall(r'<th scope="row"><a href="/runs/([^"]+)"', viewer.get(f"/runs?{query}").text)

    assert len(shown("")) == 3
    assert shown("name=Pilot") == ["heart-pilot"]
    assert shown("state=failed&task=heart-disease") == ["heart-first-try"]
    assert shown("name=pilot&state=failed") == []
    assert "data-live" in viewer.get("/runs").text and "data-live" not in viewer.get("/runs?state=failed").text


def test_the_scale_of_a_runs_charts_is_chosen_and_stays_live(viewer: TestClient) -> None:
    assert "/live?page=run&amp;run=heart-disease" in viewer.get("/runs/heart-disease").text
    page = viewer.get("/runs/heart-disease?scale=log").text
    assert "/live?page=run-log&amp;run=heart-disease" in page
    assert '<a href="?scale=log" aria-current="true">' in page
