"""Everything that can go wrong, as one tree; `code` is stable and travels on the wire (RFC 9457 problem documents).

MurmurError
├── PeerError                   the other side broke a rule; the request changed nothing (4xx)
│   ├── ProtocolMismatch        speaks another version of the protocol
│   ├── NotAuthenticated        no, wrong or expired credentials; says nothing about why
│   │   └── Replayed            a signed request that was seen before, or is too old
│   ├── NotAllowed              known, but may not do this
│   │   └── NotApproved         enrolled, an admin has not approved the key yet
│   ├── NotFound
│   ├── Conflict                contradicts something already accepted
│   ├── WrongOffset             an upload goes on elsewhere; `offset` says where
│   ├── TooLate                 the round went on without this
│   ├── TooLarge
│   ├── BadRequest              a body that is not the message it should be
│   └── BadUpdate               an update that must not be counted
│       └── SumTooLarge         a masked sum that may have wrapped: without the weights' bound it will not
├── PrivacyRefusal              we will not go on: going on could reveal something (see `privacy`)
├── OperatorError               settings, files or a plan that cannot work; the message says what to change
├── Unavailable                 starting, stopping or overloaded: try again (503)
│   └── StorageFull             no room to store this: goes on once there is some (507)
└── InternalError               our own fault (500)
    └── IllegalTransition       a state machine was asked for a step it does not have
"""

from __future__ import annotations

from typing import Any, ClassVar


class MurmurError(Exception):
    """Base of all; never raised itself."""

    code: ClassVar[str] = "error"
    status: ClassVar[int] = 500
    title: ClassVar[str] = "Error"

    def __init__(self, detail: str = "", /, **facts: Any) -> None:
        super().__init__(detail or self.title)
        self.detail = detail or self.title
        self.facts = facts

    def problem(self) -> dict[str, Any]:
        """The RFC 9457 problem document of this error."""
        return {
            "type": f"urn:murmur:error:{self.code}",
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
            "code": self.code,
            **self.facts,
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return from_problem, (self.problem(),)  # between our own processes an error travels as it does on the wire


class PeerError(MurmurError):
    code, status, title = "peer_error", 400, "The request broke a rule"


class ProtocolMismatch(PeerError):
    code, status, title = "protocol_mismatch", 426, "The other side speaks another version of the protocol"


class NotAuthenticated(PeerError):
    code, status, title = "not_authenticated", 401, "Not authenticated"


class Replayed(NotAuthenticated):
    code, title = "replayed", "A signed request was used twice or is too old"


class NotAllowed(PeerError):
    code, status, title = "not_allowed", 403, "Not allowed"


class NotApproved(NotAllowed):
    code, title = "not_approved", "An admin has not approved this client yet"


class NotFound(PeerError):
    code, status, title = "not_found", 404, "Not found"


class Conflict(PeerError):
    code, status, title = "conflict", 409, "This contradicts something already accepted"


class WrongOffset(Conflict):
    code, title = "wrong_offset", "The upload goes on at another byte"


class TooLate(PeerError):
    code, status, title = "too_late", 410, "The round went on without this"


class TooLarge(PeerError):
    code, status, title = "too_large", 413, "Larger than allowed"


class BadRequest(PeerError):
    code, status, title = "bad_request", 422, "The request is not what this address takes"


class BadUpdate(PeerError):
    code, status, title = "bad_update", 422, "The update cannot be counted"


class SumTooLarge(BadUpdate):
    code, title = "sum_too_large", "The masked sum may have left its ring"


class PrivacyRefusal(MurmurError):
    """Raised by either side of secure aggregation; `reason` is one of a fixed set that pages can put in words."""

    code, status, title = "privacy_refusal", 409, "Refused: going on could reveal a single update"

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail, reason=reason)
        self.reason = reason


class OperatorError(MurmurError):
    code, status, title = "operator_error", 400, "This cannot work as it is set up"


class Unavailable(MurmurError):
    code, status, title = "unavailable", 503, "Not available just now; try again"


class StorageFull(Unavailable):
    """Nothing was stored, and what was stored before is whole; facts: `free_bytes` and `needed_bytes`."""

    code, status, title = "storage_full", 507, "No room to store this"


class InternalError(MurmurError):
    code, status, title = "internal", 500, "Internal error"


class IllegalTransition(InternalError):
    code, title = "illegal_transition", "A step that the state machine does not have"


def _tree(base: type[MurmurError]) -> dict[str, type[MurmurError]]:
    found = {base.code: base}
    for child in base.__subclasses__():
        found |= _tree(child)
    return found


def from_problem(document: dict[str, Any]) -> MurmurError:
    """The error that a problem document describes; an unknown code becomes the branch its status belongs to."""
    known = _tree(MurmurError)
    given = document.get("status")
    status = given if isinstance(given, int) else 500
    kind = known.get(str(document.get("code")), PeerError if 400 <= status < 500 else InternalError)
    detail = str(document.get("detail", ""))
    if kind is PrivacyRefusal:
        return PrivacyRefusal(str(document.get("reason", "unknown")), detail)
    reserved = {"type", "title", "status", "detail", "code"}
    error = kind.__new__(kind)  # a class of one side may take other arguments than its problem document has
    MurmurError.__init__(error, detail, **{k: v for k, v in document.items() if k not in reserved})
    return error
