import base64
import hashlib

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from murmur.protocol.errors import NotAuthenticated, Replayed, Unavailable
from murmur.protocol.signatures import MAX_AGE_S, Verified, sign, verify

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = KEY.public_key().public_bytes_raw()
NOW = 1_700_000_000
BODY = b'{"a":1}'
URL = "/v1/assignments/a.1/complete?fence=3"
NONCE = bytes(range(16))


def signed(method="POST", url=URL, body=BODY, *, key=KEY, keyid="alpha", created=NOW, nonce=NONCE):
    return sign(method, url, body, key=key, keyid=keyid, created=created, nonce=nonce)


def checked(headers, method="POST", url=URL, body=BODY, *, now=NOW, keys=None):
    keys = {"alpha": PUBLIC} if keys is None else keys
    return verify(method, url, headers, body, public_key_of=keys.get, now=now)


def test_a_signed_request_is_known():
    assert checked(signed()) == Verified(keyid="alpha", nonce="AAECAwQFBgcICQoLDA0ODw==", created=NOW)


def test_the_headers_are_those_of_rfc_9421():
    headers = signed()
    digest = base64.b64encode(hashlib.sha256(BODY).digest()).decode()
    parameters = (
        '("@method" "@path" "@query" "content-digest");created=1700000000;keyid="alpha";'
        'nonce="AAECAwQFBgcICQoLDA0ODw==";tag="murmur-1"'
    )
    assert headers["Content-Digest"] == f"sha-256=:{digest}:"
    assert headers["Signature-Input"] == f"murmur={parameters}"
    base = (
        '"@method": POST\n"@path": /v1/assignments/a.1/complete\n"@query": ?fence=3\n'
        f'"content-digest": sha-256=:{digest}:\n"@signature-params": {parameters}'
    )
    signature = base64.b64decode(headers["Signature"].removeprefix("murmur=:").removesuffix(":"))
    Ed25519PublicKey.from_public_bytes(PUBLIC).verify(signature, base.encode())


def test_the_host_may_change_on_the_way():
    assert checked(signed(url="https://outside:443" + URL), url="http://10.0.0.1:8080" + URL).keyid == "alpha"


def test_header_names_have_no_case_and_empty_bodies_and_queries_are_signed_too():
    headers = {name.lower(): value for name, value in signed(url="/v1/token", body=b"").items()}
    assert checked(headers, url="/v1/token", body=b"").keyid == "alpha"


@pytest.mark.parametrize(
    "change",
    [
        {"method": "PUT"},
        {"url": URL.replace("a.1", "a.2")},
        {"url": URL.replace("fence=3", "fence=4")},
        {"url": URL + "&x=1"},
        {"url": URL.partition("?")[0]},
        {"body": BODY + b" "},
        {"body": b""},
        {"keys": {}},
        {"keys": {"alpha": Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33))).public_key().public_bytes_raw()}},
        {"keys": {"alpha": bytes(31)}},
        {"now": NOW - MAX_AGE_S - 1},
    ],
    ids=str,
)
def test_whatever_is_changed_the_request_is_unknown(change):
    with pytest.raises(NotAuthenticated) as refused:
        checked(signed(), **change)
    assert not isinstance(refused.value, Replayed)
    assert refused.value.detail == "Not authenticated"


EDITS = [
    lambda v: None,
    lambda v: "",
    lambda v: v[:-2],
    lambda v: v.replace("murmur=", "other="),
    lambda v: v + ", " + v,
    lambda v: v.replace("=:", "=:AAAA"),
    lambda v: v.replace("sha-256", "sha-512"),
    lambda v: v.replace("sha-256", "md5"),
    lambda v: v.replace("1700000000", "1700000001"),
    lambda v: v.replace("created=1700000000", "created=1700000000.5"),
    lambda v: v.replace("created=1700000000;", ""),
    lambda v: v.replace('keyid="alpha"', 'keyid="beta"'),
    lambda v: v.replace('keyid="alpha";', ""),
    lambda v: v.replace("murmur-1", "murmur-2"),
    lambda v: v.replace(';tag="murmur-1"', ""),
    lambda v: v.replace('nonce="', 'nonce="A'),
    lambda v: v.replace('"@path" ', ""),
    lambda v: v.replace('"@path"', '"@path" "@path"'),
    lambda v: v.replace('"@query"', '"@target-uri"'),
    lambda v: v.replace(";tag", ";expires=1800000000;tag"),
    lambda v: v.replace(";tag", ';alg="hmac-sha256";tag'),
    lambda v: "\x00" + v,
    lambda v: "(" * 10_000,
    lambda v: "é" + v,
]
HEADERS = ["Content-Digest", "Signature-Input", "Signature"]


