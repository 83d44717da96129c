"""Enrolment: an organization turns its invitation into an identity of its own, and a directory for its agent."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import httpx
from pydantic import ValidationError

from ..protocol.errors import OperatorError, Unavailable
from ..protocol.joining import Join, parse_join
from ..protocol.messages import AgentInfo, Enrol, Enrolled
from .identity import create_identity, load_identity
from .link import Link
from .record import FILE as RECORD
from .record import Record
from .settings import (
    FILE,
    Policy,
    Settings,
    TaskEntry,
    absolute_reference,
    load_settings,
    parse_settings,
    write_settings,
)
from .transport import make_transport

_PEM_BYTES = 65_536


def enrol(
    join: str,
    directory: Path,
    *,
    name: str,
    tasks: Mapping[str, TaskEntry] | None = None,
    processes: int | Literal["auto"] = "auto",
    policy: Policy | None = None,
    proxy: str = "",
    new_key: bool = False,
    transport: httpx.BaseTransport | None = None,
) -> Enrolled:
    """Make this client's directory: identity.pem, ca.pem and client.toml; returns its state and its key's fingerprint.

    The invitation is used up by the first call that the coordinator took; one that was cut short may be repeated with
    the same directory, for the key is kept. tasks: a file in a reference is looked for from the current folder on.
    new_key: the client is there and stays as it is, but for its key, which an admin has revoked: it is replaced once
    the coordinator has taken the new one. transport: for tests, in place of the network.
    Raises OperatorError for what the person in front of it can change, Unavailable when the coordinator cannot be
    reached, and NotAuthenticated or NotAllowed when it does not take the invitation.
    """
    invitation = parse_join(join)
    values = {
        "name": name,
        "coordinator": invitation.url,
        "processes": processes,
        "proxy": proxy,
        "policy": (policy or Policy()).model_dump(),
        "tasks": {
            task: {"reference": absolute_reference(entry.reference, Path.cwd()), "options": entry.options}
            for task, entry in (tasks or {}).items()
        },
    }
    settings = load_settings(directory) if new_key else parse_settings(values, directory, where="enrolment")
    if new_key and (settings.name, settings.coordinator) != (name, invitation.url):
        raise OperatorError(f"{directory} is {settings.name} of {settings.coordinator}, this is for another one")
    if (directory / FILE).exists() and not new_key:
        raise OperatorError(f"{directory / FILE} exists already: this client is enrolled; run its agent")
    _make_directory(directory)
    key_file = settings.key_file.with_suffix(".new.pem") if new_key else settings.key_file
    identity = load_identity(key_file) if key_file.exists() else create_identity(key_file)
    if invitation.pinned:
        settings.ca_file.write_text(fetch_ca(invitation, proxy=proxy, transport=transport))
    link = Link(
        invitation.url,
        name=settings.name,
        identity=identity,
        ca=settings.ca_file if invitation.pinned else None,
        proxy=proxy,
        transport=transport,
    )
    record = Record(directory / RECORD)
    link.before_sending = record.leaves
    try:
        message = Enrol(
            token=invitation.token, name=settings.name, public_key=identity.public_b64, info=agent_info(settings)
        )
        enrolled = link.enrol(message)
    finally:
        link.close()
        record.close()
    if new_key:
        key_file.replace(settings.key_file)
    else:
        write_settings(settings)
    return enrolled


def _make_directory(directory: Path) -> None:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise OperatorError(f"cannot make the directory {directory}: {error.strerror}") from None


def fetch_ca(invitation: Join, *, proxy: str = "", transport: httpx.BaseTransport | None = None) -> str:
    """The coordinator's CA certificate in PEM, believed only because its fingerprint stands in the invitation."""
    assert invitation.pinned
    transport = transport or make_transport(None, proxy=proxy, verify=False)
    try:
        with (
            httpx.Client(base_url=invitation.url, transport=transport, timeout=20) as http,
            http.stream("GET", "/v1/ca") as response,
        ):
            data = b""
            for chunk in response.iter_raw():
                data += chunk
                if len(data) > _PEM_BYTES:
                    break
            status = response.status_code
    except httpx.TransportError as error:
        raise Unavailable(f"cannot reach {invitation.url}: {type(error).__name__}: {error}") from None
    pem = data.decode("ascii", "replace")
    found = _der_sha256(pem)
    if status != 200 or found is None:
        raise OperatorError(f"{invitation.url} gave no CA certificate (status {status}): is it a Murmur coordinator?")
    if found != invitation.ca:
        raise OperatorError(
            f"{invitation.url} shows a CA with the fingerprint {found}, the invitation says {invitation.ca}: another "
            "machine answers, or the join string is of another coordinator. Nothing was sent to it"
        )
    return pem


def _der_sha256(pem: str) -> str | None:
    begin, end = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
    pem = pem.strip()
    if not pem.startswith(begin) or not pem.endswith(end):
        return None
    try:
        # Strict, so exactly one: a second certificate would be believed too, and nobody compared its fingerprint.
        der = base64.b64decode("".join(pem[len(begin) : -len(end)].split()), validate=True)
    except ValueError:
        return None
    return hashlib.sha256(der).hexdigest()


def agent_info(settings: Settings) -> AgentInfo:
    """What this agent says of itself."""
    try:
        version = importlib.metadata.version("murmur")
    except importlib.metadata.PackageNotFoundError:
        version = "unknown"
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        return AgentInfo(version=version, tasks=tuple(sorted(settings.tasks)), gpus=_gpus(), cpus=cpus)
    except ValidationError as error:
        raise OperatorError(f"this machine cannot be described: {error}") from None


def _gpus() -> tuple[str, ...]:
    """Names of the GPUs as the driver's own tool gives them; an agent does not load torch to ask."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(line.strip()[:200] for line in found.stdout.splitlines()[:64] if line.strip())
