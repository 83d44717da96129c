"""Users, sessions, API tokens and the audit log in the store, and the migration that brought them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic import command
from sqlalchemy import create_engine, event, text

from murmur.coordinator.people import People
from murmur.coordinator.sign_ins import FailedSignIns
from murmur.coordinator.store import Store
from murmur.coordinator.store.audit import note
from murmur.coordinator.store.migrate import _config, migrate
from murmur.protocol.audit import verify_log
from murmur.protocol.errors import Conflict, NotAuthenticated, NotFound, OperatorError, Unavailable

from .harness import World
from .test_store import at_once

DAY_S = 86_400.0


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[Store]:
    store = Store(f"sqlite:///{tmp_path / 'murmur.db'}", clock=clock)
    yield store
    store.close()


@pytest.fixture
def people(store: Store) -> People:
    people = People(store, session_s=DAY_S)
    people.add("ada", "admin", None)
    return people


def said(store: Store) -> list[tuple[str, str, str]]:
    return [(e.by, e.action, e.subject) for e in store.audit.entries()]


def test_entries_of_many_connections_make_one_chain_without_a_gap(world: World):
    def write() -> None:
        for _ in range(5):
            with world.store.db.write() as t:
                note(t, "run stopped", "run", by="ada")

    at_once(4, write)
    entries = list(world.store.audit.entries())
    assert [e.n for e in entries] == list(range(1, 21))
    assert verify_log(entries).ok


def test_an_entry_is_there_only_if_its_transaction_is(store: Store):
    with pytest.raises(ZeroDivisionError), store.db.write() as t:
        note(t, "run stopped", "run", by="ada")
        _ = 1 / 0
    assert said(store) == []


def test_a_row_changed_in_the_database_is_found(store: Store, people: People):
    people.add("rhea", "researcher", None, by="ada")
    with store.db.engine.begin() as c:
        c.execute(text("UPDATE audit SET subject = 'eve' WHERE n = 2"))
    assert verify_log(store.audit.entries()).wrong == ("entry 2 was changed: its hash does not fit what it says",)


def test_the_log_is_filtered_and_read_in_pages(store: Store, people: People):
    for name in ("r_1", "r_2", "rx3"):
        people.add(name, "viewer", None, by="ada")
    rows, total = store.audit.newest(by="ada", what="R_", limit=1)
    assert ([r.subject for r in rows], total) == (["r_2"], 2)  # "_" is itself, not any letter
    assert [e.subject for e in store.audit.entries(what="user", after=2)] == ["r_2", "rx3"]


def test_whatever_is_done_to_people_and_their_keys_is_in_the_log(store: Store, people: People):
    people.add("rhea", "viewer", None, by="ada", new=True)
    store.accounts.set_role("rhea", "researcher", by="ada")
    token = people.api_token("rhea", lifetime_s=DAY_S, label="notebook", by="rhea")
    session = people.redeem(people.link("rhea"))
    assert session
    people.withdraw(token.id, by="ada")
    people.remove("rhea", by="ada")
    assert said(store) == [
        ("operator", "user added", "ada"),
        ("ada", "user added", "rhea"),
        ("ada", "user changed", "rhea"),
        ("rhea", "token made", token.id),
        ("rhea", "signed in", "rhea"),
        ("ada", "token taken back", token.id),
        ("ada", "user removed", "rhea"),
    ]
    assert verify_log(store.audit.entries()).ok
    assert token.token not in "".join(e.model_dump_json() for e in store.audit.entries())


def test_a_token_may_no_more_than_its_account_and_less_if_it_was_made_so(people: People, store: Store):
    less = people.api_token("ada", lifetime_s=DAY_S, role="viewer")
    same = people.api_token("ada", lifetime_s=DAY_S)
    people.add("bob", "admin", None)
    assert [people.holder("api", t.token).role for t in (less, same)] == ["viewer", "admin"]  # pyright: ignore
    store.accounts.set_role("ada", "viewer", by="bob")
    assert people.holder("api", same.token).role == "viewer"  # pyright: ignore


def test_a_token_says_when_it_was_last_used_and_holds_until_its_day(people: People, clock: Clock):
    token = people.api_token("ada", lifetime_s=DAY_S, label="export")
    assert people.credentials()[0].used_at is None
    clock.now += 100
    assert people.holder("api", token.token)
    people.link("ada")  # a note of use is not waited for; this is, and comes after it
    (listed,) = people.credentials("ada")
    assert (listed.name, listed.role, listed.used_at.timestamp()) == ("export", "admin", 1_000_100)  # pyright: ignore
    clock.now += DAY_S
    assert people.holder("api", token.token) is None
    assert people.credentials() == []


def test_a_session_that_is_ended_in_the_list_is_over(people: People):
    session = people.redeem(people.link("ada")) or ""
    (listed,) = people.credentials()
    assert (listed.kind, listed.account) == ("session", "ada")
    people.withdraw(listed.id)
    assert people.holder("session", session) is None
    with pytest.raises(NotFound):
        people.withdraw(listed.id)


def test_a_one_time_link_is_in_no_list_and_cannot_be_named(people: People, store: Store):
    people.link("ada")
    assert people.credentials() == []


@pytest.mark.parametrize("lose", ["demote", "remove", "replace"])
def test_there_is_always_an_admin(people: People, store: Store, lose: str):
    with pytest.raises(Conflict, match="last admin"):
        if lose == "demote":
            store.accounts.set_role("ada", "researcher", by="ada")
        elif lose == "remove":
            people.remove("ada")
        else:
            people.add("ada", "viewer", None)
    assert store.accounts.role("ada") == "admin"


def test_a_name_that_is_taken_is_not_given_away_by_the_page(people: People):
    with pytest.raises(Conflict, match="already"):
        people.add("ada", "viewer", None, new=True)


def test_a_password_is_changed_by_who_knows_the_one_before(people: People):
    people.set_password("ada", "a long enough one", before="")
    with pytest.raises(NotAuthenticated):
        people.set_password("ada", "another long one", before="wrong")
    with pytest.raises(OperatorError, match="12"):
        people.set_password("ada", "short", before="a long enough one")
    assert people.login("ada", "a long enough one")


def test_accounts_sessions_and_tokens_of_the_schema_before_go_on(tmp_path: Path):
    engine = create_engine(f"sqlite:///{tmp_path / 'old.db'}")

    @event.listens_for(engine, "connect")
    def _keys(connection, _record) -> None:
        connection.execute("PRAGMA foreign_keys=ON")

    with engine.begin() as c:
        config = _config()
        config.attributes["connection"] = c
        command.upgrade(config, "0006")
        c.execute(text("INSERT INTO account VALUES ('ada', 'admin', NULL, 1), ('vera', 'viewer', 'phc', 2)"))
        c.execute(text("INSERT INTO credential VALUES ('hash', 'api', 'vera', 3, 9e9)"))
    migrate(engine)
    with engine.begin() as c:
        assert c.execute(text("SELECT name, role, password FROM account ORDER BY name")).all() == [
            ("ada", "admin", None),
            ("vera", "viewer", "phc"),
        ]
        assert c.execute(text("SELECT token_hash, account, name, role FROM credential")).all() == [
            ("hash", "vera", "", None)
        ]
        c.execute(text("UPDATE account SET role = 'researcher' WHERE name = 'vera'"))
        assert c.execute(text("PRAGMA foreign_key_check")).all() == []
        (made,) = c.execute(text("SELECT sql FROM sqlite_master WHERE name = 'credential'")).scalars()
        assert "account_new" not in made
    engine.dispose()


class Tried:
    """Sign-ins from addresses, beside the log's entries about them: address, how often, at whose accounts."""

    def __init__(self, store: Store) -> None:
        self.now, self.store = 0.0, store
        self.failed = FailedSignIns(store, clock=lambda: self.now)

    @property
    def entries(self) -> list[tuple[str, str, str]]:
        found = (e for e in self.store.audit.entries(what="sign-in failed"))
        return [(e.subject, e.details["tries"], e.details["accounts"]) for e in found]


