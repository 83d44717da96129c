"""What an organization sees of its own client: `murmur client policy | status | service`."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from murmur.clients.identity import create_identity, load_identity
from murmur.clients.record import Record
from murmur.site import running

from ..clients.scripted import A
from ..command import murmur


@pytest.fixture
def client(tmp_path: Path) -> Path:
    (tmp_path / "client.toml").write_text(
        'name = "clinic"\ncoordinator = "http://127.0.0.1:9"\n[policy]\nmin_clients = 5\n'
        '[tasks.xray]\nreference = "xray.py:XRay"\n'
    )
    create_identity(tmp_path / "identity.pem")
    return tmp_path


def test_the_policy_is_shown_whole_with_what_was_set_here(client: Path):
    assert json.loads(murmur("client", "policy", "--dir", client, "--json").out)["min_clients"] == 5
    rows = murmur("client", "policy", "--dir", client).out.splitlines()
    assert next(r for r in rows if r.startswith("min_clients")).split()[1:3] == ["5", "smallest"]
    assert next(r for r in rows if r.startswith("min_degree")).split()[1:3] == ["2", "default"]


def test_the_agent_of_a_folder_is_found_by_its_lock(client: Path):
    assert running(client) is None
    with (client / "agent.lock").open("w") as lock:
        assert running(client) is None
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert running(client) == os.getpid()
    assert running(client) is None


def test_the_status_says_what_is_missing_and_what_to_do(client: Path):
    done = murmur("client", "status", "--dir", client, "--json")
    told = {f["subject"]: f for f in json.loads(done.out)["findings"]}
    assert done.code == 1 and told["coordinator"]["level"] == "red"
    assert told["tasks"]["said"] == f"xray ({client / 'xray.py'}:XRay)"
    assert told["agent"]["todo"] == f"murmur client join --dir {client}"
    assert murmur("client", "status", "--dir", client / "none").code == 1


def test_the_service_runs_the_agent_of_its_folder_and_systemd_takes_it(client: Path):
    done = murmur("client", "service", "--dir", client, "--user", "root", "--data", "/srv/patients")
    lines = done.out.splitlines()
    assert f"ReadWritePaths={client}" in lines and "ReadOnlyPaths=-/srv/patients" in lines and "User=root" in lines
    assert next(x for x in lines if x.startswith("ExecStart=")).endswith(f"client join --dir {client}")
    if shutil.which("systemd-analyze"):
        unit = client / "murmur-agent.service"
        unit.write_text(done.out)
        checked = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=60)
        assert not [line for line in checked.stderr.splitlines() if "murmur-agent" in line], checked.stderr
    assert "systemd reads in its own way" in murmur("client", "service", "--dir", client, "--data", "/a b").err


def test_a_stop_is_said_in_the_status_until_it_is_resumed(client: Path):
    assert "murmur client resume" in murmur("client", "stop", "--dir", client).out
    told = {f["subject"]: f for f in json.loads(murmur("client", "status", "--dir", client, "--json").out)["findings"]}
    assert told["stopped"]["said"].endswith("by murmur client stop")
    assert murmur("client", "resume", "--dir", client).code == 0
    assert "stopped" not in murmur("client", "status", "--dir", client).out


def test_a_run_that_waits_is_named_in_the_status_and_answered(client: Path):
    assert murmur("client", "approve", "heart", "--dir", client).err.startswith("error: no run 'heart' has asked")
    record = Record(client / "record.sqlite")
    record.consent(A)
    assert f"murmur client approve r --dir {client}" in " ".join(
        murmur("client", "status", "--dir", client).out.split()
    )
    assert murmur("client", "approve", "r", "--dir", client).code == 0 and record.consent(A) == "approved"
    assert murmur("client", "deny", "r", "--dir", client).code == 0 and record.consent(A) == "denied"
    record.close()


def test_a_receipt_is_written_and_checked(client: Path, tmp_path: Path):
    path = tmp_path / "receipt.json"
    assert murmur("client", "receipt", "--dir", client, "-o", path).code == 0
    key = load_identity(client / "identity.pem").fingerprint
    facts = json.loads(murmur("client", "receipt", "--verify", path, "--key", key, "--json").out)
    assert facts["client"] == "clinic" and facts["fingerprint"] == key and facts["messages"] == 0
    assert "and not by 0000" in murmur("client", "receipt", "--verify", path, "--key", "0000").err
    path.write_bytes(path.read_bytes().replace(b"clinic", b"klinik"))
    assert "signature is wrong" in murmur("client", "receipt", "--verify", path).err
