"""Worlds whose times can be reckoned by hand: three clients, a model of 1 MB, known speeds."""

from __future__ import annotations

import math
from pathlib import Path
from random import Random
from typing import Any

import pytest

from murmur.protocol.errors import OperatorError
from murmur.protocol.recipe import Recipe, parse_recipe
from murmur.simulation.devices import HOUR_S, Device, Devices, draw_devices, parse_windows
from murmur.simulation.schedules import Plan, schedule
from murmur.simulation.stints import Load, Stint, play
from murmur.simulation.timeline import Timeline
from murmur.simulation.world import PRESETS, World, load_world

# 1 MB down at 8 Mbit/s: 1 s; up at 4 Mbit/s: 2 s. 100 examples: 10, 20 and 50 s. In all 13, 23 and 53 s.
SPEEDS = {"a": 10.0, "b": 5.0, "c": 2.0}
LOAD = Load(down_bytes=1_000_000, up_bytes=1_000_000, examples=100, units=5)


def devices(**windows: str) -> Devices:
    always = {name: parse_windows(windows.get(name, "always"), 24) for name in SPEEDS}
    return Devices(
        {
            name: Device(examples_per_s=speed, down_mbit_s=8, up_mbit_s=4, windows=always[name])
            for name, speed in SPEEDS.items()
        }
    )


def recipe(size: int = 3, **values: Any) -> Recipe:
    cohort = {"size": size, "min": 1} | values.pop("cohort", {})
    return parse_recipe({"name": "t", "task": "t", "secure": {"on": False}, "cohort": cohort} | values)


def lived(world: World, told: Recipe, there: Devices, rounds: int = 1) -> tuple[list[Plan], Timeline]:
    planned, timeline = schedule(world, told, there, lambda _: LOAD), Timeline(world=world, devices=there)
    plans = [planned.plan(n, 1) for n in range(1, rounds + 1)]
    for plan in plans:
        timeline.add(plan)
    return plans, timeline


def test_a_synchronous_round_takes_as_long_as_its_slowest_client() -> None:
    plans, timeline = lived(World(), recipe(), devices(), rounds=2)
    assert [(p.begins_s, p.ends_s) for p in plans] == [(0, pytest.approx(53)), (pytest.approx(53), pytest.approx(106))]
    assert plans[0].cohort == ("a", "b", "c")
    assert timeline.seconds == pytest.approx(106)
    assert timeline.bytes == (6_000_000, 6_000_000)
    assert timeline.fairness() == {
        "least": 2, "median": 2, "most": 2, "never": 0, "jain": 1.0, "slowest_quarter": pytest.approx(1 / 3)
    }  # fmt: skip


def test_an_over_selected_round_closes_with_the_fastest_and_hears_nobody_else() -> None:
    """3 asked, 2 needed: at 23 s c has its model and has trained 22 of 50 s."""
    told = recipe(size=2, cohort={"over_select": 1.5})
    (plan, _), timeline = lived(World(), told, devices(), rounds=2)
    assert plan.asked == ("a", "b", "c")
    assert plan.cohort == ("a", "b")
    assert plan.ends_s == pytest.approx(23)
    assert timeline.attempts[0].late == 1
    assert timeline.bytes == (6_000_000, 4_000_000)
    fair = timeline.fairness()
    assert (fair["least"], fair["never"], fair["slowest_quarter"]) == (0, 1, 0.0)
    assert fair["jain"] == pytest.approx(16 / (3 * 8))  # heard 2, 2 and 0 times: 4² over 3 · (4 + 4)


def test_buffered_rounds_follow_by_hand() -> None:
    """Versions of two updates each: a and b make the first two, then c comes, which began two versions ago, and a.

    a: 0-13, waits for version 1 (nobody trains twice from one), 23-36, 46-59; b: 0-23, 23-46; c: 0-53.
    """
    plans, timeline = lived(World.model_validate({"buffered": {"size": 2}}), recipe(), devices(), rounds=3)
    assert [p.ends_s for p in plans] == pytest.approx([23, 46, 59])
    assert [[(t.client, p.staleness(t.version)) for t in p.heard] for p in plans] == [
        [("a", 0), ("b", 0)],
        [("a", 1 - 1), ("b", 0)],
        [("c", 2), ("a", 0)],
    ]
    assert timeline.attempts[2].staleness == 1.0
    assert dict(timeline.heard) == {"a": 3, "b": 2, "c": 1}


