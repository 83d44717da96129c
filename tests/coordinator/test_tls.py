"""The coordinator's own CA: made once, served by a chain that agents can verify, renewed before it expires."""

import datetime as dt
import ssl
from contextlib import suppress
from pathlib import Path

import pytest
from cryptography import x509

from murmur.coordinator import tls

NOW = dt.datetime(2030, 1, 1, tzinfo=dt.UTC)
HOSTS = ("coordinator.example", "127.0.0.1", "::1")


def test_the_ca_stays_and_the_certificate_is_made_anew_for_other_hosts_and_when_it_is_due(tmp_path: Path):
    first = tls.ensure(tmp_path, HOSTS, now=NOW)
    ca, chain = first.ca.read_bytes(), first.chain.read_bytes()
    assert tls.ensure(tmp_path, HOSTS, now=NOW + dt.timedelta(days=300)).chain.read_bytes() == chain
    due = tls.ensure(tmp_path, HOSTS, now=NOW + dt.timedelta(days=tls.SERVER_DAYS - tls.RENEW_DAYS + 1))
    assert due.chain.read_bytes() != chain
    more = tls.ensure(tmp_path, (*HOSTS, "other.example"), now=NOW)
    names = x509.load_pem_x509_certificate(more.chain.read_bytes()).extensions
    found = names.get_extension_for_class(x509.SubjectAlternativeName).value
    assert "other.example" in found.get_values_for_type(x509.DNSName)
    assert more.ca.read_bytes() == ca
    assert more.fingerprint == first.fingerprint


def test_keys_are_for_their_owner_only(tmp_path: Path):
    made = tls.ensure(tmp_path, HOSTS, now=NOW)
    for key in (made.key, tmp_path / "ca-key.pem"):
        assert key.stat().st_mode & 0o777 == 0o600


def shake_hands(made: tls.Certificates, trusted: Path, host: str) -> None:
    """A TLS handshake in memory between the chain and a client that trusts one CA file."""
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    server.load_cert_chain(made.chain, made.key)
    client.load_verify_locations(trusted)
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    a = client.wrap_bio(down, up, server_hostname=host)
    b = server.wrap_bio(up, down, server_side=True)
    for _ in range(4):
        for side in (a, b):
            with suppress(ssl.SSLWantReadError):
                side.do_handshake()


def test_a_client_that_pins_the_ca_takes_this_server_and_no_other(tmp_path: Path):
    now = dt.datetime.now(dt.UTC)
    made, other = tls.ensure(tmp_path / "a", HOSTS, now=now), tls.ensure(tmp_path / "b", HOSTS, now=now)
    for host in HOSTS:
        shake_hands(made, made.ca, host)
    with pytest.raises(ssl.SSLCertVerificationError, match=r"IP address|Hostname"):
        shake_hands(made, made.ca, "elsewhere.example")
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(other, made.ca, HOSTS[0])
