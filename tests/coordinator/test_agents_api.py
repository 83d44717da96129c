"""What the coordinator refuses over HTTP: each with its code, and with nothing changed."""

import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fastapi.testclient import TestClient
from sqlalchemy import func, select

from murmur.coordinator.app import create_app
from murmur.coordinator.http import MAX_BODY_BYTES, Parts
from murmur.coordinator.people import hash_token
from murmur.coordinator.settings import Settings
from murmur.coordinator.store.signs import Seen
from murmur.coordinator.store import tables
from murmur.protocol.encoding import b64
from murmur.protocol.messages import Assignment
from murmur.protocol.recipe import parse_recipe
from murmur.protocol.signatures import sign
from murmur.protocol.tensors import Layout, TensorSpec, write_file

from .harness import MODEL, plain_file

BASE = "http://127.0.0.1"
INFO = {"version": "t", "tasks": ["t"]}
PLAIN = {"name": "t", "task": "t", "rounds": 1, "cohort": {"min": 3}, "secure": {"on": False}}


class Caller:
    """One enrolled organization, calling as raw HTTP as it can be."""

    def __init__(self, http: TestClient, name: str) -> None:
        self.http, self.name, self.key, self.token = http, name, Ed25519PrivateKey.generate(), ""
        self.nonces = 0

    @property
    def public(self) -> str:
        return b64(self.key.public_key().public_bytes_raw())

    def headers(self, path: str, body: bytes, **changes: Any) -> dict[str, str]:
        self.nonces += 1
        given = {
            "key": self.key,
            "keyid": self.name,
            "created": int(time.time()),
            "nonce": self.nonces.to_bytes(16, "big"),
        }
        return sign("POST", BASE + path, body, **(given | changes)) | {"Murmur-Protocol": "1"}

    def signed(self, path: str, message: Any, **changes: Any) -> httpx.Response:
        body = message if isinstance(message, bytes) else json.dumps(message).encode()
        return self.http.post(path, content=body, headers=self.headers(path, body, **changes))

    def get(self, path: str) -> httpx.Response:
        return self.http.get(path, headers=self.bearer)

    @property
    def bearer(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}", "Murmur-Protocol": "1"}

    def log_in(self) -> None:
        self.token = self.signed("/v1/token", {}).json()["token"]

    def poll(self) -> Assignment:
        answer = self.http.post("/v1/poll", json={"info": INFO}, headers=self.bearer).json()
        return Assignment.model_validate(answer["assignment"])


@pytest.fixture
def http(tmp_path: Path) -> Iterator[TestClient]:
    """The real app; its lifespan is left out, so that no thread moves rounds but the tests."""
    app = create_app(Settings(data=tmp_path, insecure_http=True))
    yield TestClient(app, base_url=BASE)
    app.state.parts.store.close()


@pytest.fixture
def parts(http: TestClient) -> Parts:
    return http.app.state.parts  # pyright: ignore


def enrolled(http: TestClient, parts: Parts, name: str, *, approve: bool = True) -> Caller:
    caller = Caller(http, name)
    token = f"{name}-invitation-token"
    parts.store.clients.invite(name, hash_token(token), by="admin", lifetime_s=60)
    message = {"token": token, "name": name, "public_key": caller.public, "info": INFO}
    assert caller.signed("/v1/enrol", message).json()["state"] == "pending"
    if approve:
        parts.service.approve(name, "admin")
        caller.log_in()
    return caller


@pytest.fixture
def callers(http: TestClient, parts: Parts) -> list[Caller]:
    """Three organizations with an assignment each, in a plain round that is collecting."""
    made = [enrolled(http, parts, name) for name in "abc"]
    for caller in made:
        parts.store.signs.note([Seen(caller.name, {})], [])
    with parts.blobs.new() as path:
        write_file(path, {t.name: np.zeros(t.shape, np.float32) for t in MODEL.tensors}, MODEL)
        size, sha256 = path.stat().st_size, parts.blobs.adopt(path)
    parts.store.runs.start("run", parse_recipe(PLAIN), sha256=sha256, size=size, by="admin")
    tick(parts)
    return made


