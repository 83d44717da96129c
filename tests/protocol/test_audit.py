"""The audit log's chain: what a hash covers, and every way in which a log is another than what was written."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime, timedelta

import pytest

from murmur.protocol.audit import AuditView, verify_log


def chain(count: int) -> list[AuditView]:
    made: list[AuditView] = []
    for n in range(1, count + 1):
        at, before = datetime(2026, 3, 2, 9, tzinfo=UTC) + timedelta(seconds=n), made[-1].sha256 if made else ""
        entry = AuditView(n=n, at=at, by="ada", action="run stopped", subject=f"run-{n}", before=before, sha256="")
        made.append(entry.model_copy(update={"sha256": entry.digest}))
    return made


def test_a_hash_is_that_of_the_other_values_as_canonical_json():
    entry = AuditView(
        n=1,
        at=datetime(2026, 3, 2, 9, tzinfo=UTC),
        by="ada",
        action="client approved",
        subject="st-mary",
        details={"fingerprint": "ab12"},
        before="",
        sha256="",
    )
    said = (
        '{"action":"client approved","at":"2026-03-02T09:00:00.000000+00:00","before":"","by":"ada",'
        '"details":{"fingerprint":"ab12"},"n":1,"subject":"st-mary"}'
    )
    assert entry.digest == hashlib.sha256(said.encode()).hexdigest()


def test_a_log_holds_also_when_it_was_written_out_and_read_again():
    log = chain(5)
    read = [AuditView.model_validate_json(entry.model_dump_json()) for entry in log]
    report = verify_log(read)
    assert (report.ok, report.entries, report.head) == (True, 5, log[-1].sha256)
    assert verify_log([]).ok


@pytest.mark.parametrize("field", ["at", "by", "action", "subject", "details"])
def test_a_changed_entry_is_named(field: str):
    log = chain(3)
    other = {"at": log[1].at + timedelta(microseconds=1), "details": {"a": "b"}}.get(field, "other")
    log[1] = log[1].model_copy(update={field: other})
    assert verify_log(log).wrong == ("entry 2 was changed: its hash does not fit what it says",)


def test_a_changed_entry_with_a_new_hash_breaks_the_next_one():
    log = chain(3)
    changed = log[1].model_copy(update={"by": "eve"})
    log[1] = changed.model_copy(update={"sha256": changed.digest})
    assert verify_log(log).wrong == ("entry 3 does not follow from entry 2: it names another hash",)


def test_a_missing_entry_is_noticed():
    log = chain(4)
    assert verify_log(log[:1] + log[2:]).wrong == ("entry 3 stands where entry 2 should",)
    assert verify_log(log[1:]).wrong[0] == "entry 2 stands where entry 1 should"


def test_a_log_whose_end_was_cut_off_shows_only_beside_what_was_kept():
    log = chain(4)
    assert verify_log(log[:3]).ok
    kept = {entry.n: entry.sha256 for entry in log}
    assert verify_log(log[:3], kept).wrong == ("the log ends at entry 3, but entry 4 was kept: its end was cut off",)
    anew = [e.model_copy(update={"by": "eve", "before": ""}) for e in log[:1]]
    anew = [e.model_copy(update={"sha256": e.digest}) for e in anew]
    assert verify_log(anew).ok
    assert "entry 1 is another one than what was kept of it" in verify_log(anew, kept).wrong


def test_a_line_of_an_export_is_plain_json():
    assert json.loads(chain(1)[0].model_dump_json())["subject"] == "run-1"
