"""`murmur doctor`: what it says of a machine, of a coordinator and of a client, and what to do."""

from __future__ import annotations

import datetime as dt
import email.utils
import json
import shutil
import sqlite3
import time
from pathlib import Path

import httpx
import pytest

from murmur.coordinator import tls
from murmur.coordinator.store import Store
from murmur.coordinator.store.migrate import revisions
from murmur.doctor import answers, certificate, database, schema
from murmur.machine import Cuda, disk, gpus, memory, network_disk

from ..command import murmur

ROOT = Path(__file__).parents[2]
DAY = dt.timedelta(days=1)


@pytest.mark.parametrize(
    ("driver", "built_for", "names", "warned", "level", "words"),
    [
        (None, None, (), "", "green", "none: training runs on the processor"),
        (None, "13.0", (), "", "green", "none"),
        ("570.86", "12.8", ("H200", "H200"), "", "green", "2 x H200, driver 570.86, CUDA 12.8"),
        ("570.86", None, (), "", "red", "build for processors only"),
        ("525.60", "13.0", (), "The NVIDIA driver on your system is too old (found version 12000).", "red", "too old"),
        ("570.86", "12.8", (), "", "red", "finds no device"),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_told_with_its_reason(driver, built_for, names, warned, level, words):
    found = gpus(Cuda(driver=driver, built_for=built_for, names=names, warned=warned))
    assert found.level == level and words in found.said and bool(found.todo) == (level == "red")


def test_little_memory_is_told():
    (found,) = memory({"MemAvailable": 1 << 30, "MemTotal": 16 << 30})
    assert found.level == "yellow" and found.said == "1.1 of 17.2 GB free"
    assert [f.level for f in memory({"MemAvailable": 2 << 30, "MemTotal": 16 << 30})] == ["green"]
    assert not [*memory({})]


@pytest.mark.parametrize(("free", "level"), [((5 << 30) - 1, "yellow"), (5 << 30, "green")])
def test_a_disk_with_less_than_five_gib_is_told(monkeypatch: pytest.MonkeyPatch, free: int, level: str):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(1 << 40, 0, free))
    found = disk(Path("/srv"))
    assert (found.level, found.said) == (level, "5.4 GB free at /srv") and bool(found.todo) == (level == "yellow")


@pytest.mark.parametrize(
    ("body", "behind_s", "told"),
    [
        ({"status": "ready", "troubles": []}, 0, [("coordinator", "green", "is ready")]),
        (
            {"status": "not ready", "troubles": ["no room", "rounds have stood still for 20 s"]},
            0,
            [("coordinator", "red", "no room; rounds have stood still for 20 s")],
        ),
        (
            {"status": "ready", "troubles": []},
            60,
            [("coordinator", "green", "is ready"), ("clock", "yellow", "s from the coordinator's")],
        ),
    ],
)
def test_what_a_coordinator_answers_is_told_and_how_far_its_clock_is(
    monkeypatch: pytest.MonkeyPatch, body: dict[str, object], behind_s: int, told: list[tuple[str, str, str]]
):
    asked = list[str]()

    def get(url: str, **_: object) -> httpx.Response:
        asked.append(url)
        date = email.utils.formatdate(time.time() - behind_s, usegmt=True)
        return httpx.Response(503 if body["troubles"] else 200, json=body, headers={"date": date})

    monkeypatch.setattr(httpx, "get", get)
    found = [*answers("http://127.0.0.1:8443", "")]
    assert asked == ["http://127.0.0.1:8443/healthz/ready"]
    for finding, (subject, level, words) in zip(found, told, strict=True):
        assert (finding.subject, finding.level) == (subject, level) and words in finding.said


MOUNTS = """/dev/sda1 / ext4 rw 0 0
fileserver:/export /srv/shared nfs4 rw 0 0
/dev/sdb1 /srv/shared/local xfs rw 0 0
"""


def test_a_network_file_system_is_known_by_the_innermost_mount():
    assert network_disk(Path("/srv/shared/murmur-data"), MOUNTS) == "nfs4"
    assert network_disk(Path("/srv/shared/local/data"), MOUNTS) == ""
    assert network_disk(Path("/home"), MOUNTS) == ""


def test_a_database_of_this_release_of_an_older_and_of_a_newer_one(tmp_path: Path):
    path = tmp_path / "murmur.db"
    Store(f"sqlite:///{path}", clock=lambda: 0.0).close()
    (found,) = database(f"sqlite:///{path}")
    assert found.level == "green" and revisions()[0] in found.said
    older = min(revisions()[1] - {revisions()[0]})
    assert schema(older).level == "yellow" and "upgrades" in schema(older).todo
    assert schema("9999").level == "red"
    before = path.read_bytes()
    [*database(f"sqlite:///{path}")]
    assert path.read_bytes() == before
    with pytest.raises(sqlite3.OperationalError):
        [*database(f"sqlite:///{tmp_path / 'none.db'}")]
    assert not (tmp_path / "none.db").exists()


def test_a_file_that_is_no_database_is_a_finding_and_no_traceback(tmp_path: Path):
    (tmp_path / "murmur.db").write_bytes(b"not a database" * 100)
    (tmp_path / "operator.json").write_text(json.dumps({"url": "http://127.0.0.1:9", "token": "x"}))
    done = murmur("doctor", "--data", tmp_path, "--json")
    told = {f["subject"]: f for f in json.loads(done.out)["findings"] if f["level"] == "red"}
    assert done.code == 1 and told.keys() == {"database", "coordinator"}
    assert "not a database" in told["database"]["said"] and "does not answer" in told["coordinator"]["said"]


def test_a_certificate_is_told_before_it_ends(tmp_path: Path):
    now = dt.datetime.now(dt.UTC)
    fresh = tls.ensure(tmp_path / "fresh", ("localhost",), now=now)
    assert certificate(fresh.chain, own=True).level == "green"
    soon = tls.ensure(tmp_path / "soon", ("localhost",), now=now - (tls.SERVER_DAYS - 10) * DAY)
    assert certificate(soon.chain, own=True).level == "yellow"
    over = tls.ensure(tmp_path / "over", ("localhost",), now=now - (tls.SERVER_DAYS + 1) * DAY)
    found = certificate(over.chain, own=False)
    assert (found.level, found.todo) == ("red", "renew it, and start the coordinator again")
    assert "it renews its own" in certificate(over.chain, own=True).todo


def test_a_folder_without_anything_says_how_to_begin(tmp_path: Path):
    done = murmur("doctor", "--data", tmp_path, "--dir", tmp_path, "--json")
    todo = [f["todo"] for f in json.loads(done.out)["findings"] if f["level"] == "red"]
    assert done.code == 1
    assert todo == ["start one: murmur coordinator serve", "enrol it: murmur client enroll"]


def test_a_database_of_an_older_release_is_upgraded_without_a_start(tmp_path: Path):
    path = tmp_path / "murmur.db"
    Store(f"sqlite:///{path}", clock=lambda: 0.0).close()
    migrate, head = ("coordinator", "migrate", "--data", tmp_path), revisions()[0]
    assert murmur(*migrate).out == f"the database is at {head}, as it was\n"
    path.unlink()
    old = sqlite3.connect(path)
    old.executescript((ROOT / "tests" / "fixtures" / "release-0.1.0" / "murmur.sql").read_text())
    old.close()
    assert [f.level for f in database(f"sqlite:///{path}")] == ["yellow", "yellow"]  # the journal too
    assert f"the database is at {head}; it was at " in murmur(*migrate).out
    assert [f.level for f in database(f"sqlite:///{path}")] == ["green"]
    assert murmur(*migrate[:-1], tmp_path / "none").code == 1
