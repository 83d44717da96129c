"""A client's part of one masked round: binds the terms to the model it really has, and answers each step."""

from __future__ import annotations

from pathlib import Path

from ..privacy import bodies
from ..privacy.client import ClientSession
from ..privacy.client import Policy as SessionPolicy
from ..privacy.terms import context_of
from ..protocol.errors import PeerError
from ..protocol.messages import AnswerKind, Assignment, SecureTerms, Step, StepKind
from ..protocol.tensors import Layout
from .identity import Identity
from .job import Result
from .memory import Memory
from .settings import Policy
from .updates import write_masked


class MaskedPart:
    """The conversation's privacy half. What it returns may be posted; what it refuses, it raises as PrivacyRefusal."""

    def __init__(
        self,
        assignment: Assignment,
        terms: SecureTerms,
        layout: Layout,
        *,
        me: str,
        identity: Identity,
        policy: Policy,
        memory: Memory,
    ) -> None:
        """layout: the model's."""
        self._assignment, self._layout, self._terms = assignment, layout, terms
        self._policy, self._memory = policy, memory
        self._context = context_of(assignment, layout, terms)
        self._session = ClientSession(
            self._context,
            me,
            identity.key,
            policy=SessionPolicy(
                min_clients=policy.min_clients,
                min_threshold=policy.min_threshold,
                min_degree=policy.min_degree,
                colluders=policy.colluders,
            ),
            known={},  # `Memory.check_peers` decides, for it also knows the policy file's fingerprints
            joined=_Joined(memory),
        )
        self.opened = False

    def advert(self) -> str:
        """This client's keys for the round; that it made some is on disk before they leave."""
        text = self._session.advertise()
        self._memory.join(self._session.context_sha256)
        return text

    def answer(self, step: Step) -> tuple[AnswerKind, str] | None:
        """What to answer to a step of the coordinator; None to those that ask for nothing."""
        match step.kind:
            case StepKind.ROSTER:
                text = self._session.share(step.body)
                self._memory.check_peers(self._session.peers, self._policy)
                self._memory.remember_peers(self._session.peers)
                return AnswerKind.SHARES, text
            case StepKind.INBOX:
                self._session.open(step.body)
                # Before the upload: what was opened once is summed again over the very same clients, or not at all.
                self._memory.check_sum(self._assignment, self._session.dealers)
                self.opened = True
                return None
            case StepKind.SURVIVORS:
                self._summed = bodies.load_survivors(step.body, len(self._terms.cohort)).clients
                self._memory.check_sum(self._assignment, self._summed)
                return AnswerKind.AGREE, self._session.agree(step.body)
            case StepKind.REVEAL:
                text = self._session.reveal(step.body)
                self._memory.remember_sum(self._assignment, self._summed)
                return AnswerKind.REVEAL, text
            case _:
                raise PeerError(f"{step.kind} asks for nothing")

    def write(self, path: Path, result: Result) -> None:
        """Write what the trainer gave as the masked upload; nothing in the file means anything alone.

        Raises BadUpdate for an update that is not finite or has another layout than the model.
        """
        write_masked(path, self._session, self._assignment, self._layout, result)


class _Joined:
    """The journal of joined attempts, as the session asks it."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory

    def __contains__(self, digest: object) -> bool:
        return isinstance(digest, str) and self._memory.has_joined(digest)
