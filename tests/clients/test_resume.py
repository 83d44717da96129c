"""A killed agent goes on inside its round: the real process, its trainer and its files, against the double."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from murmur.clients import conversation as conversation_module
from murmur.clients import link as link_module
from murmur.clients.conversation import Conversation
from murmur.clients.engine.drawing import epoch_order
from murmur.clients.engine.loop import run_job
from murmur.clients.identity import create_identity
from murmur.clients.job import Job, Result
from murmur.clients.kept import SPARE, SPARE_S, Shelf, work_digest
from murmur.clients.settings import parse_settings, write_settings
from murmur.clients.shared import Site
from murmur.clients.task import load_task
from murmur.clients.trainer import TrainerFailed
from murmur.protocol.errors import TooLate, Unavailable
from murmur.protocol.sections import Train

from ..waiting import wait_until
from .coordinator_double import CoordinatorDouble
from .servers import serve

TASK = '''
import os, time
import torch
from torch import nn
from torch.utils.data import TensorDataset


class Net(nn.Module):
    """The double's model: its parameters and buffers have these names, shapes and dtypes."""

    def __init__(self):
        super().__init__()
        self.conv, self.body, self.norm = nn.Module(), nn.Module(), nn.Module()
        self.conv.weight = nn.Parameter(torch.zeros(4, 3, dtype=torch.float16))
        self.body.weight = nn.Parameter(torch.zeros(50, 40))
        self.body.bias = nn.Parameter(torch.zeros(40))
        self.exact = nn.Parameter(torch.zeros(7, dtype=torch.float64))
        self.norm.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        self.norm.register_buffer("kept", torch.zeros(2, dtype=torch.bool))
        self.drop = nn.Dropout(0.2)

    def forward(self, inputs):
        if self.training:
            self.norm.batches += 1
        hidden = self.drop(inputs) @ self.body.weight + self.body.bias
        return hidden.sum(1) + self.conv.weight.float().sum() + self.exact.float().sum()


class Steps:
    """Writes down which row each step trains on, and takes its time."""

    def __init__(self, seen, pause_s):
        self.seen, self.pause_s = seen, pause_s

    def model(self):
        return Net()

    def data(self, split):
        if split == "test":
            return None
        generator = torch.Generator().manual_seed(1)
        return TensorDataset(torch.randn(60, 50, generator=generator), torch.arange(60))

    def loss(self, output, target):
        if torch.is_grad_enabled() and self.seen:
            with open(self.seen, "a") as file:
                print(int(target), file=file)
            time.sleep(self.pause_s)
        return ((output - target / 60) ** 2).sum()
