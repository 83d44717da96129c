"""How a client of a masked round comes from one state to the next: a table, which `client` walks."""

from __future__ import annotations

from enum import StrEnum


class State(StrEnum):
    """How far a client has come; REVEALED is the good end, ENDED a refusal or an upload that broke off."""

    NEW = "new"
    ADVERTISED = "advertised"
    SHARED = "shared"
    OPENED = "opened"
    MASKING = "masking"
    MASKED = "masked"
    AGREED = "agreed"
    REVEALED = "revealed"
    ENDED = "ended"


class Step(StrEnum):
    ADVERTISE = "advertise"
    SHARE = "share"
    OPEN = "open"
    MASK = "mask"
    MASKED = "masked"  # the last piece of the upload was taken
    AGREE = "agree"
    REVEAL = "reveal"


NEXT: dict[tuple[State, Step], State] = {
    (State.NEW, Step.ADVERTISE): State.ADVERTISED,
    (State.ADVERTISED, Step.SHARE): State.SHARED,
    (State.SHARED, Step.OPEN): State.OPENED,
    (State.OPENED, Step.MASK): State.MASKING,
    (State.MASKING, Step.MASKED): State.MASKED,
    (State.MASKED, Step.AGREE): State.AGREED,
    (State.AGREED, Step.REVEAL): State.REVEALED,
}
