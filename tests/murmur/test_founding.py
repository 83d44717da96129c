"""`murmur coordinator init`."""

from __future__ import annotations

import re
import stat
from pathlib import Path

import pytest

from murmur.coordinator.settings import Settings

from ..command import murmur


def test_the_file_that_init_writes_says_every_setting_and_changes_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "new" / "place"
    done = murmur("coordinator", "init", folder)
    assert done.code == 0 and f"`murmur coordinator serve` in {folder}" in done.out
    path, data = folder / "murmur.toml", folder / "murmur-data"
    assert [stat.S_IMODE(p.stat().st_mode) for p in (path, data)] == [0o600, 0o700]
    monkeypatch.chdir(folder)
    assert Settings.read() == Settings.model_construct()
    spelled = re.sub(r"^# (\w+ = )", r"\1", path.read_text(), flags=re.MULTILINE)  # every setting said aloud
    assert re.findall(r"^(\w+) = ", spelled, flags=re.MULTILINE) == [*Settings.model_fields]
    path.write_text(spelled.replace('"…"', '"pem"'))
    assert Settings.read() == Settings(tls_cert=Path("pem"), tls_key=Path("pem"))


def test_init_writes_over_nothing(tmp_path: Path):
    (tmp_path / "murmur.toml").write_text("mine")
    done = murmur("coordinator", "init", tmp_path)
    assert done.code == 1 and "exists already" in done.err
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"murmur.toml": "mine"}
    other = tmp_path / "other"
    (other / "murmur-data").mkdir(parents=True)
    (other / "murmur-data" / "murmur.db").touch()
    done = murmur("coordinator", "init", other)
    assert done.code == 1 and "has something in it already" in done.err and not (other / "murmur.toml").exists()
