import itertools
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest

from murmur.clients import conversation as conversation_module
from murmur.clients.shared import coarse
from murmur.clients.trainer import TrainerFailed
from murmur.protocol.errors import OperatorError, TooLate, Unavailable
from murmur.protocol.messages import AnswerKind, Kind, Total
from murmur.protocol.tensors import FLOATS, Layout, check_file, map_file

from .conftest import NAMES, examples_of, update_of
from .coordinator_double import MODEL, CoordinatorDouble


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(conversation_module, "PACE_S", 0.02)


@pytest.fixture
def double(tmp_path, identities):
    return lambda **options: CoordinatorDouble(tmp_path / "coordinator", identities, **options)


def weighted_sum(clients, model: Path):
    """What the unmasked sum must be: floats (D,), integers (I,), from the same updates in clear."""
    parts = []
    for floats in (True, False):
        rows = []
        for name in clients:
            update = update_of(name, model)
            flat = [update[t.name].reshape(-1) for t in MODEL.update().tensors if (t.dtype in FLOATS) is floats]
            rows.append(examples_of(name) * np.concatenate(flat).astype(np.float64 if floats else np.int64))
        parts.append(sum(rows))
    return parts


def failure(coordinator, name):
    found = coordinator.parts[name].failure
    assert found is not None, f"{name} reported nothing"
    return found


def left_of(party, name):
    """What lies on a client's disk of the assignments that are over."""
    work = party.site(name).settings.workdir
    return [*(work / "updates").iterdir(), *(work / "kept").iterdir()]


# Rounds that work


def test_a_masked_round_gives_the_sum_of_what_the_trainers_gave(double, party):
    coordinator = double()
    party.talk(coordinator)
    floats, totals = coordinator.totals()
    want_floats, want_integers = weighted_sum(NAMES, coordinator.model_file)
    # Four clients, weight at most 1000, values at most 8: one unit of the ring is 8 * 1000 / 2^28.
    assert np.abs(floats - want_floats).max() < 4 * 0.5 * 8 * 1000 / 2**28 + 1e-9
    assert totals.integers.tolist() == want_integers.tolist()
    assert (totals.clients, totals.weight, totals.clipped) == (4, 1000, 0)
    assert totals.metrics == {"train_loss": (12.0, 80.0), "loss": (10.0, 40.0), "accuracy": (28.0, 40.0)}


def test_a_masked_update_says_nothing_in_clear_and_leaves_no_file(double, party):
    coordinator = double()
    party.talk(coordinator)
    for name, part in coordinator.parts.items():
        assert part.complete.weight is None and part.complete.metrics is None
        update = update_of(name, coordinator.model_file)["body.weight"]
        assert update.tobytes()[:64] not in part.received
        words = np.frombuffer(part.received[-4000:], np.uint32)
        assert abs(words.mean() / 2**32 - 0.5) < 0.05  # uniform: the values themselves are within 1 % of the ring
        assert left_of(party, name) == []
        assert [p.stem for p in (party.site(name).settings.workdir / "models").iterdir()] == [
            coordinator.assignments[name].model
        ]


def test_a_masked_evaluation_sums_metrics_alone(double, party):
    coordinator = double(kind=Kind.EVALUATE)
    party.talk(coordinator)
    floats, totals = coordinator.totals()
    assert (len(floats), totals.weight, len(totals.integers)) == (0, 0, 0)
    assert totals.metrics == {"train_loss": (0.0, 0.0), "loss": (10.0, 40.0), "accuracy": (28.0, 40.0)}


def test_a_plain_round_delivers_the_trainers_file_as_it_is(double, party):
    coordinator = double(masked=False)
    party.policies = {name: {"require_secure": False} for name in NAMES}
    party.talk(coordinator)
    for name, part in coordinator.parts.items():
        path = party.folder / "received"
        path.write_bytes(part.received)
        check_file(path, MODEL.update())
        want = update_of(name, coordinator.model_file)
        assert all(np.array_equal(a, want[k]) for k, a in map_file(path, MODEL.update()).items())
        assert part.complete.weight == examples_of(name)
        assert part.complete.metrics == {
            "train_loss": Total(sum=3, count=20),
            "loss": Total(sum=2.5, count=10),
            "accuracy": Total(sum=7, count=10),
        }


def test_a_plain_evaluation_uploads_an_empty_file(double, party):
    coordinator = double(masked=False, kind=Kind.EVALUATE)
    party.policies = {name: {"require_secure": False} for name in NAMES}
    party.talk(coordinator, "alpha")
    part = coordinator.parts["alpha"]
    assert part.received == Layout(()).header()
    assert part.complete.weight == 0 and set(part.complete.metrics) == {"loss", "accuracy"}


