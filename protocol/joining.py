"""The join string: one line that an admin gives to an organization, with all that its agent needs to enrol.

murmur://TOKEN@host:port?ca=<SHA-256 of the CA certificate's DER, in hex>    over TLS
murmur://TOKEN@host:port?ca=system                    over TLS, with a certificate that the machine's own CAs vouch for
murmur+http://TOKEN@127.0.0.1:port                                          plain HTTP, on one machine only

The fingerprint of the CA takes away the leap of faith of a first connection: whoever can read the line to the
organization unchanged has also told it whom to believe. The token is good for one client, once.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from urllib.parse import parse_qs, urlsplit

from .encoding import DIGEST
from .errors import OperatorError

SYSTEM = "system"
TOKEN = re.compile(r"[A-Za-z0-9_-]{16,128}")
_HOST = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]{0,252})")


@dataclass(frozen=True, kw_only=True, slots=True)
class Join:
    """What a join string says. ca: None for plain HTTP on loopback; SYSTEM where the machine's own CAs are believed."""

    token: str
    host: str
    port: int
    ca: str | None

    @property
    def pinned(self) -> bool:
        """Whether it names the one CA that is to be believed."""
        return self.ca not in (None, SYSTEM)

    @property
    def url(self) -> str:
        """The coordinator's address, without a slash at its end."""
        return f"{'https' if self.ca else 'http'}://{self._netloc}"

    @property
    def _netloc(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def __str__(self) -> str:
        if self.ca is None:
            return f"murmur+http://{self.token}@{self._netloc}"
        return f"murmur://{self.token}@{self._netloc}?ca={self.ca}"

    def __repr__(self) -> str:
        return f"Join({self.url})"  # without the token: a repr ends up in logs


def format_join(*, token: str, host: str, port: int, ca: str | None) -> str:
    """The join string of an invitation; raises OperatorError for parts that could not be read back."""
    text = str(Join(token=token, host=host, port=port, ca=ca))
    parse_join(text)
    return text


def parse_join(text: str) -> Join:
    """Read a join string; raises OperatorError that says what is wrong and never repeats the token."""
    text = text.strip()
    if not text.startswith(("murmur://", "murmur+http://")):
        raise OperatorError("this is no join string: it begins with murmur:// (or, on one machine, murmur+http://)")
    try:
        parts = urlsplit(text)
        token, host, port = parts.username or "", parts.hostname or "", parts.port
        query = parse_qs(parts.query, strict_parsing=bool(parts.query), keep_blank_values=True)
    except ValueError:
        raise OperatorError("the join string's host, port or ca cannot be read: was it copied whole?") from None
    if not TOKEN.fullmatch(token) or parts.password is not None:
        raise OperatorError("the join string has no token of 16 to 128 letters, digits, - and _ before the @")
    if not host or not (_is_address(host) or _HOST.fullmatch(host)):
        raise OperatorError("the join string has no host after the @")
    if not port:
        raise OperatorError(f"the join string has no port after the host {host}")
    if parts.path not in {"", "/"} or parts.fragment:
        raise OperatorError(f"the join string goes on where it should end, after {host}:{port}")
    if parts.scheme == "murmur+http":
        if query:
            raise OperatorError("a join string over plain HTTP has no ca: for TLS it begins with murmur://")
        if not is_loopback(host):
            raise OperatorError(
                f"plain HTTP to {host} would show every request to the network: only 127.0.0.1, ::1 and localhost are "
                "taken. Ask for a join string that begins with murmur://"
            )
        return Join(token=token, host=host, port=port, ca=None)
    fingerprints = query.pop("ca", [])
    if len(fingerprints) != 1 or not (fingerprints[0] == SYSTEM or DIGEST.fullmatch(fingerprints[0])) or query:
        raise OperatorError("the join string ends with ?ca= and the 64 hex digits of the CA's fingerprint: was it cut?")
    return Join(token=token, host=host, port=port, ca=fingerprints[0])


def is_loopback(host: str) -> bool:
    """Whether a host is this machine itself, by its text alone: no name is looked up."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return "%" not in host  # a zone id means something on one machine only
