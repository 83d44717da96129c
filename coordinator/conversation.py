"""The coordinator's half of the talk with agents: what they may ask, say and send, each one a short transaction.

Nothing here knows of HTTP. Everything an agent sends is checked here before it is stored, and every method may be
called again with the same arguments: the second call finds the first one's rows and says the same.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection
from functools import lru_cache
from pathlib import Path

from ..aggregation.weighted_sum import check_finite
from ..protocol.encoding import parse_json, unb64
from ..protocol.errors import BadRequest, BadUpdate, NotAllowed, PrivacyRefusal, TooLarge, TooLate
from ..protocol.messages import (
    LOCAL_STEPS,
    AnswerKind,
    Assignment,
    Complete,
    Failure,
    Kind,
    Poll,
    Progress,
    Step,
    StepKind,
    UploadOffer,
    UploadState,
    Work,
)
from ..protocol.tensors import Layout, check_file, masked_layout, read_layout
from . import secure
from .blobs import Blobs
from .hub import Hub
from .rounds import State
from .store import Store
from .store.attempts import Attempt, Key, Part
from .store.signs import Seen, Sign

log = logging.getLogger(__name__)

IDLE_S = 1800.0  # a wake is a hint: one that is lost costs so much at most
MAX_NORM = 1e12  # of a plain update; past it float32 sums are meaningless
ORDER = list(StepKind)
REACHED = [  # state -> how far the conversation has come in it
    (State.SHARES, StepKind.ROSTER),
    (State.COLLECTING, StepKind.INBOX),
    (State.AGREEING, StepKind.SURVIVORS),
    (State.REVEALING, StepKind.REVEAL),
]
NEEDS = {StepKind.ROSTER: AnswerKind.ADVERT, StepKind.INBOX: AnswerKind.SHARES, StepKind.REVEAL: AnswerKind.AGREE}


class Conversation:
    def __init__(self, store: Store, blobs: Blobs, hub: Hub) -> None:
        self._store, self._blobs, self._hub = store, blobs, hub
        self._layout = lru_cache(maxsize=64)(lambda path: read_layout(path))
        self._idle: dict[str, tuple[int, float]] = {}  # client -> its newest wake, and when it had part in nothing
        self._told = lru_cache(maxsize=64)(self._tell)

    def poll(self, client: str, poll: Poll, *, knows: tuple[str, ...] = ()) -> Work:
        """A sign of life, and what there is to do now; HTTP takes the two apart, for it may wait for work."""
        seen, signs = signs_of(client, poll, knows=knows)
        self._store.signs.note([seen], signs)
        return self.work(client, poll.busy)

    def idle(self, client: str) -> bool:
        """Whether it is known without a look at the database that a client has part in nothing.

        It had none a while ago, and who gives a client work wakes it, which counts from before it may be told. Where
        other processes give work too, their wakes come late: nothing is known there.
        """
        woken, asked_at = self._idle.get(client, (-1, 0.0))
        fresh = 0 <= self._store.db.clock() - asked_at < IDLE_S
        return fresh and woken == self._hub.woken(client) and not self._store.db.shared

    def work(self, client: str, busy: Collection[str], poll: tuple[str, int] | None = None) -> Work:
        """Work for this client if there is any now, and which of what it is busy with is void."""
        woken, asked_at = self._hub.woken(client), self._store.db.clock()
        held = self._store.assignments.held(client)
        if not held:
            self._idle[client] = woken, asked_at
        void = tuple(sorted(set(busy) - held.keys()))
        due = any(is_due and name not in busy for name, is_due in held.items())
        handed = self._store.assignments.hand_out(client, busy, poll=poll) if due else None
        if handed is None:
            return Work(void=void)
        key, fence, group = handed
        mine = {"id": key.assignment(client), "fence": fence}
        return Work(assignment=self._told(key, group).model_copy(update=mine), void=void)

    def _tell(self, key: Key, group: int) -> Assignment:
        """What all clients of an attempt, or of a group in it, are told once they are chosen."""
        attempt = self._store.rounds.head_of(key)
        if attempt.threshold:
            attempt = self._store.rounds.load(key).group(group)
        return secure.assignment(attempt, "", 1)

    def step(self, client: str, assignment_id: str, fence: int, after: str) -> Step | None:
        """The coordinator's next word after `after` (empty at first); None while it has nothing to say."""
        attempt, part = self._store.assignments.mine(assignment_id, client)
        if part.fence != fence:
            return Step(kind=StepKind.GONE, reason="this assignment was handed out again since")
        if attempt.state in (State.AGGREGATING, State.COMMITTED) and part.update:
            return Step(kind=StepKind.DONE)
        if part.lost or attempt.state in (State.AGGREGATING, State.COMMITTED, State.FAILED):
            return Step(kind=StepKind.GONE, reason=_why(attempt, part))
        if not attempt.threshold:
            return None
        for state, kind in REACHED:
            said = kind in NEEDS and NEEDS[kind] not in part.answers
            if _index(attempt.state) < _index(state) or said:
                return None
            if not after or ORDER.index(kind) > ORDER.index(StepKind(after)):
                body = self._body(attempt, client, kind)
                return None if body is None else Step(kind=kind, body=body)
        return None

    def _body(self, attempt: Attempt, client: str, kind: StepKind) -> str | None:
        session = self._session(attempt)
        adverts, shares = attempt.answers(AnswerKind.ADVERT), attempt.answers(AnswerKind.SHARES)
        if kind == StepKind.ROSTER:
            return session.roster(adverts)
        if kind == StepKind.INBOX:
            return session.inbox(client, adverts, shares)
        if kind == StepKind.SURVIVORS:
            return session.survivors(adverts, shares, [p.client for p in attempt.uploaded])
        try:
            return session.signatures(client, adverts, attempt.answers(AnswerKind.AGREE))
        except PrivacyRefusal:  # too few of its neighbours signed: the others reveal without it
            return None

    def _session(self, attempt: Attempt) -> secure.ServerSession:
        layout = self._layout(self._blobs.path(attempt.base))
        return secure.session(attempt, layout, self._store.clients.identities(attempt.cohort))

    def answer(self, client: str, assignment_id: str, fence: int, kind: AnswerKind, body: str) -> None:
        """Take a client's word in the secure-aggregation protocol, once it has been checked."""
        attempt, part = self._store.assignments.mine(assignment_id, client)
        if not attempt.threshold:
            raise BadRequest("this round is not masked: there is nothing to answer")
        if kind not in part.answers:
            self._check(attempt, client, kind, body)
        if self._store.assignments.answer(assignment_id, fence, kind, body):
            self._hub.work()

    def _check(self, attempt: Attempt, client: str, kind: AnswerKind, body: str) -> None:
        parse_json(body.encode())
        session = self._session(attempt)
        adverts, shares = attempt.answers(AnswerKind.ADVERT), attempt.answers(AnswerKind.SHARES)
        if kind == AnswerKind.ADVERT:
            return session.check_advert(client, body)
        if _index(attempt.state) < _index(State.SHARES):
            raise TooLate(f"{kind} is not taken yet: the round is {attempt.state}")
        if kind == AnswerKind.SHARES:
            return session.check_shares(client, body, adverts)
        if not attempt.part(client).update:
            raise NotAllowed("only a client whose upload is in the sum takes part in unmasking it")
        survivors = session.survivors(adverts, shares, [p.client for p in attempt.uploaded])
        if kind == AnswerKind.AGREE:
            return session.check_agree(client, body, survivors)
        return session.check_reveal(client, body, adverts, shares, survivors)

    def offer_upload(self, client: str, assignment_id: str, offer: UploadOffer) -> UploadState:
        """Begin or go on with an upload. Its size must be the one size that the update can have."""
        attempt, _ = self._store.assignments.mine(assignment_id, client)
        expected = self._expected_layout(attempt).file_bytes
        if offer.size != expected:
            raise (TooLarge if offer.size > expected else BadUpdate)(
                f"the update to this model has {expected} bytes, {offer.size} were announced"
            )
        self._blobs.require(offer.size)
        part = self._store.assignments.offer_upload(assignment_id, offer.fence, offer.sha256, offer.size)
        done = self._blobs.has(offer.sha256)
        return UploadState(offset=offer.size if done else self._blobs.part_size(part), size=offer.size)

    def upload_state(self, client: str, assignment_id: str, fence: int) -> UploadState:
        part, sha256, size = self._store.assignments.upload(assignment_id, client, fence)
        return UploadState(offset=size if self._blobs.has(sha256) else self._blobs.part_size(part), size=size)

    def append(self, client: str, assignment_id: str, fence: int, offset: int, data: bytes) -> UploadState:
        """Add bytes to the upload; raises WrongOffset with the offset to go on from."""
        part, _, size = self._store.assignments.upload(assignment_id, client, fence)
        return UploadState(offset=self._blobs.append(part, offset, data, limit_bytes=size), size=size)

    def complete(self, client: str, assignment_id: str, message: Complete) -> None:
        """Check the uploaded update and count it, once. One that must not be counted fails its assignment alone."""
        attempt, part = self._store.assignments.mine(assignment_id, client)
        if part.update == message.sha256:
            return
        data = None if message.data is None else _inline(message)
        if part.update is None and data is not None:
            with self._blobs.new() as path:
                path.write_bytes(data)
                self._check_or_fail(attempt, assignment_id, path, message)
        elif part.update is None:
            name, sha256, _ = self._store.assignments.upload(assignment_id, client, message.fence)
            if sha256 != message.sha256:
                raise BadUpdate("another file was announced for upload than is now said to be complete")
            path = self._blobs.finish(name, message.sha256)
            self._check_or_fail(attempt, assignment_id, path, message)
        metrics = message.metrics and {k: v.model_dump() for k, v in message.metrics.items()}
        accepted = self._store.assignments.accept_update(
            assignment_id,
            message.fence,
            sha256=message.sha256,
            size=self._expected_layout(attempt).file_bytes,
            weight=message.weight,
            metrics=metrics,
            data=data,
        )
        if accepted:
            self._hub.work()

    def _check_or_fail(self, attempt: Attempt, assignment_id: str, path: Path, message: Complete) -> None:
        try:
            self._check_update(attempt, path, message)
        except BadUpdate as error:
            self._store.assignments.fail(assignment_id, message.fence, f"refused: {error.detail}")
            self._hub.work()
            log.warning("update refused", extra={"assignment": assignment_id, "why": error.detail})
            raise

    def _check_update(self, attempt: Attempt, path: Path, message: Complete) -> None:
        masked, layout = bool(attempt.threshold), self._expected_layout(attempt)
        check_file(path, layout)
        if masked:
            if message.weight is not None or message.metrics is not None:
                raise BadUpdate("in a masked round weight and metrics lie inside the masks; they were sent in clear")
            return
        if message.weight is None or message.metrics is None:
            raise BadUpdate("a plain update states its weight and its metrics")
        told = secure.assignment(attempt, "", 1)
        if unknown := sorted(set(message.metrics) - set(told.reported)):
            raise BadUpdate(f"metrics that the run does not have: {', '.join(unknown)}")
        steps = message.metrics.get(LOCAL_STEPS)
        stated = steps is not None and steps.count == message.weight and steps.sum >= 0
        if LOCAL_STEPS in told.reported and told.kind == Kind.TRAIN and not stated:
            raise BadUpdate(f"an update of FedNova states {LOCAL_STEPS} of 0 or more, counted by its weight")
        if message.weight > attempt.recipe.strategy.weight_cap:
            raise BadUpdate(f"weight {message.weight:g}, at most {attempt.recipe.strategy.weight_cap} is allowed")
        norm = check_finite(path, layout)
        if attempt.dp.of_clients and norm > attempt.dp.clip_norm:
            bound = attempt.dp.clip_norm
            raise BadUpdate(
                f"the update's norm is {norm:.6g}, this round's dp.clip_norm is {bound:g}: it was not clipped"
            )
        if norm > MAX_NORM:
            raise BadUpdate(f"the update's norm is {norm:.3g}, at most {MAX_NORM:.0e} is taken")

    def fail(self, client: str, assignment_id: str, message: Failure) -> None:
        """The client cannot deliver; its round goes on without it."""
        self._store.assignments.mine(assignment_id, client)
        self._store.assignments.fail(assignment_id, message.fence, f"{message.code}: {message.detail}")
        self._hub.work()

    def progress(self, client: str, assignment_id: str, fence: int, said: Progress) -> None:
        for refusal in self._store.signs.note([], [Sign(client, assignment_id, fence, said)]):
            if refusal is not None:
                raise refusal

    def readable(self, client: str, sha256: str) -> Path:
        """The file of a model that this client was asked to work on; any other blob is not for its eyes."""
        if not self._store.assignments.may_read(client, sha256):
            raise NotAllowed("this blob is no model of a round that you take part in")
        return self._blobs.path(sha256)

    def _expected_layout(self, attempt: Attempt) -> Layout:
        """The layout that an upload of this attempt must have."""
        model = self._layout(self._blobs.path(attempt.base))
        if attempt.threshold:
            context = secure.context(attempt, model)
            return masked_layout(context.dim, context.aux, context.ring_bits)
        return model.update(attempt.recipe.train.wire) if attempt.kind == Kind.TRAIN else Layout(())


def signs_of(
    client: str, poll: Poll, *, expected_s: float = 0.0, knows: tuple[str, ...] = ()
) -> tuple[Seen, list[Sign]]:
    """What a poll says of its client and of each assignment that it is busy with.

    expected_s: how long the client will be silent now, waiting for the answer. knows: what its agent states in
    KNOWS_HEADER.
    """
    info = poll.info.model_dump(mode="json") | ({"knows": list(knows)} if knows else {})
    seen = Seen(client, info, expected_s)
    return seen, [Sign(client, name, None, said) for name, said in poll.busy.items()]


def _inline(message: Complete) -> bytes:
    """The update that came inside its message."""
    data = unb64(message.data or "")
    if hashlib.sha256(data).hexdigest() != message.sha256:
        raise BadUpdate("the update that came with the message has another hash than it states")
    return data


def _why(attempt: Attempt, part: Part) -> str:
    """Why nothing more is wanted of a client."""
    if part.lost:
        return part.reason
    return "the round went on without this client" if attempt.state != State.FAILED else "the attempt was given up"


def _index(state: State) -> int:
    return list(State).index(state)
