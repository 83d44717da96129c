"""One assignment from start to end: check, download, train, mask, upload, unmask with the others.

    this thread    policy -> download -> advert ... shares ... -> [update] -> upload -> agree -> reveal -> done
    "train"        waits for its turn, then the trainer's job
    "listen"       the coordinator's steps, long-polled
    "heartbeat"    progress, so that slow can be told from dead; hears first when the round went on without us

The other threads only bring events; whatever happens, it happens here, one thing after the other.
"""

from __future__ import annotations

import hashlib
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..protocol.encoding import b64
from ..protocol.errors import MurmurError, NotAllowed, PeerError, PrivacyRefusal, TooLate, Unavailable
from ..protocol.messages import AnswerKind, Assignment, Complete, Failure, Kind, Step, StepKind
from ..protocol.messages import Progress as Sign
from ..protocol.tensors import Layout, read_layout, write_file
from ..protocol.wire import narrow
from .channel import backoff_s, jitter
from .failures import describe
from .job import Job, Progress, Result
from .kept import work_digest
from .ledger import training_event
from .link import Link
from .masked import MaskedPart
from .policy import check_assignment
from .shared import Site, Trains, coarse
from .switch import refusal
from .trainer import TrainerFailed
from .updates import check_update, clip_update, metrics_of, weight_of

log = logging.getLogger(__name__)

TURN_S = 0.2  # between two looks at the job that is in front of ours
CONSENT_S = 0.5  # between two looks whether somebody has answered
PACE_S = 1.0  # between two signs of life, and between two empty answers to a long poll
ORDER = (StepKind.ROSTER, StepKind.INBOX, StepKind.SURVIVORS, StepKind.REVEAL, StepKind.DONE, StepKind.GONE)


