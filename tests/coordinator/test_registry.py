"""Aliases of versions: what they point at, every move of them, and that nothing takes away what they name."""

import time

import pytest
from sqlalchemy import delete, insert
from sqlalchemy.exc import IntegrityError

from murmur.coordinator import registry
from murmur.coordinator.store import tables
from murmur.protocol.errors import Conflict, NotFound
from murmur.protocol.registry import VersionRef

from .harness import Agent, World, plain_round
from .test_store import at_once


@pytest.fixture
def run(world: World) -> str:
    """A run named t with versions 0, 1 and 2, as rows and blobs: no round was played."""
    run = world.start(rounds=2, secure={"on": False})
    with world.store.db.write() as t:
        for n in (1, 2):
            with world.blobs.new() as path:
                path.write_bytes(b"version %d" % n)
                sha256 = world.blobs.adopt(path)
            row = {"run": run, "n": n, "sha256": sha256, "bytes": 9, "contributors": [], "created_at": world.now + n}
            t.execute(insert(tables.version).values(**row))
    return run


def points(world: World, alias: str = "production") -> str:
    return str(next(a.version for a in world.store.registry.aliases("t") if a.alias == alias))


def test_an_alias_goes_back_through_all_that_it_pointed_at(world: World, run: str):
    aliases = world.store.registry
    for n in (0, 1, 2):
        world.now += 1
        aliases.promote(run, n, "production", by="ada")
    seen: list[str] = []
    for _ in range(2):
        world.now += 1
        aliases.rollback("t", "production", by="bob")
        seen.append(points(world))
    assert seen == ["run0@1", "run0@0"]
    with pytest.raises(Conflict, match="pointed at nothing before run0@0"):
        aliases.rollback("t", "production", by="bob")
    told = [(a.n, a.action, str(a.version), str(a.before), a.by) for a in aliases.history("t")]
    assert told == [
        (5, "rolled_back", "run0@0", "None", "bob"),
        (4, "rolled_back", "run0@1", "run0@0", "bob"),
        (3, "promoted", "run0@2", "run0@1", "ada"),
        (2, "promoted", "run0@1", "run0@0", "ada"),
        (1, "promoted", "run0@0", "None", "ada"),
    ]


def test_a_promotion_after_a_rollback_goes_back_to_where_the_rollback_led(world: World, run: str):
    aliases = world.store.registry
    for n in (0, 1):
        aliases.promote(run, n, "production", by="ada")
    aliases.rollback("t", "production", by="ada")  # to 0
    aliases.promote(run, 2, "production", by="ada")
    aliases.rollback("t", "production", by="ada")
    assert points(world) == "run0@0"  # not to 1, which was taken back


def test_promoting_what_an_alias_points_at_changes_nothing(world: World, run: str):
    for _ in range(2):
        world.store.registry.promote(run, 1, "production", by="ada")
    assert [a.n for a in world.store.registry.history("t")] == [1]


def test_each_move_is_an_event_of_the_run_it_points_at(world: World, run: str):
    world.store.registry.promote(run, 1, "production", by="ada")
    world.store.registry.promote(run, 2, "production", by="ada")
    world.store.registry.rollback("t", "production", by="bob")
    told = [e.data for e in world.store.events.since(0, run) if e.kind == "alias"]
    common = {"model": "t", "alias": "production"}
    assert told == [
        common | {"state": "promoted", "version": 1, "by": "ada"},
        common | {"state": "promoted", "version": 2, "by": "ada"},
        common | {"state": "rolled_back", "version": 1, "by": "bob"},
    ]


def test_runs_of_one_name_share_aliases_and_a_rollback_crosses_them(world: World, run: str):
    other = world.start()
    world.store.registry.promote(run, 2, "production", by="ada")
    world.store.registry.promote(other, 0, "production", by="ada")
    world.store.registry.promote(other, 0, "staging", by="ada")
    assert (points(world), points(world, "staging")) == ("run1@0", "run1@0")
    versions = registry.named(world.store, world.store.runs.versions())
    assert [(v.run, v.n, v.aliases) for v in versions if v.aliases] == [("run1", 0, ("production", "staging"))]
    world.store.registry.rollback("t", "production", by="ada")
    assert points(world) == "run0@2"


def test_a_rollback_of_what_somebody_else_has_moved_is_refused(world: World, run: str):
    for n in (0, 1, 2):
        world.store.registry.promote(run, n, "production", by="ada")
    world.store.registry.rollback("t", "production", by="bob", seen=3)
    with pytest.raises(Conflict, match="moved meanwhile, by bob to run0@1"):
        world.store.registry.rollback("t", "production", by="ada", seen=3)  # the same button, pressed twice
    assert points(world) == "run0@1"


