"""`murmur coordinator user|token` on a data folder, and `murmur audit verify-log` on files."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from murmur.coordinator.store import Store

from ..command import murmur


@pytest.fixture
def data(tmp_path: Path) -> Path:
    store = Store(f"sqlite:///{tmp_path / 'murmur.db'}", clock=time.time)
    store.accounts.put("admin", "admin", None, by="operator")
    store.close()
    (tmp_path / "operator.json").write_text(json.dumps({"url": "http://127.0.0.1:9", "token": "x", "ca": ""}))
    return tmp_path


def test_users_are_added_listed_and_removed(data: Path):
    added = murmur("coordinator", "user", "rhea", "--role", "researcher", "--link", "--data", data)
    assert added.code == 0 and "http://127.0.0.1:9/login?link=" in added.out
    listed = json.loads(murmur("coordinator", "user", "--json", "--data", data).out)
    assert [(u["name"], u["role"]) for u in listed] == [("admin", "admin"), ("rhea", "researcher")]
    assert murmur("coordinator", "user", "rhea", "--remove", "--data", data).code == 0
    assert murmur("coordinator", "user", "rhea", "--remove", "--data", data).code == 1
    assert murmur("coordinator", "user", "bo", "--role", "king", "--link", "--data", data).code == 2
    last = murmur("coordinator", "user", "admin", "--role", "viewer", "--link", "--data", data)
    assert last.code == 1 and "last admin" in last.err


def test_a_token_is_listed_without_its_secret_and_taken_back(data: Path):
    token = murmur("coordinator", "token", "admin", "--role", "viewer", "--for", "export", "--data", data).out.strip()
    said = murmur("coordinator", "token", "--list", "--json", "--data", data).out
    (listed,) = json.loads(said)
    assert (listed["name"], listed["role"], listed["kind"]) == ("export", "viewer", "api") and token not in said
    assert murmur("coordinator", "token", "--withdraw", listed["id"], "--data", data).code == 0
    assert json.loads(murmur("coordinator", "token", "--list", "--json", "--data", data).out) == []
    assert murmur("coordinator", "token", "--withdraw", listed["id"], "--data", data).code == 1


def test_an_exported_log_is_verified_alone_and_beside_an_earlier_one(data: Path):
    store = Store(f"sqlite:///{data / 'murmur.db'}", clock=time.time)
    for role in ("viewer", "researcher", "viewer"):
        store.accounts.put("rhea", role, None, by="ada")
    lines = [entry.model_dump_json() + "\n" for entry in store.audit.entries()]
    store.close()
    whole, short, changed = data / "whole.jsonl", data / "short.jsonl", data / "changed.jsonl"
    whole.write_text("".join(lines))
    short.write_text("".join(lines[:-1]))
    changed.write_text("".join(lines).replace('"by":"ada"', '"by":"eve"', 1))
    good = murmur("audit", "verify-log", whole, "--kept", short)
    assert good.code == 0 and "4 entries hold" in good.out
    cut = murmur("audit", "verify-log", short, "--kept", whole)
    assert cut.code == 1 and "its end was cut off" in cut.err
    found = murmur("audit", "verify-log", changed, "--json")
    assert found.code == 1 and json.loads(found.out)["wrong"] == [
        "entry 2 was changed: its hash does not fit what it says"
    ]
    whole.write_text("nonsense\n")
    assert murmur("audit", "verify-log", whole).code == 1
    assert murmur("audit", "verify-log", data / "none.jsonl").code == 2