class Conversation:
    """An assignment and all that is done about it; `run` in a thread of its own, `cancel` from any other."""

    def __init__(self, assignment: Assignment, *, site: Site, link: Link, trainer: Trains | None) -> None:
        """trainer: the task's, None where the site has no such task (`run` then reports that)."""
        self.assignment = assignment
        self._site, self._link, self._trainer = site, link, trainer
        self._events: queue.Queue[Result | Step | Exception] = queue.Queue()
        self._over = threading.Event()
        self._interrupted: MurmurError | None = None
        self._sign = Sign(phase="waiting")
        self._running = False  # our job is the one that the trainer runs
        self._began = 0.0  # when it got it
        self._running_lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._kept = site.shelf.take(assignment, work_digest(assignment, site.settings))
        self._local = assignment.dp.mode == "local"
        self._charge: int | None = None  # in the site's ledger
        self._delivered = False
        self._settled = True  # the coordinator knows how this ended, and will not hand it out again

    @property
    def sign(self) -> Sign:
        """How far this has come."""
        return self._sign

    def run(self) -> None:
        """Do it all; returns when nothing is left to do, whether it was counted or not. Never raises."""
        facts = {"assignment": self.assignment.id, "round": self.assignment.round}
        state, why = "delivered", ""
        try:
            self._site.record.asked(self.assignment)
            self._converse()
            log.info("counted", extra=facts)
        except TooLate as error:
            log.info("round went on without us", extra={**facts, "why": error.detail})
            state, why = ("delivered", "") if self._delivered else ("late", error.detail)
        except Exception as error:
            self._report(error)
            state = "refused" if isinstance(error, PrivacyRefusal | NotAllowed) else "failed"
            why = error.detail if isinstance(error, MurmurError) else f"{type(error).__name__}: {error}"
        finally:
            self._end()
            self._note_end(state, why)

    def cancel(self, error: MurmurError) -> None:
        """End this soon, because of `error`; TooLate ends it without a word to the coordinator."""
        self._interrupted = self._interrupted or error
        self._events.put(error)

    # The conversation itself

    def _converse(self) -> None:
        a, settings = self.assignment, self._site.settings
        if self._site.switch.stopped():
            raise refusal()
        check_assignment(a, me=settings.name, policy=settings.policy, tasks=settings.tasks.keys())
        if self._trainer is None:
            raise PeerError(f"there is no trainer for the task {a.task!r}")
        log.info("assignment taken", extra={"assignment": a.id, "round": a.round, "kind": a.kind.value, "task": a.task})
        self._spawn("heartbeat", self._beat)
        if settings.policy.ask:
            self._wait_for_consent()
        model = self._fetch_model()
        layout = read_layout(model)
        masked = None
        if a.secure is not None:
            masked = MaskedPart(
                a,
                a.secure,
                layout,
                me=settings.name,
                identity=self._site.identity,
                policy=settings.policy,
                memory=self._site.memory,
            )
        self._spawn("train", self._train, self._trainer, model)
        if masked is not None:
            self._link.answer(a, AnswerKind.ADVERT, masked.advert())
        self._spawn("listen", self._listen)
        result: Result | None = None
        while True:
            match self._events.get():
                case Result() as result:
                    self._sign = Sign(phase="waiting", step=self._sign.step, steps=self._sign.steps)
                case Step(kind=StepKind.DONE):
                    return
                case Step(kind=StepKind.GONE, reason=reason):
                    raise TooLate(reason or "the attempt ended")
                case Step() as step if masked is not None:
                    if (answer := masked.answer(step)) is not None:
                        self._link.answer(a, *answer)
                case Step() as step:
                    raise PeerError(f"{step.kind} belongs to masked rounds, and this is a plain one")
                case error:
                    raise error
            if result is not None and (masked is None or masked.opened):
                self._deliver(result, layout, masked)
                result = None

    def _wait_for_consent(self) -> None:
        """Hold the assignment until somebody at this site has answered for its run; raises PrivacyRefusal for a no."""
        a, record = self.assignment, self._site.record
        if record.consent(a) == "waiting":
            log.warning("waits for this site's consent", extra={"assignment": a.id, "run": a.run})
            record.waits(a.id, True)
        while (decision := record.consent(a)) == "waiting":
            self._go_on()
            time.sleep(CONSENT_S)
        if decision == "denied":
            raise PrivacyRefusal("policy_ask", f"somebody at this site has said no to run {a.run}")
        record.waits(a.id, False)

    def _fetch_model(self) -> Path:
        def on_bytes(count: int) -> None:
            self._go_on()
            self._sign = Sign(phase="downloading", bytes=count)

        def on_wait(count: int) -> None:
            self._go_on()
            self._sign = Sign(phase="waiting", bytes=count)

        return self._site.models.fetch(self.assignment, self._link, on_bytes, on_wait)

    def _deliver(self, result: Result, layout: Layout, masked: MaskedPart | None) -> None:
        a, began = self.assignment, time.monotonic()
        upload = self._kept.upload
        if a.kind is Kind.TRAIN:
            if result.update is None:
                raise ValueError("the trainer gave no update for a training job")
            check_update(result.update, layout)
            if self._local:
                assert self._charge is not None, "nothing is trained, or kept, that was not charged"
                self._site.ledger.leaves(self._charge, result.steps)
        if masked is not None:
            masked.write(upload, result)
        elif result.update is not None and a.kind is Kind.TRAIN and a.dp.of_clients:
            clip_update(result.update, layout, a.dp.clip_norm, upload)
        elif result.update is not None and a.train.wire == "bf16":
            narrow(result.update, layout, upload)
        elif a.kind is Kind.TRAIN:
            upload = self._kept.update
        else:
            write_file(upload, {}, Layout(()))

        def on_bytes(count: int) -> None:
            self._go_on()
            self._sign = Sign(phase="uploading", bytes=count)

        plain = masked is None
        told: dict[str, Any] = {}
        if plain:
            told = {"weight": float(weight_of(a, result)), "metrics": metrics_of(a, result)}
        if upload.stat().st_size <= self._link.inline_bytes:
            data = upload.read_bytes()
            told |= {"data": b64(data), "sha256": hashlib.sha256(data).hexdigest()}
        else:
            told["sha256"] = self._link.upload(a, upload, on_bytes=on_bytes)
        complete = Complete(fence=a.fence, **told)
        self._link.complete(a, complete)
        self._delivered = True
        if self._kept.own.exists():
            self._site.own.adopt(a.run, a.round, self._kept.own)
        size, took_s = upload.stat().st_size, round(time.monotonic() - began, 2)
        log.info("update delivered", extra={"assignment": a.id, "bytes": size, "masked": not plain, "took_s": took_s})
        self._sign = Sign(phase="waiting", bytes=size)

    def _go_on(self) -> None:
        if self._interrupted is not None:
            raise self._interrupted

    # The threads that bring events

    def _spawn(self, name: str, work: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=work, args=args, name=f"{name} {self.assignment.id}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _train(self, trainer: Trains, model: Path) -> None:
        a = self.assignment
        job = Job(
            id=f"{a.id}.{a.fence}",
            kind=a.kind.value,
            model=model,
            update=self._kept.update,
            train=a.train,
            mu=a.mu,
            metrics=a.metrics,
            seed=a.seed,
            round=a.round,
            client=self._site.settings.name,
            checkpoint=self._kept.checkpoint if self._site.settings.policy.resume else None,
            checkpoint_s=self._site.settings.checkpoint_s,
            digest=self._kept.digest,
            dp=a.dp,
            parallel=self._site.settings.parallel or a.parallel,
            own=self._site.own.before(a.run, a.round),
            algorithm=a.algorithm,
            train_s=self._site.settings.train_s,
        )
        silent = self._local and not self._site.settings.policy.share_metrics
        try:
            if silent and a.kind is Kind.EVALUATE:
                result = Result(update=None, examples=0, steps=0, metrics={}, seconds=0.0)
            else:
                result = self._kept.result() or self._in_turn(trainer, job)
            if result is not None and self._local and a.kind is Kind.TRAIN and self._charge is None:  # it was kept
                self._charge = self._site.ledger.charged(a) or self._reserve(result.examples)
            if result is not None:
                self._events.put(replace(result, metrics={}) if silent else result)
        except Exception as error:
            self._events.put(error)

    def _in_turn(self, trainer: Trains, job: Job) -> Result | None:
        """The job's result, once those in front are done; None when this conversation is over before that."""
        a = self.assignment
        while not self._site.turn.acquire(timeout=TURN_S):
            if self._over.is_set():
                return None
            front = self._site.front
            self._sign = Sign(phase="waiting", step=front.step, steps=front.steps)
        try:
            self._site.front = Sign(phase="waiting")
            with self._running_lock:
                if self._over.is_set():
                    return None
                self._running = True
            if (result := self._kept.result()) is not None:  # of an earlier hold of this assignment, ended just now
                return result
            self._began = time.monotonic()
            if self._local and a.kind is Kind.TRAIN:
                examples = trainer.run(replace(job, kind="inspect"), self._on_progress).examples
                self._charge = self._reserve(examples)
                job = replace(job, expected=examples)
            result = self._run(trainer, job)
            took_s = round(time.monotonic() - self._began, 2)
            log.info("training done", extra={"assignment": job.id, "steps": result.steps, "took_s": took_s})
            self._kept.keep(result)
            return result
        finally:
            with self._running_lock:
                self._running = False
            self._site.turn.release()

    def _reserve(self, examples: int) -> int:
        """Charge a training on so many examples to the site's ledger, or raise PrivacyRefusal."""
        a, settings = self.assignment, self._site.settings
        event = training_event(a.train, a.dp, examples)
        return self._site.ledger.reserve(a, settings.tasks[a.task].dataset, event, settings.policy)

    def _run(self, trainer: Trains, job: Job) -> Result:
        """The job's result; a rank that something outside has killed costs one start from the last checkpoint."""
        try:
            return trainer.run(job, self._on_progress)
        except TrainerFailed as failed:
            if not failed.killed or not self._kept.has_checkpoint or self._over.is_set():
                raise
            log.warning("a rank was killed", extra={"assignment": self.assignment.id, "why": failed.detail})
            return trainer.run(job, self._on_progress)

    def _on_progress(self, progress: Progress) -> None:
        step, steps = progress.step, progress.steps
        if self.assignment.secure is not None:
            step, steps = coarse(step, steps, time.monotonic() - self._began)
        self._site.front = self._sign = Sign(phase="training", step=step, steps=steps)

    def _listen(self) -> None:
        after: StepKind | None = None
        try:
            while not self._over.is_set():
                asked = time.monotonic()
                step = self._link.step(self.assignment, after)
                if step is None:
                    self._over.wait(max(0.0, PACE_S - (time.monotonic() - asked)))
                    continue
                if after is not None and ORDER.index(step.kind) <= ORDER.index(after):
                    raise PeerError(f"the coordinator said {step.kind} after {after}")
                after = step.kind
                if after is StepKind.GONE:
                    self._interrupted = self._interrupted or TooLate(step.reason or "the attempt ended")
                self._events.put(step)
                if after in {StepKind.DONE, StepKind.GONE}:
                    return
        except MurmurError as error:
            self.cancel(error)

    def _beat(self) -> None:
        every_s = self.assignment.patience_s / 5
        pace_s = min(PACE_S, every_s)
        sent, sent_at, missed, pause_s = None, 0.0, 0, 0.0
        # With jitter, for a cohort is handed its work at one instant; slower while the coordinator is away, but never
        # so slow that it would be taken for dead once the coordinator is back.
        while not self._over.wait(jitter.uniform(0.8, 1.2) * pace_s + min(every_s, pause_s)):
            sign = self._sign
            if sign == sent and time.monotonic() - sent_at < every_s:
                continue
            try:
                self._link.progress(self.assignment, sign)
                sent, sent_at, missed, pause_s = sign, time.monotonic(), 0, 0.0
            except Unavailable:  # the work goes on; the coordinator will hear of it when it is back
                pause_s, missed = backoff_s(missed, jitter.random()), missed + 1
            except MurmurError as error:
                self.cancel(error)
                return

    # The end

    def _report(self, error: Exception) -> None:
        a = self.assignment
        code, detail = describe(error, share=self._site.settings.policy.share_errors)
        unforeseen = error if not isinstance(error, MurmurError) else None
        log.warning(
            "assignment failed", exc_info=unforeseen, extra={"assignment": a.id, "code": code, "why": str(error)}
        )
        if self._over.is_set():
            return
        try:
            stopping = isinstance(error, Unavailable)
            self._link.fail(a, Failure(fence=a.fence, code=code, detail=detail), tries=1 if stopping else 8)
        except MurmurError as refused:
            self._settled = not isinstance(refused, Unavailable)
            log.info("the coordinator did not take the failure", extra={"assignment": a.id, "why": refused.detail})

    def _note_end(self, state: str, why: str) -> None:
        try:
            self._site.record.ended(self.assignment.id, state, why)
        except MurmurError as error:  # all of this is over already; what leaves next will meet it as well
            log.error("the end was not noted", extra={"assignment": self.assignment.id, "why": error.detail})

    def _end(self) -> None:
        """Leave nothing behind: no job, no thread that still posts, no file that nobody will ask for again."""
        self._over.set()
        for thread in self._threads:
            while thread.name.startswith("train ") and thread.is_alive():
                with self._running_lock:
                    if self._running and self._trainer is not None:
                        self._trainer.cancel()
                thread.join(1.0)
        if self._kept.leave(discard=self._settled) and self._charge is not None:
            self._site.ledger.release(self._charge)  # unless it left