'''
SETTINGS = Train(batch_size=1, optimizer="Adam", lr=0.01)


def until(condition, what, seconds=60):
    wait_until(condition, seconds, what, every_s=0.01)


def rows(path):
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def begin(home):
    command = [sys.executable, "-m", "murmur.clients.agent", "--dir", str(home)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=home, env=environment)


@pytest.mark.slow
def test_an_agent_killed_in_mid_training_goes_on_from_its_checkpoint(tmp_path):
    (tmp_path / "task.py").write_text(TASK)
    home, seen = tmp_path / "home", tmp_path / "seen"
    home.mkdir()
    coordinator = CoordinatorDouble(
        tmp_path / "coordinator", {"alpha": create_identity(home / "identity.pem")}, masked=False, train=SETTINGS
    )
    reference = f"{tmp_path / 'task.py'}:Steps"
    with serve(coordinator.handle) as url:
        values = {
            "name": "alpha",
            "coordinator": url,
            "checkpoint_s": 0.1,
            "processes": 1,
            "policy": {"require_secure": False},
            "tasks": {"digits": {"reference": reference, "options": {"seen": str(seen), "pause_s": 0.04}}},
        }
        write_settings(parse_settings(values, home))
        checkpoint = home / "work" / "kept" / "run1.1.1.alpha.d" / "checkpoint"
        first = begin(home)
        try:
            until(lambda: len(rows(seen)) >= 20 and any(checkpoint.glob("*.safetensors")), "a checkpoint")
        finally:
            first.kill()
            first.communicate()
        before = []
        while before != (before := rows(seen)):  # its ranks die with it, soon
            time.sleep(0.3)
        second = begin(home)
        try:
            until(lambda: coordinator.parts["alpha"].complete is not None, "the update")
            until(lambda: not any((home / "work" / "kept").iterdir()), "an empty folder")
            second.send_signal(signal.SIGTERM)
            _, text = second.communicate(timeout=60)
        finally:
            second.kill()
    part = coordinator.parts["alpha"]
    assert "training goes on from a checkpoint" in text and part.failure is None
    assert (part.fence, part.complete.weight) == (2, 60)

    a = coordinator.assignments["alpha"]
    job = Job(
        id="x", kind="train", model=coordinator.model_file, update=tmp_path / "undisturbed", train=a.train, mu=a.mu,
        metrics=a.metrics, seed=a.seed, round=a.round, client="alpha",
    )  # fmt: skip
    order = epoch_order(job, 0, 60).tolist()
    after = rows(seen)[len(before) :]
    assert before == order[: len(before)] and after == order[-len(after) :]
    # What was done since the last checkpoint is done again: on a machine that is busy enough, all but its steps.
    repeated = len(before) + len(after) - 60
    print("steps before", len(before), "after", len(after), "repeated", repeated)
    assert 0 <= repeated < len(before)
    run_job(load_task(reference, {"seen": "", "pause_s": 0}), job)
    assert part.received == job.update.read_bytes()


# A killed agent in this process: its threads hang in a request that is never answered, and a new site begins


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(conversation_module, "PACE_S", 0.02)
    monkeypatch.setattr(conversation_module, "TURN_S", 0.01)


@pytest.fixture
def coordinator(tmp_path, identities):
    return CoordinatorDouble(tmp_path / "coordinator", identities, masked=False)


@pytest.fixture
def plain(party):
    party.policies = {"alpha": {"require_secure": False}}
    return party


def again(party, coordinator, **policy):
    """A new agent on the same directory, which is handed the same assignment under a new fence."""
    party.policies["alpha"] = {"require_secure": False, **policy}
    party.sites.pop("alpha", None)
    with coordinator.lock:
        coordinator.parts["alpha"].fence += 1
        fence = coordinator.parts["alpha"].fence
        coordinator.assignments["alpha"] = coordinator.assignments["alpha"].model_copy(update={"fence": fence})


@pytest.fixture
def killed_in_mid_upload(plain, coordinator, monkeypatch):
    """An agent that hangs after the first of its update's pieces has arrived; freed at the end of the test."""
    monkeypatch.setattr(link_module, "PIECE_BYTES", 3000)
    stuck, free = threading.Event(), threading.Event()
    real = coordinator.handle

    def handle(request):
        if request.method == "PATCH" and coordinator.bytes_sent:
            stuck.set()
            free.wait(60)
            raise TooLate("a dead agent's request")
        return real(request)

    monkeypatch.setattr(coordinator, "handle", handle)
    (thread,) = plain.start(coordinator, "alpha").values()
    assert stuck.wait(60)
    monkeypatch.setattr(coordinator, "handle", real)
    assert coordinator.bytes_sent == 3000
    yield
    free.set()
    thread.join(60)


def test_a_finished_update_is_sent_on_from_the_byte_where_it_was(killed_in_mid_upload, plain, coordinator):
    again(plain, coordinator)
    plain.talk(coordinator, "alpha")
    part = coordinator.parts["alpha"]
    assert len(plain.trainers["alpha"].jobs) == 1
    assert part.complete.weight == 100 and part.complete.metrics["loss"].sum == 2.5
    assert hashlib.sha256(part.received).hexdigest() == part.complete.sha256
    assert coordinator.bytes_sent == len(part.received)  # no byte twice


def kept_folder(party):
    return party.folder / "alpha" / "work" / "kept" / "run1.1.1.alpha.d"


def damage(party, coordinator):
    with (kept_folder(party) / "update").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")


def other_lr(party, coordinator):
    a = coordinator.assignments["alpha"]
    coordinator.assignments["alpha"] = a.model_copy(update={"train": Train(lr=0.5)})


def no_json(party, coordinator):
    (kept_folder(party) / "result.json").write_text("[]")


@pytest.mark.parametrize("change", [damage, other_lr, no_json])
def test_a_kept_update_that_does_not_fit_is_trained_again(change, killed_in_mid_upload, plain, coordinator, caplog):
    again(plain, coordinator)
    change(plain, coordinator)
    with coordinator.lock:
        coordinator.parts["alpha"].received = b""
    plain.talk(coordinator, "alpha")
    assert len(plain.trainers["alpha"].jobs) == 2 and coordinator.counted() == ["alpha"]
    assert any(r.message == "kept result ignored" for r in caplog.records)


def test_a_site_that_keeps_nothing_begins_anew(killed_in_mid_upload, plain, coordinator):
    again(plain, coordinator, resume=False)
    with coordinator.lock:
        coordinator.parts["alpha"].received = b""
    plain.talk(coordinator, "alpha")
    first, second = plain.trainers["alpha"].jobs
    assert first.checkpoint is not None and second.checkpoint is None
    assert not kept_folder(plain).exists()


def test_a_masked_round_keeps_nothing_over_a_death(tmp_path, identities, party):
    coordinator = CoordinatorDouble(tmp_path / "coordinator", identities)
    party.trainers["alpha"].hold.clear()
    party.start(coordinator, "alpha")
    assert party.trainers["alpha"].started.wait(60)
    work = party.folder / "alpha" / "work"
    assert [*(work / "kept").iterdir()] == [] and len([*(work / "updates").iterdir()]) == 1
    Site(party.settings("alpha"), identities["alpha"])
    assert [*(work / "updates").iterdir()] == []
    party.trainers["alpha"].cancelled.set()
    coordinator.end("alpha", "over")


def test_an_agent_that_could_not_say_goodbye_keeps_its_work(plain, coordinator):
    plain.trainers["alpha"].hold.clear()
    talk = plain.conversation(coordinator, "alpha")
    thread = threading.Thread(target=talk.run)
    thread.start()
    assert plain.trainers["alpha"].started.wait(60)
    coordinator.faults, coordinator.random.random = 1.0, lambda: 0.1  # connection refused from now on
    talk.cancel(Unavailable("the agent is stopping"))
    thread.join(60)
    assert kept_folder(plain).exists()
    coordinator.faults = 0
    again(plain, coordinator)
    plain.trainers["alpha"].hold.set()
    plain.talk(coordinator, "alpha")
    assert coordinator.counted() == ["alpha"] and not kept_folder(plain).exists()


def test_a_finished_update_does_not_wait_for_its_turn_at_the_trainer(killed_in_mid_upload, plain, coordinator):
    again(plain, coordinator)
    with plain.site("alpha").turn:
        plain.talk(coordinator, "alpha")
    assert coordinator.counted() == ["alpha"]


# A rank that is killed while the agent lives


class Fragile:
    """Fails as often as it is told, before it does what another trainer does."""

    def __init__(self, trainer, *errors, checkpoint=True):
        self.trainer, self.errors, self.checkpoint, self.jobs = trainer, list(errors), checkpoint, []

    def run(self, job: Job, on_progress) -> Result:
        self.jobs.append(job)
        if self.checkpoint:
            job.checkpoint.mkdir(exist_ok=True)
            (job.checkpoint / "000000000001.0.x.safetensors").touch()
        if self.errors:
            raise self.errors.pop(0)
        return self.trainer.run(job, on_progress)

    def cancel(self) -> None:
        self.trainer.cancel()


KILLED = TrainerFailed(1, "died", "it was ended by SIGKILL", killed=True)


@pytest.mark.parametrize(
    ("errors", "checkpoint", "runs", "code"),
    [
        ([KILLED], True, 2, None),
        ([KILLED, KILLED], True, 2, "trainer_failed"),
        ([KILLED], False, 1, "trainer_failed"),
        ([TrainerFailed(0, "KeyError", "no such row")], True, 1, "trainer_failed"),
        ([TrainerFailed(0, "died", "it exited with 3")], True, 1, "trainer_failed"),
    ],
    ids=["killed", "killed twice", "killed before a checkpoint", "error of the task", "exit"],
)
def test_a_killed_rank_costs_one_start_from_the_checkpoint(errors, checkpoint, runs, code, plain, coordinator):
    fragile = Fragile(plain.trainers["alpha"], *errors, checkpoint=checkpoint)
    link = coordinator.link("alpha")
    Conversation(coordinator.assignments["alpha"], site=plain.site("alpha"), link=link, trainer=fragile).run()
    assert fragile.jobs == fragile.jobs[:1] * runs
    failure = coordinator.parts["alpha"].failure
    assert (failure and failure.code) == code
    assert not kept_folder(plain).exists()


# Signs of life


def test_who_waits_for_its_turn_shows_how_far_the_job_in_front_is(plain, coordinator, tmp_path, identities):
    second = CoordinatorDouble(tmp_path / "second", identities, masked=False, attempt=2)
    trainer = plain.trainers["alpha"]
    trainer.hold.clear()
    (one,) = plain.start(coordinator, "alpha").values()
    assert trainer.started.wait(60)
    (two,) = plain.start(second, "alpha").values()
    signs = second.parts["alpha"].progress
    until(lambda: len({sign.step for _, sign in signs}) > 5, "steps of the job in front")
    waiting = [sign for _, sign in signs if sign.step]
    assert {(sign.phase, sign.steps) for sign in waiting} == {("waiting", 1000)}
    assert [sign.step for sign in waiting] == sorted(sign.step for sign in waiting)
    trainer.hold.set()
    for thread in (one, two):
        thread.join(60)
    assert second.counted() == ["alpha"]


def test_who_waits_for_a_download_shows_how_far_it_is(plain, coordinator, tmp_path, monkeypatch):
    monkeypatch.setattr("murmur.clients.models.WAIT_S", 0.01)
    models = plain.site("alpha").models
    with models._lock:
        models._here = 17
        (thread,) = plain.start(coordinator, "alpha").values()
        signs = coordinator.parts["alpha"].progress
        until(lambda: any((sign.phase, sign.bytes) == ("waiting", 17) for _, sign in signs), "a sign")
    thread.join(60)
    assert coordinator.counted() == ["alpha"]


def test_half_a_model_survives_the_download_of_another(plain, coordinator):
    part = plain.site("alpha").models._folder / f"{'0' * 64}.safetensors.part"
    part.write_bytes(b"half")
    plain.talk(coordinator, "alpha")
    assert part.read_bytes() == b"half"


# The folders


@pytest.fixture
def shelf(tmp_path):
    return lambda **options: Shelf(tmp_path, **({"resume": True} | options))


def handed(coordinator, number=1, fence=1):
    return coordinator.assignments["alpha"].model_copy(update={"id": f"run1.{number}.1.alpha", "fence": fence})


def test_what_nobody_comes_back_for_is_deleted(shelf, coordinator, tmp_path):
    first = shelf()
    for number in range(1, SPARE + 4):
        kept = first.take(handed(coordinator, number), "d")
        os.utime(kept.folder, (time.time() - 100 + number,) * 2)
    assert len([*(tmp_path / "kept").iterdir()]) == SPARE + 3  # these are all in use
    shelf()
    assert sorted(p.name for p in (tmp_path / "kept").iterdir()) == [
        f"run1.{number}.1.alpha.d" for number in range(4, SPARE + 4)
    ]
    for path in (tmp_path / "kept").iterdir():
        os.utime(path, (time.time() - SPARE_S - 1,) * 2)
    shelf()
    assert [*(tmp_path / "kept").iterdir()] == []


def test_an_assignment_that_is_handed_out_again_keeps_what_the_first_one_leaves(shelf, coordinator):
    both = shelf()
    old, new = both.take(handed(coordinator), "d"), both.take(handed(coordinator, fence=2), "d")
    old.keep(Result(update=None, examples=3, steps=0, metrics={"loss": (1.0, 3.0)}, seconds=1.0))
    old.leave(discard=True)
    assert new.result().examples == 3
    new.leave(discard=True)
    assert not new.folder.exists()


def test_a_task_that_was_mended_is_another_task(tmp_path, coordinator):
    (tmp_path / "task.py").write_text("a")
    values = {"name": "alpha", "coordinator": "http://127.0.0.1:1", "tasks": {"digits": {"reference": "task.py:T"}}}
    settings = parse_settings(values, tmp_path)
    a = coordinator.assignments["alpha"]
    found = {work_digest(a, settings), work_digest(a.model_copy(update={"fence": 9}), settings)}
    assert len(found) == 1
    (tmp_path / "task.py").write_text("b")
    found.add(work_digest(a, settings))
    found.add(work_digest(a.model_copy(update={"mu": 0.5}), settings))
    found.add(work_digest(a.model_copy(update={"model": "1" * 64}), settings))
    assert len(found) == 4
