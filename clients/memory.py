"""What a site remembers between rounds, in two small files: whom it met, and which sums it has helped to open."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..protocol.encoding import b64, canonical_json, fingerprint, sha256_hex, unb64
from ..protocol.errors import BadRequest, OperatorError, PrivacyRefusal
from ..protocol.messages import Assignment
from .durable import sync_folder
from .settings import Policy

KEPT = 10_000  # entries of each kind, a round with its evaluation takes two; 3 MB when full


class Memory:
    """A site's memory, safe for several threads; every change is on disk before the call returns."""

    def __init__(self, folder: Path) -> None:
        """folder: where peers.json and journal.json lie; raises OperatorError when one cannot be read."""
        self._peers_file, self._journal_file = folder / "peers.json", folder / "journal.json"
        self._lock = threading.Lock()
        try:
            self._peers = {str(name): unb64(key) for name, key in _read(self._peers_file).items()}
        except (BadRequest, TypeError):
            raise OperatorError(f"{self._peers_file} is not what this agent wrote: restore it, or delete it") from None
        journal = _read(self._journal_file)
        self._joined: dict[str, bool] = dict.fromkeys(journal.get("joined", []), True)
        self._summed = {key: _folded(clients) for key, clients in dict(journal.get("summed", {})).items()}
        self._computed = {key: _folded(clients) for key, clients in dict(journal.get("computed", {})).items()}

    @property
    def peers(self) -> dict[str, bytes]:
        """Identity keys of the clients met so far."""
        with self._lock:
            return dict(self._peers)

    def check_peers(self, peers: Mapping[str, bytes], policy: Policy) -> None:
        """Raise PrivacyRefusal unless each key is the one in the policy file, the one met before, or may be new."""
        for name, key in peers.items():
            listed, before = policy.key_is_trusted(name, key), self._peers.get(name)
            if listed is False or (listed is None and before is None and not policy.accept_new):
                raise PrivacyRefusal(
                    "untrusted", f"{name} takes part with the key {fingerprint(key)}, which this site does not trust"
                )
            if listed is None and before not in {None, key}:
                raise PrivacyRefusal(
                    "changed_key",
                    f"{name} takes part with the key {fingerprint(key)}, earlier it was {fingerprint(before or b'')}: "
                    f"ask that organization; if it has a new key, delete {name} from {self._peers_file.name}",
                )

    def remember_peers(self, peers: Mapping[str, bytes]) -> None:
        """Trust on first use: from now on these clients must show these keys."""
        with self._lock:
            if any(self._peers.get(name) != key for name, key in peers.items()):
                self._peers |= peers
                _write(self._peers_file, {name: b64(key) for name, key in sorted(self._peers.items())})

    def has_joined(self, context_sha256: str) -> bool:
        return context_sha256 in self._joined

    def join(self, context_sha256: str) -> None:
        """Note that keys were made for these terms: an agent that restarts must not take part a second time."""
        with self._lock:
            self._joined[context_sha256] = True
            self._write_journal()

    def check_sum(self, assignment: Assignment, clients: Iterable[str]) -> None:
        """Raise PrivacyRefusal when this site has helped to open a sum of the same update over other clients.

        Training is repeatable: a second attempt at a round, and a second run of the same recipe from the same model,
        bring the same update, and the difference between its sum over a cohort and its sum over the cohort without one
        client is that client's update. A client that was asked too late may find its update in a second sum that the
        others open, but no combination of such sums is one update: of each sum, the t honest clients that opened it
        open no other, so there are more of them to cancel than there are places in sums that others opened (2t > n).
        """
        with self._lock:
            self._check_sum(assignment, _folded(clients))

    def remember_sum(self, assignment: Assignment, clients: Iterable[str]) -> None:
        """Note whose updates are summed, before anything leaves that lets the sum be read.

        Checks again: of two runs at the same time, only the first may have asked before either was noted.
        """
        folded = _folded(clients)
        with self._lock:
            self._check_sum(assignment, folded)
            self._summed[_place(assignment)] = folded
            self._computed[_work(assignment)] = folded
            self._write_journal()

    def _check_sum(self, assignment: Assignment, folded: str) -> None:
        for before, what in (
            (self._summed.get(_place(assignment)), f"this site's update of round {assignment.round}"),
            (self._computed.get(_work(assignment)), "what this site computes on this model with these settings"),
        ):
            if before is not None and before != folded:
                raise PrivacyRefusal(
                    "summed_before",
                    f"{what} was summed over {before.partition(' ')[0]} clients; the difference to a sum over others "
                    "would tell more than either",
                )

    def _write_journal(self) -> None:
        for entries in (self._joined, self._summed, self._computed):
            for key in list(entries)[: max(0, len(entries) - KEPT)]:
                del entries[key]
        values = {"joined": list(self._joined), "summed": self._summed, "computed": self._computed}
        _write(self._journal_file, values)


def _place(assignment: Assignment) -> str:
    """One update, as a coordinator's word has it: whatever model and settings come with another attempt."""
    return f"{assignment.run}/{assignment.round}/{assignment.kind}"


def _work(assignment: Assignment) -> str:
    """One update, as what is computed: whatever run and round it is asked for in."""
    about = [assignment.task, assignment.kind, assignment.model, assignment.settings_sha256()]
    return sha256_hex(canonical_json(about))


def _folded(clients: Iterable[str] | str) -> str:
    """A set of clients in one line, however many they are: their number, and a digest of their names."""
    if isinstance(clients, str):
        return clients
    names = sorted(clients)
    return f"{len(names)} {sha256_hex(canonical_json(names))}"


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise OperatorError(f"cannot read {path}, which this agent remembers by: {error}") from None
    if not isinstance(found, dict):
        raise OperatorError(f"{path} is not what this agent wrote: restore it, or delete it")
    return found


def _write(path: Path, values: Mapping[str, Any]) -> None:
    """Replace the file in one step, so that a crash leaves the old one or the new one, and wait for the disk."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w") as file:
        json.dump(values, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)
