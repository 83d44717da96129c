from pathlib import Path

import pytest

from murmur.coordinator.settings import Settings
from murmur.protocol.errors import OperatorError


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "murmur.toml"


def test_flags_go_before_variables_before_the_file_before_defaults(file: Path, monkeypatch: pytest.MonkeyPatch):
    file.write_text('[coordinator]\nhost = "file"\nport = 1\npublic_host = "file"\n[other]\nx = 1\n')
    monkeypatch.setenv("MURMUR_HOST", "variable")
    monkeypatch.setenv("MURMUR_PORT", "2")
    found = Settings.read(port=3, data=None)
    assert (found.port, found.host, found.public_host, found.data) == (3, "variable", "file", Path("murmur-data"))


def test_the_file_may_lie_elsewhere(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file.write_text("[coordinator]\nport = 1\n")
    (tmp_path / "other.toml").write_text("[coordinator]\nport = 2\n")
    monkeypatch.setenv("MURMUR_CONFIG", "other.toml")
    assert Settings.read().port == 2
    monkeypatch.setenv("MURMUR_CONFIG", "none.toml")
    with pytest.raises(OperatorError, match=r"there is no none\.toml, which MURMUR_CONFIG names"):
        Settings.read()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[coordinator]\nprot = 1\n", "prot: there is no such key; 'port' is near"),
        ("[coordinator]\nport = 70000\n", "port: Input should be less"),
        ("coordinator = 1\n", "coordinator is a table"),
        ("[coordinator", "not TOML"),
    ],
)
def test_what_is_wrong_with_the_file_is_told(file: Path, text: str, words: str):
    file.write_text(text)
    with pytest.raises(OperatorError, match=words):
        Settings.read()
