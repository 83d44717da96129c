"""What is told of a client's past parts, and how a revoked client comes back with a new key."""

from __future__ import annotations

from pathlib import Path

from fastapi.testclient import TestClient
from sqlalchemy import insert

from murmur.coordinator.http import Parts
from murmur.coordinator.people import hash_token
from murmur.coordinator.store import Store, tables
from murmur.protocol.recipe import parse_recipe
from murmur.protocol.views import LATE, Track

from .test_agents_api import INFO, PLAIN, Caller, enrolled, http, parts, refused

_ = (http, parts)


def test_a_client_s_track_counts_what_arrived_and_what_was_lost_and_times_its_uploads(tmp_path: Path):
    store = Store(f"sqlite:///{tmp_path / 'murmur.db'}", clock=lambda: 100.0)
    store.runs.start("run", parse_recipe(PLAIN), sha256="0" * 64, size=8, by="ada")
    states = [  # of one client in a round each: state, reason, seconds that the upload took, bytes
        ("counted", "", 4.0, 8_000),  # 2,000 bytes/s
        ("uploaded", "", 10.0, 60_000),  # 6,000 bytes/s
        ("counted", "", 2.0, 8_000),  # 4,000 bytes/s: the median
        ("counted", "", 1.0, 9_000_000),  # too short to be measured
        ("failed", "no memory", 0.0, 0),
        ("dropped", LATE, 0.0, 0),  # late: neither arrived nor lost
        ("dropped", "not heard for 60 s", 0.0, 0),
        ("working", "", 0.0, 0),
    ]
    with store.db.write() as t:
        row = {"id": "a", "public_key": b"k" * 32, "state": "active", "info": {}, "created_at": 0.0}
        t.execute(insert(tables.client).values(**row))
        for n, (state, reason, took, size) in enumerate(states, 2):
            t.execute(insert(tables.round_).values(run="run", n=n, kind="train", attempt=1, opened_at=0.0))
            opened = {"run": "run", "round": n, "n": 1, "state": "selecting", "opened_at": 0.0, "state_at": 0.0}
            t.execute(insert(tables.attempt).values(**opened))
            phases = [["training", 1.0], ["uploading", 10.0], ["sent", 10.0 + took]] if size else [["training", 1.0]]
            part = {"id": f"p{n}", "run": "run", "round": n, "attempt": 1, "client": "a", "state": state}
            part |= {"reason": reason, "phases": phases, "offered_at": 0.0, "progress_at": 0.0}
            t.execute(insert(tables.assignment).values(**part))
            if size:
                came = {"assignment": f"p{n}", "sha256": "1" * 64, "bytes": size, "received_at": 10.0 + took}
                t.execute(insert(tables.update).values(**came))
    assert store.records.all() == {"a": Track(done=4, lost=2, upload_bytes_s=4_000)}
    assert store.ledger.rounds() == {"run": {"a": 4}}
    store.close()


def test_a_revoked_client_is_invited_again_and_waits_with_its_new_key(http: TestClient, parts: Parts):
    old = enrolled(http, parts, "a")
    parts.service.revoke("a", "admin")
    parts.store.clients.invite("a", hash_token("the-second-invitation"), by="admin", lifetime_s=60)

    def enrol(caller: Caller):
        message = {"token": "the-second-invitation", "name": "a", "public_key": caller.public, "info": INFO}
        return caller.signed("/v1/enrol", message)

    refused(enrol(old), 409, "conflict")  # the revoked key stays out, and does not use up the invitation
    new = Caller(http, "a")
    new.nonces = 1_000  # the client's name has used those that the old key began with
    assert enrol(new).json()["state"] == "pending"
    assert enrol(new).json()["state"] == "pending"  # an answer that was lost is asked for again
    refused(new.signed("/v1/token", {}), 403, "not_approved")
    parts.service.approve("a", "admin")
    new.log_in()
    refused(old.signed("/v1/token", {}), 401, "not_authenticated")
    said = [e.action for e in parts.store.audit.entries(what="client")]
    assert said == [
        "client invited",
        "client enrolled",
        "client approved",
        "client revoked",
        "client invited",
        "client enrolled",
        "client approved",
    ]
