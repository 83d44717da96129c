"""The pages of a simulated run: what they leave out, and what they say where a real run has something else."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.testclient import TestClient

from murmur.protocol.views import SimulationView, WorldRound
from murmur.web.comparing import compared
from murmur.web.worlds import world

from .fakes import FakeConsole

RUN = "heart-pilot"
VIRTUAL = SimulationView(clients=4, backend="vectorized", secure="off")


def simulated(console: FakeConsole, run: str) -> None:
    detail = console.details[run]
    view = detail.run.model_copy(update={"simulation": VIRTUAL})
    console.details[run] = detail.model_copy(update={"run": view})


def test_a_virtual_client_s_name_is_no_link(console: FakeConsole, admin: TestClient) -> None:
    pages = [f"/runs/{RUN}", f"/runs/{RUN}/rounds/8", f"/runs/{RUN}/versions/8"]
    names = console.details[RUN].rounds[-1].assignments
    for linked in (True, False):
        for page in pages:
            html = admin.get(page).text
            assert any(a.client in html for a in names)
            assert ("/clients/" in html) == linked, page
        simulated(console, RUN)


def test_one_that_nobody_carries_out_is_interrupted_and_says_how_it_goes_on(
    console: FakeConsole, admin: TestClient
) -> None:
    simulated(console, "heart-disease")
    why = "interrupted (its process was killed): murmur simulate --resume heart-disease goes on"
    console.hold("heart-disease", why, "ada")
    for page in ("/", "/runs", "/runs/heart-disease"):
        html = admin.get(page).text
        assert "Interrupted</span>" in html and why[1:] in html, page
    assert f"Simulation {why}" in admin.get("/runs/heart-disease").text  # in its log
    assert "Clients may deliver" not in html
    link = '<a href="/runs/heart-disease">'
    assert link in admin.get("/runs?state=interrupted").text and link not in admin.get("/runs?state=paused").text
    admin.cookies.set("murmur-language", "zh-Hans")
    assert "已中断（其进程被终止）：murmur simulate --resume heart-disease 可继续" in admin.get("/runs").text


def lived(n: int) -> dict[str, Any]:
    """Round n of the demo in a world: 100 s each, one megabyte to the clients, half of one from them."""
    return {"world": WorldRound(begins_s=100.0 * (n - 1), ends_s=100.0 * n, down_bytes=10**6, up_bytes=5 * 10**5)}


def test_a_world_s_clock_takes_the_place_of_ours(console: FakeConsole, admin: TestClient) -> None:
    simulated(console, RUN)
    detail = console.details[RUN]
    rounds = tuple(r.model_copy(update=lived(r.n)) if r.kind == "train" else r for r in detail.rounds)
    console.details[RUN] = detail.model_copy(update={"rounds": rounds})
    found = world(console.details[RUN])
    assert found is not None
    assert (found.seconds, found.down_bytes, found.up_bytes, found.never) == (1200, 12 * 10**6, 6 * 10**6, 0)
    assert found.jain == pytest.approx(47**2 / (4 * (3 * 12**2 + 11**2)))  # va was lost once in twelve rounds
    html = admin.get(f"/runs/{RUN}").text
    assert "Timeline of round 12 in the world" in html and "12.0 MB to the clients, 6.0 MB from them" in html
    assert "Took in the world" in html and "until 20 min" in html
    assert "after 3 min 20 s" in html  # version 2, on the chart
    page = admin.get(f"/runs/{RUN}/rounds/8").text
    assert "took 1 min 40 s in the world, until 13 min 20 s of the run" in page
    (run,) = compared([console.details[RUN]], [console.versions(RUN)])
    assert (run.seconds, run.bytes) == (1200, 18 * 10**6)
    assert world(detail) is None