@pytest.mark.parametrize(
    ("name", "value"), [(n, edit(signed()[n])) for n in HEADERS for edit in EDITS if edit(signed()[n]) != signed()[n]]
)
def test_a_header_that_was_tampered_with_is_refused(name, value):
    headers = {k: v for k, v in signed().items() if k != name} | ({name: value} if value is not None else {})
    with pytest.raises(NotAuthenticated):
        checked(headers)


@pytest.mark.parametrize(
    ("components", "parameters"),
    [
        (("@method", "@path", "content-digest"), {}),
        (("@method", "@path", "@query"), {}),
        (("@path", "@query", "content-digest"), {}),
        (("@method", "@query", "content-digest"), {}),
        (("@method", "@path", "@query", "content-digest"), {"nonce": None}),
        (("@method", "@path", "@query", "content-digest"), {"nonce": "AAAA"}),
        (("@method", "@path", "@query", "content-digest"), {"nonce": "not base64 but as long as a nonce"}),
        (("@method", "@path", "@query", "content-digest"), {"tag": None}),
        (("@method", "@path", "@query", "content-digest"), {"tag": "other"}),
        (("@method", "@path", "@query", "content-digest"), {"label": "other"}),
        (("@method", "@path", "@query", "content-digest"), {"expires": True}),
    ],
)
def test_a_right_signature_over_too_little_is_refused(components, parameters):
    from datetime import UTC, datetime

    from http_message_signatures import HTTPMessageSigner, MappingKeyResolver, algorithms

    class Request:
        method, url = "POST", "http://murmur" + URL

        def __init__(self):
            self.headers = {"Content-Digest": signed()["Content-Digest"]}

    if parameters.get("expires"):
        parameters = {"expires": datetime.fromtimestamp(4_000_000_000, UTC)}
    keys = MappingKeyResolver(public_keys={}, private_keys={"alpha": KEY})
    settings = {"nonce": "AAECAwQFBgcICQoLDA0ODw==", "tag": "murmur-1", "label": "murmur", **parameters}

    def signed_with(covered, **given):
        request = Request()
        HTTPMessageSigner(signature_algorithm=algorithms.ED25519, key_resolver=keys).sign(
            request,
            key_id="alpha",
            created=datetime.fromtimestamp(NOW, UTC),
            covered_component_ids=covered,
            use_existing_digest=True,
            **given,
        )
        return request.headers

    whole = ("@method", "@path", "@query", "content-digest")
    assert (
        checked(signed_with(whole, nonce="AAECAwQFBgcICQoLDA0ODw==", tag="murmur-1", label="murmur")).keyid == "alpha"
    )
    with pytest.raises(NotAuthenticated):
        checked(signed_with(components, **settings))


def test_an_old_request_is_a_replay_and_a_skewed_clock_is_not():
    assert checked(signed(), now=NOW + MAX_AGE_S).created == NOW
    assert checked(signed(), now=NOW - MAX_AGE_S).created == NOW
    with pytest.raises(Replayed):
        checked(signed(), now=NOW + MAX_AGE_S + 1)


def test_an_old_request_with_a_wrong_signature_is_not_called_a_replay():
    with pytest.raises(NotAuthenticated) as refused:
        checked(signed(), body=b"", now=NOW + MAX_AGE_S + 1)
    assert type(refused.value) is NotAuthenticated


def test_a_store_that_is_down_is_not_a_wrong_signature():
    def down(_):
        raise Unavailable("the database is restarting")

    with pytest.raises(Unavailable, match="restarting"):
        verify("POST", URL, signed(), BODY, public_key_of=down, now=NOW)


def test_a_short_nonce_is_not_signed():
    with pytest.raises(ValueError, match="15 bytes"):
        signed(nonce=bytes(15))