@pytest.fixture
def tried(store: Store, people: People) -> Tried:
    return Tried(store)


def test_failed_sign_ins_are_one_entry_for_each_address_with_how_many_and_whose(tried: Tried):
    for name in ("ada", "ada", "correct horse battery"):  # the last is a password in the wrong field
        tried.failed.add("192.0.2.1", name)
    tried.failed.add("192.0.2.2")  # a one-time link that was used up
    assert tried.entries == []
    tried.failed.write()
    tried.failed.write()  # nothing has failed since
    assert tried.entries == [("192.0.2.1", "3", "ada"), ("192.0.2.2", "1", "")]
    assert verify_log(tried.store.audit.entries()).ok
    assert "correct horse" not in "".join(e.model_dump_json() for e in tried.store.audit.entries())


def test_whoever_has_a_thousand_addresses_makes_65_entries(tried: Tried):
    for n in range(1000):
        tried.failed.add(f"2001:db8::{n:x}")
    tried.failed.write()
    assert len(tried.entries) == 65
    assert tried.entries[-1] == ("other addresses", "936", "")


def test_a_name_with_five_wrong_passwords_waits_a_minute_and_trying_on_is_counted(tried: Tried):
    for _ in range(5):
        tried.failed.check("ada", "192.0.2.1")
        tried.failed.add("192.0.2.1", "ada")
    with pytest.raises(Unavailable, match="try again in 60 s"):
        tried.failed.check("ada", "192.0.2.2")
    tried.failed.check("bob", "192.0.2.1")  # another name's password may be right
    tried.now = 60.0
    tried.failed.check("ada", "192.0.2.1")
    tried.failed.write()
    assert tried.entries == [("192.0.2.1", "5", "ada"), ("192.0.2.2", "1", "ada")]


def test_what_could_not_be_written_is_told_with_the_next(tried: Tried, monkeypatch: pytest.MonkeyPatch):
    tried.failed.add("192.0.2.1", "ada")

    def busy(*_: object) -> None:
        raise Unavailable("the database is locked")

    with monkeypatch.context() as m:
        m.setattr(tried.store.audit, "failed_sign_ins", busy)
        tried.failed.write()
    tried.failed.add("192.0.2.1")
    tried.failed.write()
    assert tried.entries == [("192.0.2.1", "2", "ada")]