@pytest.mark.parametrize(
    ("changes", "weight"), [({}, 400), ({"max_weight": 250}, 250), ({"weighting": "uniform"}, 1)], ids=str
)
def test_the_weight_is_bounded(double, party, changes, weight):
    coordinator = double(masked=False, **changes)
    party.policies = {name: {"require_secure": False} for name in NAMES}
    party.talk(coordinator, "gamma")
    assert coordinator.parts["gamma"].complete.weight == weight


def test_a_job_is_what_the_assignment_says(double, party):
    coordinator = double()
    party.talk(coordinator)
    (job,) = party.trainers["beta"].jobs
    a = coordinator.assignments["beta"]
    assert (job.kind, job.train, job.mu, job.metrics, job.seed, job.round, job.client) == (
        "train",
        a.train,
        a.mu,
        a.metrics,
        a.seed,
        a.round,
        "beta",
    )


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_round_comes_through_lost_requests_lost_replies_and_restarts(double, party, seed):
    print("seed", seed)
    coordinator = double()
    coordinator.random.seed(seed)
    coordinator.faults = 0.3
    party.talk(coordinator)
    floats, totals = coordinator.totals()
    assert totals.clients == 4 and [p.failure for p in coordinator.parts.values()] == [None] * 4
    assert np.abs(floats - weighted_sum(NAMES, coordinator.model_file)[0]).max() < 1e-3
    size = sum(len(part.received) for part in coordinator.parts.values())
    assert coordinator.bytes_sent == size  # each byte was taken once


def test_a_client_that_drops_out_after_its_shares_does_not_hold_the_others(double, party):
    coordinator = double()
    party.trainers["delta"].hold.clear()
    threads = party.start(coordinator)
    while AnswerKind.SHARES not in coordinator.parts["delta"].answers:
        time.sleep(0.01)
    coordinator.leave("delta")
    for name in ("alpha", "beta", "gamma"):
        threads[name].join(60)
        assert not threads[name].is_alive()
    coordinator.end("delta", "the round went on")
    threads["delta"].join(60)
    floats, totals = coordinator.totals()
    want = weighted_sum(["alpha", "beta", "gamma"], coordinator.model_file)[0]
    assert (totals.clients, totals.weight) == (3, 700)
    assert np.abs(floats - want).max() < 1e-3
    assert coordinator.parts["delta"].failure is None


def test_the_model_is_downloaded_once_for_two_rounds(double, party):
    party.talk(double())
    second = double(attempt=2)
    party.talk(second)
    assert second.counted() == sorted(NAMES)
    assert not any("/blobs/" in request for request in second.requests)


def test_what_a_client_keeps_of_a_run_waits_at_its_site_for_the_next_round(double, party):
    party.trainers["beta"].keeps = True
    for round, attempt in ((1, 1), (2, 1), (2, 2)):
        party.talk(double(round=round, attempt=attempt))
    first, second, again = (job.own for job in party.trainers["beta"].jobs)
    assert first is None and second == again  # a round that is tried again begins as its first attempt
    assert second.name == "run1.1.safetensors" and second.read_text() == "1"
    assert party.sites["beta"].own.before("run1", 3).read_text() == "12"
    assert party.trainers["alpha"].jobs[-1].own is None


def test_a_trainer_is_told_the_algorithm_and_its_sites_bound_on_time(double, party):
    site = party.site("alpha")
    site.settings = site.settings.model_copy(update={"train_s": 60.0})
    party.talk(double(algorithm="scaffold"))
    told = {name: (trainer.jobs[-1].algorithm, trainer.jobs[-1].train_s) for name, trainer in party.trainers.items()}
    assert told == {name: ("scaffold", 60.0 if name == "alpha" else 0.0) for name in NAMES}


def test_a_cached_model_that_the_disk_changed_is_fetched_again(double, party):
    party.talk(double())
    second = double(attempt=2)
    cached = party.folder / "alpha" / "work" / "models" / f"{second.assignments['alpha'].model}.safetensors"
    data = bytearray(cached.read_bytes())
    data[-1] ^= 1
    cached.write_bytes(data)
    party.talk(second)
    assert cached.read_bytes() == second.model and second.counted() == sorted(NAMES)


# Rounds that fail


def test_an_error_of_the_task_is_told_in_its_last_lines(double, party):
    coordinator = double()
    text = "Traceback ...\n" + "line\n" * 50 + "  File x.py\x1b[31m, line 3\n\nValueError: bad\n"
    party.trainers["alpha"].error = TrainerFailed(0, "ValueError", text)
    party.talk(coordinator, "alpha")
    found = failure(coordinator, "alpha")
    assert found.code == "trainer_failed"
    assert found.detail == "line\nFile x.py [31m, line 3\nValueError: bad"