def test_an_update_that_is_too_stale_is_refused_and_another_takes_its_place() -> None:
    """As above, but c's is refused at 53 s, and b, at 69 s, ends the third version."""
    plans, timeline = lived(World.model_validate({"buffered": {"size": 2, "most_stale": 1}}), recipe(), devices(), 3)
    assert plans[2].ends_s == pytest.approx(69)
    assert plans[2].cohort == ("a", "b")
    assert timeline.attempts[2].late == 1


def test_a_stale_update_counts_less() -> None:
    buffered = World.model_validate({"buffered": {}}).buffered
    assert buffered is not None
    assert [buffered.discount(s) for s in (0, 3, 8)] == pytest.approx([1, 1 / 2, 1 / 3])  # 1 / sqrt(1 + s)


def test_clients_are_asked_only_while_they_are_there_and_one_that_leaves_is_lost() -> None:
    """The run starts at 12:00, when only a is there; b comes at 13:00. c's hour ends 20 s after 13:00."""
    there = devices(a="12:00-14:00", b="13:00-12:00", c="12:59-13:00")
    (plan,), _ = lived(World(starts_h=12), recipe(), there)
    assert plan.asked == ("a",)
    (plan,), _ = lived(World(starts_h=12), recipe(cohort={"min": 2}), there)
    assert plan.begins_s == pytest.approx(12 * HOUR_S + 59 * 60)  # a and c
    assert plan.ends_s == pytest.approx(12 * HOUR_S + 59 * 60 + 53)
    late = World(starts_h=12 + 59.5 / 60)  # 30 s before c leaves, which needs 53
    (plan,), timeline = lived(late, recipe(cohort={"patience_s": 7}), there)
    assert [t.client for t in plan.stints if t.lost] == ["c"]
    assert plan.ends_s - plan.begins_s == pytest.approx(30 + 7)  # noticed when its patience is over
    assert timeline.attempts[0].lost == 1


def test_a_cohort_that_never_comes_together_is_an_error_with_words() -> None:
    there = devices(a="1:00-2:00", b="2:00-3:00", c="never")
    with pytest.raises(OperatorError, match="never are 2 clients of this world there together"):
        lived(World(), recipe(cohort={"min": 2}), there)


def test_asynchronous_rounds_that_nobody_can_fill_end_with_a_reason() -> None:
    (plan,), _ = lived(World.model_validate({"buffered": {"size": 2}}), recipe(), devices(b="never", c="never"))
    assert plan.reason == "1 of 1 clients delivered, 2 are needed, and no more come"


def test_fewer_than_the_least_cohort_fail_the_attempt() -> None:
    (plan,), timeline = lived(World(deadline_s=20), recipe(cohort={"min": 2}), devices())
    assert plan.reason == "1 of 3 clients delivered, 2 are needed"
    assert plan.ends_s == 20
    assert (timeline.attempts[0].heard, timeline.heard.total()) == (0, 0)
    assert timeline.versions_s == [0.0]


def test_stragglers_are_dropped_by_fedavg_and_kept_by_fedprox() -> None:
    """Two of three get through 1 to 4 of 5 epochs, in the time of 5."""
    world, train = World(stragglers=2 / 3), {"epochs": 5}
    (dropped,), _ = lived(world, recipe(train=train), devices())
    (kept,), timeline = lived(world, recipe(train=train, strategy={"name": "fedprox", "mu": 1}), devices())
    slow = {t.client: t.units for t in kept.stints if t.partial}
    assert len(slow) == 2
    assert all(1 <= units < 5 for units in slow.values())
    assert kept.cohort == ("a", "b", "c")
    assert kept.ends_s == pytest.approx(53)
    assert set(dropped.cohort) == set("abc") - set(slow)
    assert timeline.attempts[0].partial == 2
    fastest = {"a": 13, "b": 23, "c": 53}
    assert dropped.ends_s == pytest.approx(fastest[dropped.cohort[0]])  # nobody waits for what does not count


