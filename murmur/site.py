"""What an organization sees of its own client: its policy, how it stands, a service that keeps it running."""

from __future__ import annotations

import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from murmur.checking import show_finding
from murmur.clients.check import Report
from murmur.clients.finding import Finding, green, red, yellow
from murmur.clients.identity import load_identity
from murmur.clients.reach import reach
from murmur.clients.record import FILE as RECORD
from murmur.clients.record import Record
from murmur.clients.settings import FILE, Policy, Settings, load_settings
from murmur.clients.switch import FILE as STOPPED
from murmur.clients.switch import Switch
from murmur.output import FAILED, print_json, print_table
from murmur.protocol.errors import OperatorError

UNIT = """[Unit]
Description=Murmur agent
After=network-online.target
Wants=network-online.target
StartLimitIntervalSec=0

[Service]
ExecStart={command} client join --dir {directory}
User={user}
UMask=0077
ReadWritePaths={directory}{data}
Restart=always
RestartSec=5
KillMode=mixed
TimeoutStopSec=30
LimitNOFILE=65536
NoNewPrivileges=yes
ProtectSystem=strict
ProtectHome={home}
PrivateTmp=yes
ProtectKernelTunables=yes
ProtectControlGroups=yes
RestrictSUIDSGID=yes
CapabilityBoundingSet=

[Install]
WantedBy=multi-user.target
"""


def show_policy(directory: Path, *, as_json: bool) -> None:
    """Each setting of the site's policy with what it means, and whether it was set here."""
    policy = load_settings(directory).policy
    if as_json:
        return print_json(policy.model_dump(mode="json"))
    rows = [
        (name, _value(getattr(policy, name)), "" if name in policy.model_fields_set else "default", field.description)
        for name, field in Policy.model_fields.items()
    ]
    print_table(f"Policy of {directory / FILE}", ("setting", "value", "", "meaning"), rows)


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(sorted(value)) or "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def show_status(directory: Path, *, as_json: bool) -> int:
    """How this client stands, line by line; 1 when it cannot take part."""
    settings = load_settings(directory)
    report = Report((lambda finding: None) if as_json else show_finding)
    report.add(*local(settings))
    reach(settings, report)
    if as_json:
        print_json(report.to_json() | {"client": settings.name, "findings": [asdict(f) for f in report.findings]})
    return 0 if report.ok else FAILED


def local(settings: Settings) -> list[Finding]:
    """What can be said of a client without asking its coordinator."""
    identity = load_identity(settings.key_file)
    found = [green("client", f"{settings.name}, key {identity.fingerprint}")]
    if pid := running(settings.directory):
        found.append(green("agent", f"runs as process {pid}"))
    else:
        found.append(yellow("agent", "does not run", f"murmur client join --dir {settings.directory}"))
    if stopped := Switch(settings.directory).stopped():
        said = f"since {stopped.at}, by {stopped.by}" if stopped.at else f"by the file {STOPPED}"
        found.append(yellow("stopped", said, f"murmur client resume --dir {settings.directory}"))
    for run in waiting(settings):
        found.append(yellow("consent", f"run {run} waits", f"murmur client approve {run} --dir {settings.directory}"))
    if not settings.tasks:
        todo = f'add [tasks.NAME] with reference = "file.py:Class" to {settings.directory / FILE}'
        return [*found, red("tasks", "none is installed, so no run can ask for one", todo)]
    return [*found, green("tasks", ", ".join(f"{name} ({e.reference})" for name, e in sorted(settings.tasks.items())))]


def waiting(settings: Settings) -> list[str]:
    """The runs that wait for this site's consent."""
    record = Record(settings.directory / RECORD)
    try:
        return [c.run for c in record.consents() if c.state == "waiting"]
    finally:
        record.close()


def running(directory: Path, locks: Path = Path("/proc/locks")) -> int | None:
    """The agent of a client's folder, which holds its lock. It is looked up, not tried, which would be in its way."""
    try:
        inode = (directory / "agent.lock").stat().st_ino
        lines = locks.read_text().splitlines()
    except OSError:
        return None
    for fields in map(str.split, lines):  # "1: FLOCK  ADVISORY  WRITE 4711 08:01:1234 0 EOF"
        if len(fields) > 5 and fields[1] == "FLOCK" and fields[5].rpartition(":")[2] == str(inode):
            return int(fields[4])
    return None


def unit(directory: Path, user: str, data: tuple[Path, ...]) -> str:
    """A systemd unit for the agent of a folder. data: folders that it may read and not write."""
    settings = load_settings(directory)
    command = shutil.which("murmur") or f"{sys.executable} -m murmur"
    for path in (directory, *data):
        if any(c in str(path) for c in " \"'%\\\n"):
            raise OperatorError(f"{path} has a character that systemd reads in its own way: use another folder")
    homes = [path for path in (directory, *data) if path.is_relative_to("/home") or path.is_relative_to("/root")]
    home = "read-only" if homes else "yes"
    readable = "".join(f"\nReadOnlyPaths=-{path}" for path in data)
    return UNIT.format(command=command, directory=settings.directory, user=user, data=readable, home=home)
