"""`murmur audit`, as somebody types it who has a run's manifests and nobody to ask."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from murmur.clients.identity import create_identity
from murmur.clients.memory import Memory
from murmur.clients.settings import parse_settings, write_settings
from murmur.protocol.encoding import b64, fingerprint

from ..privacy.test_manifest import COHORT, history, keys, masked, public_of

with warnings.catch_warnings():  # typer asks a newer click for a name that it deprecates
    warnings.simplefilter("ignore", DeprecationWarning)
    from typer.testing import CliRunner, Result

    from murmur import auditing, cli


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return history(masked)


@pytest.fixture
def folder(tmp_path: Path, texts: list[str]) -> Path:
    auditing.keep(dict(enumerate(texts, 1)), tmp_path / "r1-manifests")
    return tmp_path / "r1-manifests"


def murmur(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, [str(a) for a in arguments])


def test_a_good_run_is_told_in_three_lines_and_what_was_not_checked(folder: Path):
    done = murmur("audit", "verify", folder)
    assert done.exit_code == 0, done.output
    assert "r1  rounds 1 to 4 (4 masked), 4 clients, newest version" in done.output
    assert "note: Whose keys these are was not checked" in done.output and "(--trusted)" in done.output
    assert "good: 4 rounds hold" in done.output


def test_a_changed_round_is_named_and_the_exit_code_says_so(folder: Path, texts: list[str]):
    changed = json.loads(texts[1])
    changed["sums"][0]["survivors"] = list(COHORT)
    (folder / "round-0002.json").write_text(json.dumps(changed, sort_keys=True, separators=(",", ":")))
    done = murmur("audit", "verify", folder)
    assert done.exit_code == 1
    assert "round 2 is the first that does not hold" in done.output and "broken" in done.output
    found = json.loads(murmur("audit", "verify", folder, "--json").output)
    assert [(f["code"], f["round"]) for f in found["broken"]] == [("bad_agreement", 2), ("other_past", 3)]
    assert found["ok"] is False and found["runs"][0]["run"] == "r1"


def test_one_file_may_hold_all_rounds(tmp_path: Path, texts: list[str]):
    file = tmp_path / "all.jsonl"
    file.write_text("".join(text + "\n" for text in texts))
    assert json.loads(murmur("audit", "verify", file, "--json").output)["runs"][0]["last"] == 4
    file.write_text(texts[0] + "\nnonsense\n")
    done = json.loads(murmur("audit", "verify", file, "--json").output)
    assert done["broken"][0]["code"] == "not_a_manifest" and f"{file}:2" in done["broken"][0]["detail"]


def test_keys_are_compared_with_a_list_of_names_and_keys(folder: Path, tmp_path: Path):
    listed = tmp_path / "keys.json"
    listed.write_text(json.dumps(keys() | {"c01": fingerprint(public_of("c01"))}))
    done = murmur("audit", "verify", folder, "--trusted", listed)
    assert done.exit_code == 0 and "Whose keys" not in done.output
    listed.write_text(json.dumps(keys() | {"c01": fingerprint(b"another key")}))
    done = murmur("audit", "verify", folder, "--trusted", listed, "--json")
    broken = json.loads(done.output)["broken"][0]
    assert done.exit_code == 1 and "another is on the list" in broken["detail"]


def test_a_site_compares_them_with_the_keys_it_met_its_policy_and_its_own(folder: Path, tmp_path: Path):
    site = tmp_path / "site"
    site.mkdir()
    policy = {"trusted": {"c02": fingerprint(public_of("c02"))}}
    settings = parse_settings({"name": "c00", "coordinator": "http://127.0.0.1:1", "policy": policy}, site)
    write_settings(settings)
    settings.workdir.mkdir()
    own = create_identity(settings.key_file)
    memory = Memory(settings.workdir)
    memory.remember_peers({"c01": public_of("c01"), "c02": bytes(32), "c03": public_of("c03")})
    assert auditing.trusted_keys(site) == {
        "c00": own.public_b64,
        "c01": b64(public_of("c01")),
        "c02": policy["trusted"]["c02"],  # the policy's word stands above what was met
        "c03": b64(public_of("c03")),
    }
    found = json.loads(murmur("audit", "verify", folder, "--trusted", site, "--json").output)["broken"]
    assert {f["detail"][:3] for f in found} == {"c00"}  # this test's own key is another one


def test_model_files_are_compared_with_the_versions(folder: Path, tmp_path: Path):
    models = tmp_path / "models"
    models.mkdir()
    (models / "final.safetensors").write_bytes(b"version 3")  # whose SHA-256 the manifests of these tests name
    done = murmur("audit", "verify", folder, "--models", models)
    assert done.exit_code == 0 and "not compared" not in done.output
    (models / "final.safetensors").write_bytes(b"version 3, a little better")
    done = murmur("audit", "verify", folder, "--models", models / "final.safetensors")
    assert done.exit_code == 1 and "no round names final.safetensors" in done.output


@pytest.mark.parametrize(
    "wrong", [["none"], [], ["empty"], ["good", "--trusted", "none"], ["good", "--models", "none"]]
)
def test_what_cannot_be_read_is_wrong_usage(folder: Path, tmp_path: Path, wrong: list[str]):
    (tmp_path / "empty").mkdir()
    places = {"none": tmp_path / "none", "empty": tmp_path / "empty", "good": folder}
    assert murmur("audit", "verify", *(places.get(w, w) for w in wrong)).exit_code == 2


@pytest.mark.parametrize("content", ["[]", "nonsense", '{"a": 1}'])
def test_a_list_of_keys_that_is_none_says_what_one_looks_like(folder: Path, tmp_path: Path, content: str):
    (tmp_path / "keys.json").write_text(content)
    done = murmur("audit", "verify", folder, "--trusted", tmp_path / "keys.json")
    assert done.exit_code == 2 and "is not a JSON object of names and keys" in done.output


def test_what_was_kept_stays_and_another_one_of_the_same_round_is_kept_beside_it(folder: Path, texts: list[str]):
    assert auditing.keep(dict(enumerate(texts, 1)), folder) == (0, [])
    fork = texts[3].replace('"task":"digits"', '"task":"others"')
    assert auditing.keep({4: fork}, folder) == (1, [str(folder / "round-0004-other.json")])
    assert (folder / "round-0004.json").read_text() == texts[3]
    found = json.loads(murmur("audit", "verify", folder, "--json").output)["broken"]
    assert [(f["code"], f["round"]) for f in found] == [("two_manifests", 4)]


def test_checking_imports_no_torch_and_asks_nobody(folder: Path):
    code = (
        "import sys, socket; socket.socket = None; sys.argv = ['murmur', 'audit', 'verify', sys.argv[1]]\n"
        "from murmur.cli import app\n"
        "try: app()\nexcept SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'httpx', 'sqlalchemy', 'fastapi'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_hashes_of_files_are_those_of_their_bytes(tmp_path: Path):
    (tmp_path / "a.safetensors").write_bytes(b"abc")
    assert auditing.model_hashes(tmp_path) == {"a.safetensors": hashlib.sha256(b"abc").hexdigest()}