def test_one_of_two_who_roll_back_at_once_finds_it_done(world: World, run: str):
    for n in (0, 1, 2):
        world.store.registry.promote(run, n, "production", by="ada")
    found = at_once(8, lambda: world.store.registry.rollback("t", "production", by="ada", seen=3))
    assert sorted(map(str, found)) == sorted(["None"] + [str(Conflict)] * 7)
    assert points(world) == "run0@1"


def test_what_is_not_there_is_not_found(world: World, run: str):
    with pytest.raises(NotFound, match="no version 9"):
        world.store.registry.promote(run, 9, "production", by="ada")
    with pytest.raises(NotFound, match="no alias 'production'"):
        world.store.registry.rollback("t", "production", by="ada")
    with pytest.raises(NotFound, match="no run is named 'u'"):
        world.store.registry.history("u")
    assert world.store.registry.history("t") == []


def test_what_an_alias_names_or_may_go_back_to_is_never_removed(world: World, run: str):
    world.store.registry.promote(run, 1, "production", by="ada")
    world.store.registry.promote(run, 2, "production", by="ada")
    world.blobs.sweep(world.store.rounds.named_blobs, set(), grace_s=0, now=time.time() + 1e9)
    for n in (1, 2):
        version = next(v for v in world.store.runs.versions(run) if v.n == n)
        assert world.blobs.path(version.sha256).is_file()
        rows = (tables.version.c.run == run, tables.version.c.n == n)
        with pytest.raises(IntegrityError), world.store.db.write() as t:
            t.execute(delete(tables.version).where(*rows))


def test_the_lineage_names_parent_contributors_recipe_and_the_runs_code(world: World, agents: list[Agent]):
    run = world.start(rounds=2, secure={"on": False})
    for _ in range(2):
        plain_round(world, agents, [1.0] * 4, [1.0] * 4)
    found = registry.lineage(world.store, run, 2)
    v0, v1, v2 = sorted(world.store.runs.versions(run), key=lambda v: v.n)
    assert (found.version.parent, found.version.contributors, found.origin) == (v1.sha256, 4, None)
    assert [registry.lineage(world.store, run, n).contributors for n in (0, 1, 2)] == [0, 4, 4]
    assert found.manifest == world.store.manifests.of(run)[1].sha256
    assert len(found.recipe) == 64 and found.code == ""
    with world.store.db.write() as t:
        t.execute(tables.run.update().values(code="c" * 64))
    assert registry.lineage(world.store, run, 0).code == "c" * 64
    again = world.start(rounds=3, secure={"on": False})  # the same zeros: version 0 of both, nobody's work
    assert registry.lineage(world.store, again, 0).origin is None
    recipe = world.store.runs.recipe(run)
    world.store.runs.start("heir", recipe, sha256=v2.sha256, size=v2.bytes, by="ada")
    assert registry.lineage(world.store, "heir", 0).origin == VersionRef(run=run, n=2)
    assert (
        registry.lineage(world.store, "heir", 0).recipe
        == found.recipe
        != registry.lineage(world.store, again, 0).recipe
    )
    assert v0.parent is None
    with pytest.raises(NotFound, match="has no version 7"):
        registry.lineage(world.store, run, 7)


def test_a_removed_alias_names_nothing_and_a_promotion_begins_anew(world: World, run: str):
    aliases = world.store.registry
    for n in (0, 1):
        aliases.promote(run, n, "production", by="ada")
    aliases.promote(run, 1, "staging", by="ada")
    aliases.remove("t", "production", by="bob")
    assert [a.alias for a in aliases.aliases("t")] == ["staging"]
    assert registry.lineage(world.store, run, 1).aliases == ("staging",)
    for again in (aliases.remove, aliases.rollback):
        with pytest.raises(NotFound, match="no alias 'production': bob removed it"):
            again("t", "production", by="ada")
    aliases.promote(run, 1, "production", by="ada")  # what it pointed at when it was removed
    with pytest.raises(Conflict, match="pointed at nothing before"):
        aliases.rollback("t", "production", by="ada")
    told = [(a.n, a.action, str(a.version), a.by) for a in aliases.history("t") if a.alias == "production"]
    assert told[:2] == [(4, "promoted", "run0@1", "ada"), (3, "removed", "run0@1", "bob")]
    entries = world.store.audit.entries(what="alias removed")
    assert [(e.by, e.subject, e.details) for e in entries] == [("bob", "t: production", {"version": "run0@1"})]


def test_of_two_who_remove_an_alias_or_roll_it_back_the_second_is_told(world: World, run: str):
    for n in (0, 1, 2):
        world.store.registry.promote(run, n, "production", by="ada")
    world.store.registry.rollback("t", "production", by="bob", seen=3)
    with pytest.raises(Conflict, match="moved meanwhile, by bob to run0@1"):
        world.store.registry.remove("t", "production", by="ada", seen=3)
    assert points(world) == "run0@1"