def tick(parts: Parts) -> None:
    from murmur.coordinator.conductor import Conductor

    from .harness import Inline

    conductor = Conductor(parts.store, parts.blobs, parts.hub, Inline(parts.blobs), clock=time.time)
    for _ in range(3):
        conductor.tick()


def facts(parts: Parts) -> tuple[int, ...]:
    """How many rows there are of everything that a request could add."""
    counted = (tables.client, tables.update, tables.answer, tables.event, tables.upload, tables.bearer)
    with parts.store.db.read() as c:
        return tuple(c.scalar(select(func.count()).select_from(table)) or 0 for table in counted)


def refused(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    return answer.json()


def upload(caller: Caller, assignment: Assignment, data: bytes, **message: Any) -> httpx.Response:
    """Announce, send and complete an update; the answer is the first refusal or the last word."""
    path, digest = f"/v1/assignments/{assignment.id}", hashlib.sha256(data).hexdigest()
    offer = {"fence": assignment.fence, "sha256": digest, "size": len(data)}
    answer = caller.signed(f"{path}/upload", offer)
    if answer.status_code != 200:
        return answer
    sent = caller.http.patch(
        f"{path}/upload?fence={assignment.fence}", content=data, headers=caller.bearer | {"Upload-Offset": "0"}
    )
    if sent.status_code != 200:
        return sent
    given = {"fence": assignment.fence, "sha256": digest, "weight": 1.0, "metrics": {}} | message
    return caller.signed(f"{path}/complete", given)


def good() -> bytes:
    return plain_file(MODEL.update(), 0.5)


def test_a_good_update_is_accepted_and_repeating_every_request_changes_nothing(parts: Parts, callers: list[Caller]):
    assignment = callers[0].poll()
    assert upload(callers[0], assignment, good()).json() == {"accepted": True}
    before = facts(parts)
    data = good()
    digest = hashlib.sha256(data).hexdigest()
    complete = {"fence": 1, "sha256": digest, "weight": 1.0, "metrics": {}}
    assert callers[0].signed(f"/v1/assignments/{assignment.id}/complete", complete).json() == {"accepted": True}
    assert facts(parts) == before


def test_an_unknown_client_is_refused(http: TestClient, parts: Parts):
    before = facts(parts)
    refused(Caller(http, "nobody").signed("/v1/token", {}), 401, "not_authenticated")
    assert facts(parts) == before


def test_a_request_signed_with_another_key_is_refused(http: TestClient, parts: Parts):
    caller = enrolled(http, parts, "a")
    refused(caller.signed("/v1/token", {}, key=Ed25519PrivateKey.generate()), 401, "not_authenticated")


def test_a_signature_over_another_body_or_path_is_refused(http: TestClient, parts: Parts):
    caller = enrolled(http, parts, "a")
    headers = caller.headers("/v1/token", b"{}")
    refused(http.post("/v1/token", content=b"{ }", headers=headers), 401, "not_authenticated")
    refused(http.post("/v1/enrol", content=b"{}", headers=headers), 422, "bad_request")


def test_a_replayed_request_is_refused(http: TestClient, parts: Parts):
    caller = enrolled(http, parts, "a")
    headers = caller.headers("/v1/token", b"{}")
    assert http.post("/v1/token", content=b"{}", headers=headers).status_code == 200
    before = facts(parts)
    refused(http.post("/v1/token", content=b"{}", headers=headers), 401, "replayed")
    refused(caller.signed("/v1/token", {}, created=int(time.time()) - 400), 401, "replayed")
    assert facts(parts) == before


def test_a_pending_client_gets_no_token_and_a_revoked_one_loses_its_own(http: TestClient, parts: Parts):
    caller = enrolled(http, parts, "a", approve=False)
    refused(caller.signed("/v1/token", {}), 403, "not_approved")
    parts.service.approve("a", "admin")
    caller.log_in()
    parts.service.revoke("a", "admin")
    poll = http.post("/v1/poll", json={"info": INFO}, headers=caller.bearer)
    refused(poll, 401, "not_authenticated")
    refused(caller.signed("/v1/token", {}), 401, "not_authenticated")


def test_an_invitation_enrols_one_key_once_and_under_its_name_only(http: TestClient, parts: Parts):
    parts.store.clients.invite("a", hash_token("a-token-of-many-letters"), by="admin", lifetime_s=60)

    def enrol(caller: Caller, name: str, token: str) -> httpx.Response:
        message = {"token": token, "name": name, "public_key": caller.public, "info": INFO}
        return caller.signed("/v1/enrol", message, keyid=name)

    first, second = Caller(http, "a"), Caller(http, "a")
    refused(enrol(first, "b", "a-token-of-many-letters"), 401, "not_authenticated")
    refused(enrol(first, "a", "another-token-of-letters"), 401, "not_authenticated")
    assert enrol(first, "a", "a-token-of-many-letters").status_code == 200
    assert enrol(first, "a", "a-token-of-many-letters").status_code == 200  # the same agent, repeating itself
    refused(enrol(second, "a", "a-token-of-many-letters"), 401, "not_authenticated")


def test_enrolment_needs_proof_that_the_key_is_held(http: TestClient, parts: Parts):
    caller = Caller(http, "a")
    parts.store.clients.invite("a", hash_token("a-token-of-many-letters"), by="admin", lifetime_s=60)
    message = {"token": "a-token-of-many-letters", "name": "a", "public_key": caller.public, "info": INFO}
    refused(caller.signed("/v1/enrol", message, key=Ed25519PrivateKey.generate()), 401, "not_authenticated")
    assert parts.store.clients.all() == []


def test_somebody_elses_assignment_is_refused(parts: Parts, callers: list[Caller]):
    assignment = callers[0].poll()
    before = facts(parts)
    refused(upload(callers[1], assignment, good()), 403, "not_allowed")
    refused(callers[1].get(f"/v1/assignments/{assignment.id}/step?fence=1"), 403, "not_allowed")
    refused(callers[1].get("/v1/assignments/none/step?fence=1"), 404, "not_found")
    assert facts(parts) == before


def test_a_blob_that_a_client_was_not_asked_to_work_on_is_refused(parts: Parts, callers: list[Caller]):
    assignment = callers[0].poll()
    assert callers[0].get(f"/v1/blobs/{assignment.model}").status_code == 200
    with parts.blobs.new() as path:
        path.write_bytes(b"secret")
        sha256 = parts.blobs.adopt(path)
    refused(callers[0].get(f"/v1/blobs/{sha256}"), 403, "not_allowed")


def changed(*tensors: TensorSpec) -> bytes:
    return plain_file(Layout(tensors), 0.5)


B, W = MODEL.update().tensors
# Files of the right size with a wrong inside: a smaller or larger one is refused before a byte is sent.
BAD_INSIDE = {
    "a missing and an extra tensor": (changed(TensorSpec("c", "F32", (2,)), W), "missing"),
    "a wrong shape": (changed(B, TensorSpec("w", "F32", (3, 2))), "shape"),
    "a wrong dtype": (changed(B, TensorSpec("w", "I32", (2, 3))), "dtype"),
    "NaN": (good()[:-4] + np.float32(np.nan).tobytes(), "nan"),
    "infinity": (good()[:-4] + np.float32(np.inf).tobytes(), "inf"),
    "no safetensors at all": (b"x" * len(good()), "header"),
}


@pytest.mark.parametrize("what", BAD_INSIDE)
def test_a_bad_update_fails_its_assignment_and_the_round_goes_on(parts: Parts, callers: list[Caller], what: str):
    data, word = BAD_INSIDE[what]
    assert len(data) == len(good())
    work = [caller.poll() for caller in callers]
    problem = refused(upload(callers[0], work[0], data), 422, "bad_update")
    assert word in problem["detail"].lower()
    rounds = parts.service.run("run").rounds
    assert rounds[0].assignments[0].state == "failed"
    assert "refused" in rounds[0].assignments[0].reason
    refused(upload(callers[0], work[0], good()), 410, "too_late")
    assert parts.service.run("run").run.state == "running"


def test_an_update_with_a_tensor_too_few_or_too_many_is_refused_before_it_is_sent(callers: list[Caller]):
    assignment = callers[0].poll()
    refused(upload(callers[0], assignment, changed(B)), 422, "bad_update")
    extra = TensorSpec("x", "F32", (1,))
    refused(upload(callers[0], assignment, changed(B, W, extra)), 413, "too_large")


def test_more_bytes_than_announced_are_refused(parts: Parts, callers: list[Caller]):
    assignment, data = callers[0].poll(), good()
    path, digest = f"/v1/assignments/{assignment.id}/upload", hashlib.sha256(good()).hexdigest()
    assert callers[0].signed(path, {"fence": 1, "sha256": digest, "size": len(data)}).status_code == 200
    headers = callers[0].bearer | {"Upload-Offset": "0"}
    refused(callers[0].http.patch(f"{path}?fence=1", content=data + b"x", headers=headers), 413, "too_large")
    assert callers[0].get(f"{path}?fence=1").json()["offset"] == 0


def test_an_oversized_message_is_refused_whatever_it_says(callers: list[Caller]):
    body = b'{"info": "' + b"x" * MAX_BODY_BYTES + b'"}'
    refused(callers[0].http.post("/v1/poll", content=body, headers=callers[0].bearer), 413, "too_large")


def test_an_upload_goes_on_at_its_byte_and_another_offset_is_told_where(callers: list[Caller]):
    assignment, data = callers[0].poll(), good()
    path, digest = f"/v1/assignments/{assignment.id}/upload", hashlib.sha256(data).hexdigest()
    callers[0].signed(path, {"fence": 1, "sha256": digest, "size": len(data)})
    patch = callers[0].http.patch
    assert patch(f"{path}?fence=1", content=data[:7], headers=callers[0].bearer | {"Upload-Offset": "0"}).json() == {
        "offset": 7,
        "size": len(data),
    }
    wrong = patch(f"{path}?fence=1", content=data, headers=callers[0].bearer | {"Upload-Offset": "0"})
    assert refused(wrong, 409, "wrong_offset")["offset"] == 7
    rest = patch(f"{path}?fence=1", content=data[7:], headers=callers[0].bearer | {"Upload-Offset": "7"})
    assert rest.json()["offset"] == len(data)


def test_a_late_update_is_refused(parts: Parts, callers: list[Caller]):
    work = [caller.poll() for caller in callers]
    parts.service.stop_run("run", "admin")
    refused(upload(callers[0], work[0], good()), 410, "too_late")


def test_another_update_than_the_first_is_refused(parts: Parts, callers: list[Caller]):
    assignment = callers[0].poll()
    upload(callers[0], assignment, good())
    before = facts(parts)
    second = plain_file(MODEL.update(), 0.25)
    complete = {"fence": 1, "sha256": hashlib.sha256(second).hexdigest(), "weight": 1.0, "metrics": {}}
    refused(callers[0].signed(f"/v1/assignments/{assignment.id}/complete", complete), 409, "conflict")
    assert facts(parts) == before


def test_a_weight_above_the_runs_cap_and_metrics_it_does_not_have_are_refused(callers: list[Caller]):
    work = [caller.poll() for caller in callers]
    refused(upload(callers[0], work[0], good(), weight=70_000), 422, "bad_update")
    refused(upload(callers[1], work[1], good(), metrics={"f1": {"sum": 1, "count": 1}}), 422, "bad_update")


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{", b'{"info": 1}', b'{"info": {"version": "t"}, "more": 1}', b"\xff", b'{"info": NaN}']
)
def test_a_body_that_is_not_the_message_is_refused(callers: list[Caller], body: bytes):
    refused(callers[0].http.post("/v1/poll", content=body, headers=callers[0].bearer), 422, "bad_request")


def test_another_version_of_the_protocol_is_refused_and_ours_is_stated(callers: list[Caller]):
    answer = callers[0].http.post("/v1/poll", json={"info": INFO}, headers=callers[0].bearer | {"Murmur-Protocol": "2"})
    assert refused(answer, 426, "protocol_mismatch")["speaks"] == [1]
    assert answer.headers["murmur-protocol"] == "1"


def test_a_secure_answer_in_a_plain_round_is_refused(callers: list[Caller]):
    assignment = callers[0].poll()
    refused(callers[0].signed(f"/v1/assignments/{assignment.id}/answers/advert?fence=1", {}), 422, "bad_request")
    refused(callers[0].signed(f"/v1/assignments/{assignment.id}/answers/hello?fence=1", {}), 422, "bad_request")