def test_a_deadline_leaves_a_part_of_the_work_to_slow_clients() -> None:
    """25 s: b's 23 fit; of c's epochs of 10 s, 2 fit into 25 - 3 s, and it delivers at 23."""
    told = recipe(train={"epochs": 5}, strategy={"name": "fedprox", "mu": 1})
    (plan,), _ = lived(World(deadline_s=25), told, devices())
    assert {t.client: t.units for t in plan.heard} == {"a": 5, "b": 5, "c": 2}
    assert plan.ends_s == pytest.approx(23)
    (plan,), _ = lived(World(deadline_s=25), recipe(train={"epochs": 5}), devices())
    assert plan.cohort == ("a", "b")
    assert plan.ends_s == 25


def stint(world: World, seed: int, masked: bool = False) -> Stint:
    return play(
        world, devices()["b"], LOAD, client="b", version=0, begins_s=100.0, draw=Random(seed), masked=masked
    )  # fmt: skip


def test_clients_drop_out_as_often_as_the_world_says_and_send_a_part() -> None:
    stints = [stint(World(dropout=0.3), seed) for seed in range(1000)]  # seeds 0 to 999
    lost = [t for t in stints if t.lost]
    assert len(lost) == pytest.approx(300, abs=45)  # three standard deviations of 14.5
    assert all(100 < t.ends_s < 123 for t in lost)
    in_upload = next(t for t in lost if t.ends_s > 121.5)
    assert in_upload.bytes_at(math.inf) == (1_000_000, round(1e6 * (in_upload.ends_s - 121) / 2))


def test_a_crash_costs_what_came_after_the_checkpoint_and_a_masked_round_its_client() -> None:
    """20 s of training with checkpoints each 4 s; a crash after x s, 30 s to restart, then on from 4 * floor(x / 4)."""
    world = World(crashes_per_h=180, checkpoint_s=4, restart_s=30)
    seed = next(s for s in range(100) if 3 < crash(s) < 20 and _second(s) > 20)
    plain, masked = stint(world, seed), stint(world, seed, masked=True)
    assert plain.uploaded_s == pytest.approx(123 + 30 + crash(seed) % 4)
    assert not plain.lost
    assert masked.lost
    assert masked.ends_s == pytest.approx(101 + crash(seed))


def crash(seed: int, number: int = 0) -> float:
    """Seconds to the first crash: exponential with a mean of 20 s, by the draw's third number."""
    draw = Random(seed)
    numbers = [draw.random() for _ in range(4)]
    return -math.log(1 - numbers[2 + number]) * 20


def _second(seed: int) -> float:
    return crash(seed, 1)


def test_the_same_seed_gives_the_same_world_whoever_else_is_in_it() -> None:
    world = load_world("phones")
    one, two = draw_devices(world, ["a", "b"], 7), draw_devices(world, ["b", "c"], 7)
    assert one["b"] == two["b"]
    assert one["b"] != draw_devices(world, ["b"], 8)["b"]


def test_speeds_lie_around_their_median_as_the_spread_says() -> None:
    world = World.model_validate({"examples_per_s": {"median": 50, "spread": 0.5}})
    logs = sorted(math.log(d.examples_per_s) for d in draw_devices(world, [f"c{k}" for k in range(999)], 0).values())
    assert logs[499] == pytest.approx(math.log(50), abs=0.06)  # 3 * 1.25 * 0.5 / sqrt(999)
    assert logs[840] - logs[499] == pytest.approx(0.5, abs=0.1)  # 84 % lie below median and one deviation


@pytest.mark.parametrize(
    ("text", "hours"),
    [
        ("always", ((0, 24),)),
        ("never", ()),
        ("22:00-06:00", ((22, 8),)),
        ("08:00-12:00 13:30-17:00", ((8, 4), (13.5, 3.5))),
        ("20:00-24:00 0:00-6:00", ((20, 10),)),
        ("6:00-12:00 10:00-6:00", ((0, 24),)),
    ],
)
def test_windows_are_read_and_joined(text: str, hours: Any) -> None:
    assert parse_windows(text, 24) == tuple((b * HOUR_S, length * HOUR_S) for b, length in hours)


