import json
import stat
import time

import httpx
import pytest

from murmur.clients import channel
from murmur.clients.enrolment import agent_info, enrol
from murmur.clients.identity import load_identity
from murmur.clients.link import Link
from murmur.clients.settings import TaskEntry, load_settings, parse_settings
from murmur.protocol.encoding import unb64
from murmur.protocol.errors import NotAllowed, OperatorError, Unavailable
from murmur.protocol.joining import format_join
from murmur.protocol.messages import AgentInfo, Enrol, Poll
from murmur.protocol.signatures import verify

from .servers import Authority, serve

TOKEN = "a-token-of-an-invitation"


class Enrolling:
    """The coordinator's side of an enrolment; `state` is what it makes of the client."""

    def __init__(self, ca_pem=b""):
        self.ca_pem, self.seen, self.paths, self.lose = ca_pem, [], [], 0

    def handle(self, request):
        headers = {"Murmur-Protocol": "1"}
        self.paths.append(request.url.path)
        if request.url.path == "/v1/ca":
            return httpx.Response(200, content=self.ca_pem)
        if request.url.path == "/v1/token":
            return httpx.Response(200, json={"token": "t", "expires_s": 60}, headers=headers)
        if request.url.path == "/v1/poll":
            return httpx.Response(200, json={}, headers=headers)
        message = Enrol.model_validate_json(request.content)
        key = unb64(message.public_key)
        target = request.url.raw_path.decode()
        found = verify("POST", target, request.headers, request.content, public_key_of=lambda _: key, now=time.time())
        assert found.keyid == message.name
        if message.token != TOKEN:
            return httpx.Response(403, json={"code": "not_allowed", "status": 403, "detail": "used"}, headers=headers)
        self.seen.append(message)
        if self.lose:
            self.lose -= 1
            raise httpx.ReadError("reset")
        return httpx.Response(
            200, json={"client": message.name, "state": "pending", "fingerprint": "f"}, headers=headers
        )


def join_of(url, ca=None, token=TOKEN):
    host, _, port = url.rpartition("/")[2].rpartition(":")
    return format_join(token=token, host=host, port=int(port), ca=ca)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(channel, "BACKOFF_S", 0.01)


@pytest.fixture
def authority():
    return Authority.new()