def test_a_site_may_keep_the_words_of_its_errors(double, party):
    coordinator = double()
    party.policies["alpha"] = {"share_errors": False}
    party.trainers["alpha"].error = KeyError("Jane Doe")
    party.talk(coordinator, "alpha")
    found = failure(coordinator, "alpha")
    assert (found.code, found.detail) == ("client_error", "KeyError")


def test_settings_that_cannot_work_are_reported(double, party):
    coordinator = double()
    party.trainers["alpha"].error = OperatorError("there is no file digits.py")
    party.talk(coordinator, "alpha")
    assert failure(coordinator, "alpha").code == "operator_error"
    assert failure(coordinator, "alpha").detail == "there is no file digits.py"


def test_a_full_disk_of_the_coordinator_costs_nothing_and_signs_of_life_go_on(double, party, monkeypatch):
    party.policies["alpha"] = {"require_secure": False}
    coordinator = double(masked=False)
    full, real = threading.Event(), coordinator.handle
    full.set()

    def handle(request):
        if full.is_set() and ("upload" in request.url.path or "complete" in request.url.path):
            return httpx.Response(507, headers={"Murmur-Protocol": "1"})
        return real(request)

    monkeypatch.setattr(coordinator, "handle", handle)
    (thread,) = party.start(coordinator, "alpha").values()
    signs = coordinator.parts["alpha"].progress
    deadline = time.monotonic() + 60
    while sum(sign.phase == "uploading" for _, sign in signs) < 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert thread.is_alive() and coordinator.parts["alpha"].failure is None
    full.clear()
    thread.join(60)
    assert coordinator.counted() == ["alpha"] and len(party.trainers["alpha"].jobs) == 1


def test_an_update_that_is_not_finite_never_leaves(double, party):
    def diverge(arrays):
        arrays["body.weight"][3, 4] = np.nan

    coordinator = double()
    party.trainers["alpha"].change = diverge
    party.talk(coordinator)
    found = failure(coordinator, "alpha")
    # 7 of "exact", 40 of "body.bias", then row 3, column 4 of 40 columns
    assert found.code == "bad_update" and f"element {7 + 40 + 3 * 40 + 4} of the update is nan" in found.detail
    assert coordinator.parts["alpha"].received == b""
    assert coordinator.counted() == ["beta", "delta", "gamma"]


def test_a_round_that_ended_is_left_without_a_word_and_training_stops(double, party):
    coordinator = double()
    party.trainers["alpha"].hold.clear()
    threads = party.start(coordinator, "alpha")
    assert party.trainers["alpha"].started.wait(60)
    coordinator.end("alpha", "the attempt was given up")
    threads["alpha"].join(60)
    assert not threads["alpha"].is_alive()
    assert party.trainers["alpha"].cancelled.is_set()
    assert coordinator.parts["alpha"].failure is None
    assert left_of(party, "alpha") == []


def test_a_heartbeat_hears_that_the_round_went_on(double, party, monkeypatch):
    coordinator = double()
    party.trainers["alpha"].hold.clear()
    monkeypatch.setattr(coordinator, "step", lambda name, after: None)  # the long poll says nothing
    threads = party.start(coordinator, "alpha")
    assert party.trainers["alpha"].started.wait(60)
    coordinator.end("alpha", "too slow")
    threads["alpha"].join(60)
    assert not threads["alpha"].is_alive() and coordinator.parts["alpha"].failure is None


def test_an_agent_that_stops_says_so(double, party):
    coordinator = double()
    party.trainers["alpha"].hold.clear()
    talk = party.conversation(coordinator, "alpha")
    thread = threading.Thread(target=talk.run)
    thread.start()
    assert party.trainers["alpha"].started.wait(60)
    began = time.monotonic()
    talk.cancel(Unavailable("the agent is stopping"))
    thread.join(60)
    assert time.monotonic() - began < 5
    assert failure(coordinator, "alpha").code == "unavailable"
    assert party.trainers["alpha"].cancelled.is_set()


def test_a_conversation_that_is_called_off_says_nothing(double, party):
    coordinator = double()
    party.trainers["alpha"].hold.clear()
    talk = party.conversation(coordinator, "alpha")
    thread = threading.Thread(target=talk.run)
    thread.start()
    assert party.trainers["alpha"].started.wait(60)
    talk.cancel(TooLate("void"))
    thread.join(60)
    assert not thread.is_alive() and coordinator.parts["alpha"].failure is None