def test_a_trace_gives_each_client_its_row_or_lets_it_draw_one(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("client,examples_per_s,online\na,10,always\nb,5,22:00-06:00\n")
    found = draw_devices(World(trace=str(path)), ["a", "b"], 0)
    assert (found["b"].examples_per_s, found["b"].windows) == (5, ((22 * HOUR_S, 8 * HOUR_S),))
    assert found["b"].up_mbit_s == 100  # the world's
    assert found["b"].until(23 * HOUR_S) == pytest.approx(30 * HOUR_S)
    with pytest.raises(OperatorError, match=r"no row for 'c' \(1 of 2 clients"):
        draw_devices(World(trace=str(path)), ["a", "c"], 0)
    path.write_text("examples_per_s\n10\n5\n")
    drawn = [d.examples_per_s for d in draw_devices(World(trace=str(path)), [f"c{k}" for k in range(40)], 0).values()]
    assert set(drawn) == {5, 10}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("client,speed\na,1\n", "speed: a trace has the columns"),
        ("client\n", "no rows"),
        ("examples_per_s\nfast\n", "line 2: examples_per_s is 'fast', not a number"),
        ("examples_per_s\n1\n-1\n", "line 3: examples_per_s = -1: a finite number above 0"),
        ("client\na\na\n", "line 3: client 'a' stands there twice"),
        ("online\nmornings\n", "line 2: online is 'mornings'; it takes always"),
        ("online\n20:00-30:00\n", "leaves the 24 hours"),
    ],
)
def test_a_broken_trace_is_refused_by_its_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "trace.csv").write_text(text)
    with pytest.raises(OperatorError, match=said):
        draw_devices(World(trace=str(tmp_path / "trace.csv")), ["a"], 0)


def test_a_world_is_a_preset_a_file_or_values_with_changes(tmp_path: Path) -> None:
    for name in PRESETS:
        assert load_world(name).dropout == PRESETS[name]["dropout"]
    (tmp_path / "w.toml").write_text('like = "phones"\ndropout = 0.5\ntrace = "t.csv"\n[online]\nhours = 3\n')
    world = load_world(tmp_path / "w.toml", {"buffered__size": 4})
    assert (world.dropout, world.online.hours, world.online.begins_h) == (0.5, 3, 22)
    assert world.trace == str(tmp_path / "t.csv")
    assert world.buffered is not None
    assert world.buffered.size == 4
    assert load_world(world) == world


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("mars", "there is no world 'mars': name one of hospitals, laptops, phones"),
        ("no/such.toml", "cannot read the world no/such.toml"),
        ({"like": "mars"}, "no world 'mars' to be like"),
        ({"dropuot": 0.1}, "dropuot: there is no such key; 'dropout' is near"),
        ({"dropout": 2}, "dropout: Input should be less than 1"),
        ({"buffered": {}, "deadline_s": 5}, "asynchronous rounds wait for nobody"),
    ],
)
def test_a_world_that_cannot_be_is_refused(given: Any, said: str) -> None:
    with pytest.raises(OperatorError, match=said):
        load_world(given)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"secure": {"on": True}, "cohort": {"min": 3}}, "in a masked sum all begin from one version"),
        ({"strategy": {"combine": "median"}}, 'combine = "median" compares'),
        ({"strategy": {"name": "fednova"}}, "use fedavg or fedprox"),
        (
            {"strategy": {"weighting": "uniform"}, "dp": {"mode": "central"}},
            "reckons its noise for one cohort",
        ),
    ],
)
def test_asynchronous_rounds_refuse_what_belongs_to_a_cohort(values: dict[str, Any], said: str) -> None:
    with pytest.raises(OperatorError, match=said):
        lived(World.model_validate({"buffered": {"size": 2}}), recipe(**values), devices())


def test_stragglers_of_one_epoch_have_no_part_to_give() -> None:
    with pytest.raises(OperatorError, match=r"set train\.epochs"):
        lived(World(stragglers=0.5), recipe(strategy={"name": "fedprox", "mu": 1}), devices())


def test_more_updates_than_clients_make_no_version() -> None:
    with pytest.raises(OperatorError, match=r"world.buffered.size = 4 .* federation has 3"):
        lived(World.model_validate({"buffered": {"size": 4}}), recipe(), devices())