def test_an_organization_enrols_and_its_directory_is_ready(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    server, home = Enrolling(), tmp_path / "site"
    tasks = {"xray": TaskEntry(reference="xray.py:XRay", options={"folder": "/data"})}
    with serve(server.handle) as url:
        enrolled = enrol(join_of(url), home, name="alpha", tasks=tasks)
    assert (enrolled.client, enrolled.state) == ("alpha", "pending")
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    settings, identity = load_settings(home), load_identity(home / "identity.pem")
    assert (settings.name, settings.coordinator, settings.policy.require_secure) == ("alpha", url, True)
    assert settings.tasks["xray"].reference == f"{tmp_path}/xray.py:XRay"
    (message,) = server.seen
    assert message.public_key == identity.public_b64 and message.info.tasks == ("xray",)
    assert not (home / "ca.pem").exists()
    assert TOKEN not in (home / "client.toml").read_text()


def test_over_tls_the_ca_is_pinned_and_from_then_on_no_other_is_believed(tmp_path, authority):
    server, home = Enrolling(authority.pem), tmp_path / "site"
    with serve(server.handle, certificate=authority.issue(tmp_path / "server.pem")) as url:
        enrol(join_of(url, authority.fingerprint), home, name="alpha")
        assert (home / "ca.pem").read_bytes() == authority.pem
        link = Link(url, name="alpha", identity=load_identity(home / "identity.pem"), ca=home / "ca.pem")
        link.poll(Poll(info=AgentInfo(version="1")))
        link.close()
        (tmp_path / "other.pem").write_bytes(Authority.new().pem)
        assert refused(url, home, tmp_path / "other.pem")


def refused(url, home, ca):
    """Whether a link that believes this CA does not get through, for the certificate's sake."""
    link = Link(url, name="alpha", identity=load_identity(home / "identity.pem"), ca=ca)
    try:
        with pytest.raises(Unavailable, match="CERTIFICATE_VERIFY_FAILED"):
            link.signed("/v1/token", b"{}", Enrol, tries=1)
    finally:
        link.close()
    return True


def test_another_machine_with_a_ca_of_its_own_hears_no_token(tmp_path, authority):
    other = Authority.new()
    server, home = Enrolling(other.pem), tmp_path / "site"
    with (
        serve(server.handle, certificate=other.issue(tmp_path / "server.pem")) as url,
        pytest.raises(OperatorError, match=f"the invitation says {authority.fingerprint}"),
    ):
        enrol(join_of(url, authority.fingerprint), home, name="alpha")
    assert server.paths == ["/v1/ca"]
    assert not (home / "ca.pem").exists() and not (home / "client.toml").exists()


def test_a_machine_that_copies_the_ca_certificate_but_has_no_key_of_it_hears_no_token(tmp_path, authority):
    other = Authority.new()
    server, home = Enrolling(authority.pem), tmp_path / "site"
    with (
        serve(server.handle, certificate=other.issue(tmp_path / "server.pem")) as url,
        pytest.raises(Unavailable, match="CERTIFICATE_VERIFY_FAILED"),
    ):
        enrol(join_of(url, authority.fingerprint), home, name="alpha")
    assert server.paths == ["/v1/ca"]


def test_a_certificate_for_another_host_is_refused(tmp_path, authority):
    server, home = Enrolling(authority.pem), tmp_path / "site"
    with (
        serve(server.handle, certificate=authority.issue(tmp_path / "server.pem", "10.1.2.3")) as url,
        pytest.raises(Unavailable, match="IP address mismatch"),
    ):
        enrol(join_of(url, authority.fingerprint), home, name="alpha")


def test_a_second_certificate_beside_the_right_one_is_refused(tmp_path, authority):
    server = Enrolling(authority.pem + Authority.new().pem)
    with (
        serve(server.handle, certificate=authority.issue(tmp_path / "server.pem")) as url,
        pytest.raises(OperatorError, match="gave no CA certificate"),
    ):
        enrol(join_of(url, authority.fingerprint), tmp_path / "site", name="alpha")


def test_an_invitation_that_is_used_up_is_said_and_can_be_replaced(tmp_path):
    server, home = Enrolling(), tmp_path / "site"
    with serve(server.handle) as url:
        with pytest.raises(NotAllowed, match="used"):
            enrol(join_of(url, token="another-token-entirely"), home, name="alpha")
        key = load_identity(home / "identity.pem").public_key
        enrol(join_of(url), home, name="alpha")
    assert load_identity(home / "identity.pem").public_key == key


def test_a_lost_reply_does_not_use_up_the_invitation_for_nothing(tmp_path):
    server = Enrolling()
    server.lose = 2
    with serve(server.handle) as url:
        enrol(join_of(url), tmp_path / "site", name="alpha")
    assert len(server.seen) == 3 and len({m.public_key for m in server.seen}) == 1


def test_a_client_is_enrolled_once(tmp_path):
    server = Enrolling()
    with serve(server.handle) as url:
        enrol(join_of(url), tmp_path / "site", name="alpha")
        with pytest.raises(OperatorError, match="is enrolled; run its agent"):
            enrol(join_of(url), tmp_path / "site", name="alpha")


def test_what_the_person_typed_wrong_is_said_before_anything_is_sent(tmp_path):
    server = Enrolling()
    with serve(server.handle) as url:
        with pytest.raises(OperatorError, match="enrolment: name: String should match"):
            enrol(join_of(url), tmp_path / "site", name="Alpha Clinic")
        with pytest.raises(OperatorError, match="begins with murmur://"):
            enrol(url, tmp_path / "site", name="alpha")
    assert server.paths == [] and not (tmp_path / "site").exists()


def test_an_address_where_nobody_answers_is_said(tmp_path, authority):
    with pytest.raises(Unavailable, match=r"cannot reach https://127\.0\.0\.1:9"):
        enrol(f"murmur://{TOKEN}@127.0.0.1:9?ca={authority.fingerprint}", tmp_path / "site", name="alpha")


def test_an_agent_describes_its_machine(tmp_path):
    values = {
        "name": "a",
        "coordinator": "https://h:1",
        "tasks": {"b": {"reference": "x:Y"}, "a": {"reference": "x:Y"}},
    }
    info = agent_info(parse_settings(values, tmp_path))
    assert info.tasks == ("a", "b") and info.cpus >= 1 and info.version
    assert json.loads(info.model_dump_json())


def test_a_revoked_client_gets_a_new_key_and_keeps_all_else(tmp_path):
    server, home = Enrolling(), tmp_path / "site"
    config, key = home / "client.toml", home / "identity.pem"
    with serve(server.handle) as url:
        enrol(join_of(url), home, name="alpha")
        config.write_text(config.read_text() + "# a note of ours\n")
        before, first = config.read_text(), key.read_bytes()
        with pytest.raises(NotAllowed, match="used"):
            enrol(join_of(url, token="another-token-entirely"), home, name="alpha", new_key=True)
        assert key.read_bytes() == first  # who is refused still has its key
        server.lose = 2
        enrol(join_of(url), home, name="alpha", new_key=True)
        with pytest.raises(OperatorError, match="another one"):
            enrol(join_of(url), home, name="beta", new_key=True)
    old, *new = (m.public_key for m in server.seen)
    assert old not in new and len(new) == 3 and len(set(new)) == 1
    assert load_identity(key).public_b64 == new[0]
    assert config.read_text() == before