def test_a_silent_training_still_shows_a_sign_of_life_five_times_in_its_patience(double, party):
    coordinator = double(patience_s=0.5)
    party.trainers["alpha"].hold.clear()
    party.trainers["alpha"].run = lambda job, on_progress: time.sleep(1.0)  # says nothing
    talk = party.conversation(coordinator, "alpha")
    thread = threading.Thread(target=talk.run)
    thread.start()
    time.sleep(0.9)
    times = [at for at, _ in coordinator.parts["alpha"].progress]
    talk.cancel(TooLate("enough"))
    thread.join(60)
    assert len(times) >= 4  # of 9 on an idle machine
    assert max(b - a for a, b in itertools.pairwise(times)) < 0.5


def test_signs_of_life_are_fewer_while_the_coordinator_is_away_and_come_again(double, party):
    coordinator = double()
    party.trainers["alpha"].hold.clear()
    threads = party.start(coordinator, "alpha")
    assert party.trainers["alpha"].started.wait(60)
    coordinator.faults, coordinator.random.random = 1.0, lambda: 0.1  # connection refused
    coordinator.requests.clear()
    time.sleep(1.0)
    tried = sum("progress" in request for request in coordinator.requests)
    assert 1 <= tried < 25  # without pauses they would be 50
    coordinator.faults = 0.0
    before, deadline = len(coordinator.parts["alpha"].progress), time.monotonic() + 12
    while len(coordinator.parts["alpha"].progress) == before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(coordinator.parts["alpha"].progress) > before
    coordinator.end("alpha", "enough")
    threads["alpha"].join(60)


@pytest.mark.parametrize(("masked", "steps"), [(False, 1000), (True, 100)])
def test_a_masked_rounds_progress_does_not_say_how_many_steps(double, party, masked, steps):
    party.policies["alpha"] = {"require_secure": masked}
    coordinator = double(masked=masked)
    party.trainers["alpha"].hold.clear()
    talk = party.conversation(coordinator, "alpha")
    thread = threading.Thread(target=talk.run)
    thread.start()
    deadline = time.monotonic() + 60
    while talk.sign.step < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert talk.sign.phase == "training" and talk.sign.steps == steps
    time.sleep(0.1)
    talk.cancel(TooLate("enough"))
    thread.join(60)
    phases = {sign.phase for _, sign in coordinator.parts["alpha"].progress}
    done = [sign.step for _, sign in coordinator.parts["alpha"].progress]
    assert "training" in phases and done == sorted(done)


def test_the_progress_of_a_masked_round_is_finer_where_it_takes_long():
    assert coarse(0, 111, 0.0) == (0, 100)
    assert coarse(37, 111, 10.0) == (33, 100)
    assert coarse(111, 111, 30.0) == (100, 100)
    assert coarse(37, 111, 1201.0) == (333, 1000)  # 111 / 37 * 1201 s is more than an hour
    assert coarse(37, 0, 37.0) == (37, 0)  # signs of life of a job that does not know its end


def test_one_site_trains_one_job_at_a_time(double, party, tmp_path, identities):
    party.policies["alpha"] = {"require_secure": False}
    trainer = party.trainers["alpha"]
    trainer.hold.clear()
    first = double(masked=False)
    second = CoordinatorDouble(tmp_path / "second", identities, masked=False, attempt=2)
    threads = [*party.start(first, "alpha").values(), *party.start(second, "alpha").values()]
    assert trainer.started.wait(60)
    time.sleep(0.3)
    assert len(trainer.jobs) == 1
    trainer.hold.set()
    for thread in threads:
        thread.join(60)
    assert (len(trainer.jobs), trainer.most_at_once) == (2, 1)
    assert first.counted() == second.counted() == ["alpha"]


def test_a_coordinator_that_goes_back_is_not_followed(double, party, monkeypatch):
    coordinator = double()
    real = coordinator.step
    monkeypatch.setattr(coordinator, "step", lambda name, after: real(name, "" if after == "roster" else after))
    party.talk(coordinator)
    assert {failure(coordinator, name).code for name in NAMES} == {"peer_error"}
    assert "roster after roster" in failure(coordinator, "alpha").detail


def test_files_of_an_agent_that_was_killed_are_swept_up(party):
    site = party.site("alpha")
    updates = site.settings.workdir / "updates"
    (updates / "old.update").write_bytes(b"x")
    (updates / "run1.1.1.alpha.1.d").mkdir()
    (updates / "run1.1.1.alpha.1.d" / "update").write_bytes(b"x")
    del party.sites["alpha"]
    party.site("alpha")
    assert list(updates.iterdir()) == []
