"""How a site reaches its coordinator: whether it answers and knows the key, its clock, its certificate, its pace."""

from __future__ import annotations

import email.utils
import socket
import ssl
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import httpx
from cryptography import x509

from ..protocol.errors import MurmurError, NotApproved, NotAuthenticated, NotFound, ProtocolMismatch, Unavailable
from ..protocol.messages import Accepted
from .finding import green, red, yellow
from .identity import load_identity
from .link import Link
from .record import FILE as RECORD
from .record import Record
from .settings import Settings

if TYPE_CHECKING:
    from .check import Report

LEAST_BYTES, MOST_BYTES = 64 << 10, 8 << 20  # of a measured transfer: a coordinator gives and takes no more
CLOCK_S = 30.0  # a signature is good for five minutes: a clock that drifts is told of long before
EXPIRES_S = 14 * 86_400.0
PIECE = b"\x5a" * (64 << 10)


def reach(settings: Settings, report: Report, *, transport: httpx.BaseTransport | None = None) -> None:
    """Add what there is to say of the way to the coordinator. transport: for tests, in place of the network."""
    try:
        link = Link(
            settings.coordinator,
            name=settings.name,
            identity=load_identity(settings.key_file),
            ca=settings.ca_file if settings.ca_file.exists() else None,
            proxy=settings.proxy,
            transport=transport,
        )
    except MurmurError as error:
        report.add(red("coordinator", error.detail, "enrol this client anew: murmur client enroll"))
        return
    record = Record(settings.directory / RECORD)
    link.before_sending = record.leaves
    try:
        _certificate(settings, report)
        _measure(link, settings, report)
    finally:
        link.close()
        record.close()


def _measure(link: Link, settings: Settings, report: Report) -> None:
    url = settings.coordinator
    try:
        link.bearer("POST", "/v1/transfer", Accepted, tries=2)  # fetches the token, and opens the connection
        round_trip_s = min(_download(link, 0, report) for _ in range(3))
    except NotApproved:
        fingerprint = load_identity(settings.key_file).fingerprint
        todo = f"let an admin compare and approve this client's fingerprint: {fingerprint}"
        return report.add(yellow("coordinator", f"{url} answers and has yet to approve this client", todo))
    except NotAuthenticated as error:
        return report.add(red("coordinator", f"{url} does not accept this client: {error.detail}",
                              "see whether the clock is right and the client is not revoked"))  # fmt: skip
    except NotFound:
        todo = "nothing: predictions leave the transfers out"
        return report.add(yellow("coordinator", f"{url} answers; its release cannot measure transfers", todo))
    except ProtocolMismatch as error:
        return report.add(red("coordinator", error.detail, "install a matching release"))
    except Unavailable as error:
        todo = "see whether outbound HTTPS to it is allowed, and whether [proxy] and ca.pem are right"
        return report.add(red("coordinator", f"{url} cannot be reached: {error.detail}", todo))
    except MurmurError as error:
        return report.add(red("coordinator", error.detail, "ask the coordinator's admin"))
    report.facts["round_trip_s"] = round_trip_s
    report.add(green("coordinator", f"{url} answers in {round_trip_s * 1000:.0f} ms and knows this client"))
    _clock(report)
    size = max(LEAST_BYTES, min(MOST_BYTES, int(report.facts.get("model_bytes", 1 << 20))))
    try:
        down_s, up_s = _download(link, size, report), _upload(link, size)
    except MurmurError as error:
        report.add(yellow("bandwidth", f"a transfer of {size:,} bytes failed: {error.detail}", "try again"))
        return
    pace = {"down": size / max(down_s - round_trip_s, 1e-4), "up": size / max(up_s - round_trip_s, 1e-4)}
    report.facts |= {f"{way}_bytes_per_s": value for way, value in pace.items()}
    said = (
        f"{pace['down'] / 1e6:,.1f} MB/s down, {pace['up'] / 1e6:,.1f} MB/s up, measured with {size / 1e6:.2g} MB each"
    )
    report.add(green("bandwidth", said))


def _download(link: Link, size: int, report: Report) -> float:
    """Seconds until so many bytes were here."""
    began = time.monotonic()
    with link.open("GET", f"/v1/transfer?bytes={size}") as response:
        report.facts["date"] = response.headers.get("Date", "")
        got = sum(len(chunk) for chunk in response.iter_raw())
    if got != size:
        raise Unavailable(f"{got} of {size} bytes came")
    return time.monotonic() - began


def _upload(link: Link, size: int) -> float:
    def body() -> Iterator[bytes]:
        for at in range(0, size, len(PIECE)):
            yield PIECE[: size - at]

    began = time.monotonic()
    headers = {"Content-Length": str(size), "Content-Type": "application/octet-stream"}
    link.bearer("POST", "/v1/transfer", Accepted, body=body, headers=headers, tries=1)
    return time.monotonic() - began


def _clock(report: Report) -> None:
    try:
        theirs = email.utils.parsedate_to_datetime(report.facts.pop("date", "")).timestamp()
    except ValueError:
        return
    ahead_s = time.time() - theirs
    report.facts["clock_ahead_s"] = round(ahead_s, 1)
    if abs(ahead_s) > CLOCK_S:
        side = "ahead of" if ahead_s > 0 else "behind"
        said = f"this machine's is {abs(ahead_s):.0f} s {side} the coordinator's; at 300 s nothing is accepted"
        report.add(yellow("clock", said, "let NTP set this machine's clock"))
    else:
        report.add(green("clock", f"within {abs(ahead_s) + 1:.0f} s of the coordinator's"))


def _certificate(settings: Settings, report: Report) -> None:
    """Who is believed to be the coordinator, and how long its certificate is good; nothing where it does not answer."""
    parts = urlsplit(settings.coordinator)
    if parts.scheme != "https":
        report.add(yellow("TLS", "none: the coordinator is called over plain HTTP on this machine",
                          "nothing for a trial; serve with TLS for anything else"))  # fmt: skip
        return
    if settings.proxy:
        return
    believed = "the CA that was pinned at enrolment" if settings.ca_file.exists() else "the CAs of this machine"
    context = ssl.create_default_context(cafile=str(settings.ca_file) if settings.ca_file.exists() else None)
    host = parts.hostname or ""
    try:
        with (
            socket.create_connection((host, parts.port or 443), timeout=10) as raw,
            context.wrap_socket(raw, server_hostname=host) as tls,
        ):
            found = x509.load_der_x509_certificate(tls.getpeercert(True) or b"")
            version = tls.version()
    except ssl.SSLCertVerificationError as error:
        todo = (
            f"ask the admin for its CA's fingerprint, and see that it is the machine you mean; believed is {believed}"
        )
        report.add(red("TLS", f"its certificate is not believed: {error.verify_message}", todo))
        return
    except (OSError, ValueError):
        return  # the next line says that it cannot be reached
    left_s = found.not_valid_after_utc.timestamp() - time.time()
    said = f"{version}, believed through {believed}; the certificate is good until {found.not_valid_after_utc:%F}"
    if left_s < EXPIRES_S:
        report.add(yellow("TLS", said, "let the coordinator's admin renew it"))
    else:
        report.add(green("TLS", said))
