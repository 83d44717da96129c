from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from murmur.clients.engine.state import initial_model
from murmur.clients.job import Cancelled, Job, Progress, Result
from murmur.clients.task import load_task
from murmur.clients.trainer import OutOfMemory, Trainer, TrainerFailed, gpu_count
from murmur.protocol.errors import OperatorError
from murmur.protocol.sections import Parallel, Train

from ..waiting import slowness
from .conftest import patiently

TASKS = Path(__file__).parent / "engine" / "sample_tasks.py"


@pytest.fixture
def job(tmp_path: Path) -> Job:
    initial_model(load_task(f"{TASKS}:Rows", {}), 7, tmp_path / "model")
    return Job(
        id="one",
        kind="train",
        model=tmp_path / "model",
        update=tmp_path / "update",
        train=Train(batch_size=16),
        mu=0.0,
        metrics=("loss", "threads", "main"),
        seed=3,
        round=1,
        client="north",
    )


@pytest.fixture
def trainer(tmp_path: Path):
    started: list[Trainer] = []

    def start(name: str = "Rows", processes: int = 2, **options) -> Trainer:
        started.append(Trainer(f"{TASKS}:{name}", options, processes=processes, workdir=tmp_path))
        return started[-1]

    yield start
    for each in started:
        pids = each.pids
        each.close()
        assert not any(living(pid) for pid in pids)
    assert not [*tmp_path.glob("rendezvous*")]


def living(pid: int) -> bool:
    """A zombie answers to signal 0, so the state is read."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def gone_within(seconds: float, pids: list[int]) -> bool:
    began = time.monotonic()
    while time.monotonic() - began < seconds * slowness():
        if not any(map(living, pids)):
            return True
        time.sleep(0.02)
    return False


def test_the_agent_stays_without_torch():
    code = "import sys, murmur.clients.trainer as t; t.Trainer('x:Y', {}, workdir=t.Path('.')).close(); "
    code += "print([m for m in sys.modules if m.split('.')[0] in ('torch', 'numpy')])"
    run = [sys.executable, "-P", "-c", code]
    assert subprocess.run(run, check=True, capture_output=True, text=True).stdout.strip() == "[]"


def test_jobs_and_results_survive_json(job, tmp_path):
    assert Job.from_json(job.to_json()) == job
    kept = replace(job, checkpoint=tmp_path / "kept", checkpoint_s=60.0, digest="0" * 64)
    assert Job.from_json(json.loads(json.dumps(kept.to_json()))) == kept
    result = Result(update=tmp_path / "u", examples=3, steps=2, metrics={"loss": (1.5, 3.0)}, seconds=0.5)
    assert Result.from_json(result.to_json()) == result
    evaluation = replace(result, update=None)
    assert Result.from_json(evaluation.to_json()) == evaluation
    told = Progress(step=1, steps=2, loss=0.5, examples_per_s=9.0)
    assert Progress.from_json(told.to_json()) == told


@pytest.mark.parametrize("processes", [1, 2])
def test_ranks_stay_warm_and_the_same_job_gives_the_same_bytes(processes, trainer, job):
    warm = trainer(processes=processes, dropout=0.5)
    told: list[Progress] = []
    first = warm.run(job, told.append)
    content, pids = job.update.read_bytes(), warm.pids
    assert len(pids) == processes and all(map(living, pids))
    assert (first.update, first.examples, first.steps) == (job.update, 63, 4)
    assert told[-1].step == told[-1].steps
    other = replace(job, id="two", round=2, update=job.update.with_name("second"))
    warm.run(other)
    warm.run(replace(job, id="three"))
    assert job.update.read_bytes() == content != other.update.read_bytes()
    assert warm.pids == pids


def test_a_job_that_asks_for_fewer_processes_gets_them_and_for_more_is_refused(trainer, job):
    warm = trainer(processes=2)
    warm.run(replace(job, parallel=Parallel(data=1)))
    assert len(warm.pids) == 1
    warm.run(replace(job, id="two"))
    assert len(warm.pids) == 2
    with pytest.raises(OperatorError, match=r"parallel\.data = 3 needs as many processes, and this site has 2"):
        warm.run(replace(job, id="three", parallel=Parallel(data=3)))


def test_fifty_jobs_leave_no_more_open_files_or_memory_than_five(trainer, job):
    warm = trainer(processes=1)

    def held() -> tuple[int, int]:
        pid = warm.pids[0]
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return len(os.listdir(f"/proc/{pid}/fd")), pages * os.sysconf("SC_PAGE_SIZE") >> 20

    for number in range(50):
        warm.run(replace(job, id=str(number)))
        if number == 4:
            files, memory_mib = held()
    assert held()[0] == files
    assert held()[1] <= memory_mib + 8


def test_a_killed_rank_fails_the_job_and_the_next_job_works(trainer, job, tmp_path, monkeypatch):
    monkeypatch.setenv("MURMUR_TEST_MARK", str(tmp_path / "mark"))
    fragile = trainer(fault="killed once")
    with pytest.raises(TrainerFailed, match="ended by SIGKILL") as caught:
        fragile.run(job)
    assert caught.value.killed
    assert caught.value.kind == "died"  # and not "gone": this job is what killed it
    assert not job.update.exists()
    began = time.monotonic()
    assert fragile.run(job).examples == 63
    print("recovered in", time.monotonic() - began)


def test_a_rank_that_is_killed_between_jobs_is_replaced(trainer, job):
    warm = trainer()
    warm.run(job)
    old = warm.pids
    os.kill(old[1], signal.SIGKILL)
    assert gone_within(60, [old[1]])
    assert warm.run(job).examples == 63
    assert not set(old) & set(warm.pids)
    assert not living(old[0])


def test_the_rank_that_died_is_named_and_not_its_peer(trainer, job):
    slow = trainer(fault="slow", n=2000)
    pids: list[int] = []

    def kill(told: Progress) -> None:
        if not pids:
            pids.extend(slow.pids)
            os.kill(pids[1], signal.SIGKILL)

    with pytest.raises(TrainerFailed, match="ended by SIGKILL") as caught:
        slow.run(job, kill)
    assert caught.value.rank == 1


class Script:
    """Stands for a group of ranks whose words come in a given order."""

    pids, world, speakers = (1, 2), 2, 2

    def __init__(self, *heard: list[tuple[int, dict]]) -> None:
        self.heard = [*heard]

    def send(self, message: dict) -> None: ...

    def end(self) -> None: ...

    def hear(self, timeout_s: float) -> list[tuple[int, dict]]:
        return self.heard.pop(0) if self.heard else []


LOST_PEER = {"failed": {"kind": "RuntimeError", "detail": "gloo: connection closed by peer", "echo": True}}
BEGUN = [(rank, {"begun": True, "job": "one"}) for rank in (0, 1)]


@pytest.mark.parametrize(
    ("heard", "rank", "kind"),
    [
        ([BEGUN, [(0, LOST_PEER)], [(0, {"died": "1"})], [(1, {"died": "killed"})]], 1, "died"),
        ([BEGUN, [(0, LOST_PEER), (1, {"failed": {"kind": "KeyError", "detail": "x"}})]], 1, "KeyError"),
        ([BEGUN, [(0, LOST_PEER)], [(0, {"died": "1"})]], 0, "RuntimeError"),
    ],
    ids=["killed later", "told later", "never told"],
)
def test_the_first_cause_is_raised_and_not_its_echo(heard, rank, kind, trainer, job, monkeypatch):
    monkeypatch.setattr("murmur.clients.trainer.CAUSE_WAIT_S", 0.1)
    scripted = trainer(processes=2)
    monkeypatch.setattr(scripted, "_live_group", lambda world: Script(*heard))
    with pytest.raises(TrainerFailed) as caught:
        scripted.run(job)
    assert (caught.value.rank, caught.value.kind) == (rank, kind)


def test_a_rank_that_was_gone_before_the_job_is_replaced_once(trainer, job, monkeypatch):
    scripted = trainer(processes=2)
    groups = [Script([(0, {"died": "killed"})]) for _ in range(3)]
    monkeypatch.setattr(scripted, "_group", groups[0])
    monkeypatch.setattr(scripted, "_live_group", lambda world: groups.pop(0))
    with pytest.raises(TrainerFailed, match="gone: killed"):
        scripted.run(job)
    assert len(groups) == 1


def test_an_error_of_the_task_on_one_rank_reaches_the_caller_with_its_line(trainer, job):
    with pytest.raises(TrainerFailed) as caught:
        trainer(fault="raises on rank 1").run(job)
    assert (caught.value.rank, caught.value.kind, caught.value.killed) == (1, "LookupError", False)
    assert caught.value.detail.endswith("LookupError: the drawer of rank 1 is empty")
    assert "sample_tasks.py" in caught.value.detail


@pytest.mark.parametrize("fault", ["out of memory", "out of the machine's memory"])
def test_running_out_of_memory_is_an_error_of_its_own(fault, trainer, job):
    fragile = trainer(fault=fault, processes=1)
    with pytest.raises(OutOfMemory, match=r"memory: a smaller train.micro_batch needs less") as caught:
        fragile.run(job)
    assert not caught.value.killed
    assert fragile.run(replace(job, kind="evaluate")).examples == 21  # the next job has new ranks


@pytest.mark.parametrize("processes", [1, 2])
def test_pieces_are_halved_until_memory_is_enough_and_stay_so(processes, trainer, job, caplog):
    small = trainer(fault="out of memory above 5", processes=processes)
    auto = replace(job, train=Train(batch_size=16, micro_batch="auto"))
    small.run(auto)
    found = job.update.read_bytes()
    told = [(r.was, r.micro_batch) for r in caplog.records if "memory ran out" in r.message]
    assert told == [(16, 8), (8, 4)][-2 if processes == 1 else -1 :]
    pids = small.pids
    small.run(auto)
    assert small.pids == pids  # the ranks were not ended by another try
    small.run(replace(job, train=Train(batch_size=16, micro_batch=4)))
    assert found == job.update.read_bytes()


def test_memory_that_is_too_small_for_one_example_is_an_error(trainer, job, caplog):
    with pytest.raises(OutOfMemory):
        trainer(fault="out of memory", processes=1).run(replace(job, train=Train(batch_size=4, micro_batch="auto")))
    assert [r.micro_batch for r in caplog.records if "memory ran out" in r.message] == [2, 1]


def test_mistakes_of_the_operator_stay_what_they_are(trainer, job, tmp_path):
    with pytest.raises(OperatorError, match="looks like a mean"):
        trainer(fault="mean").run(job)
    with pytest.raises(OperatorError, match="there is no 'Absent'"):
        trainer("Absent").run(job)
    with pytest.raises(OperatorError, match="processes = 0"):
        Trainer("x:Y", {}, processes=0, workdir=tmp_path)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_cancelled_job_ends_at_its_next_batch_and_its_ranks_stay(processes, trainer, job, monkeypatch):
    slow = trainer(processes=processes, fault="slow", n=16_000)
    slow.run(replace(job, kind="evaluate"))
    pids = slow.pids
    monkeypatch.setattr("murmur.clients.trainer.CANCEL_GRACE_S", 60.0)  # no force, however slow the machine
    with pytest.raises(Cancelled, match="stopped after"):
        slow.run(job, lambda told: slow.cancel())
    assert slow.run(replace(job, kind="evaluate")).examples == 21
    assert slow.pids == pids


def test_a_rank_that_does_not_listen_is_killed_when_its_job_is_cancelled(trainer, job, monkeypatch):
    monkeypatch.setattr("murmur.clients.trainer.CANCEL_GRACE_S", 0.3)
    deaf = trainer(fault="hangs")
    deaf.run(replace(job, kind="evaluate"))
    pids = deaf.pids
    with patiently(deaf.cancel), pytest.raises(Cancelled, match="did not stop in time"):
        deaf.run(job)
    assert not any(map(living, pids))


def test_closing_ends_a_job_that_runs(trainer, job):
    slow = trainer(fault="hangs", processes=1)
    threading.Timer(0.3, slow.close).start()
    with pytest.raises(Cancelled, match="the trainer is closed"):
        slow.run(job)
    with pytest.raises(Cancelled, match="the trainer is closed"):
        slow.run(job)


AGENT = """
import sys
import time
from pathlib import Path
from murmur.clients.trainer import Trainer

PARENT_WAS_HERE = True
print("imported", __name__, flush=True)
if __name__ == "__main__":
    import json
    from dataclasses import replace
    from murmur.clients.job import Job

    task, text, how = sys.argv[1:]
    trainer = Trainer(task, {"fault": "hangs"}, processes=2, workdir=Path.cwd())
    job = Job.from_json(json.loads(text))
    trainer.warm()
    print(*trainer.run(replace(job, kind="evaluate")).metrics["main"], flush=True)
    print(*trainer.pids, flush=True)
    if how == "busy":
        trainer.run(job, lambda told: print("training", told, flush=True))
    if how == "idle":
        time.sleep(60)
"""


def start_agent(job: Job, folder: Path, how: str) -> subprocess.Popen[str]:
    (folder / "agent.py").write_text(AGENT)
    run = [sys.executable, "agent.py", f"{TASKS}:Where", json.dumps(job.to_json()), how]
    return subprocess.Popen(run, cwd=folder, stdout=subprocess.PIPE, text=True)


def descendants(pid: int) -> list[int]:
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
    found = [pid]
    for each in found:
        found += [child for child, parent in parents.items() if parent == each]
    return found[1:]


@pytest.mark.parametrize(
    "how", [pytest.param("idle", marks=pytest.mark.slow), "busy", pytest.param("exits", marks=pytest.mark.slow)]
)
def test_no_process_outlives_the_agent_and_its_script_is_imported_once(how, job, tmp_path):
    killed = how != "exits"
    with start_agent(job, tmp_path, how) as agent:
        watchdog = threading.Timer(60, agent.kill)
        watchdog.start()
        assert agent.stdout is not None
        lines = [agent.stdout.readline().split() for _ in range(4 if how == "busy" else 3)]
        assert lines[:2] == [["imported", "__main__"], ["0.0", "2.0"]]
        pids = [int(pid) for pid in lines[2]]
        if killed:
            family = descendants(agent.pid)
            assert set(pids) < set(family)  # the fork server and its resource tracker are there as well
            agent.kill()
            assert gone_within(60, pids)
            assert gone_within(60, family)  # these clean up after themselves, at the speed of a busy machine
        assert agent.wait() == (-signal.SIGKILL if killed else 0)  # an exit that hangs is ended by the watchdog
        watchdog.cancel()
        assert gone_within(60, pids)
    left = [*tmp_path.glob("rendezvous*")]
    assert len(left) == (1 if killed else 0)
    if left:  # what a killed agent leaves, the next one takes away
        with Trainer(f"{TASKS}:Rows", {}, workdir=tmp_path) as after:
            after.run(job)
        assert not [*tmp_path.glob("rendezvous*")]


LOUD = """
from sample_tasks import Rows

class Loud(Rows):
    def __init__(self):
        super().__init__()
        print("hello")
"""


def test_what_ranks_print_goes_to_the_log_file_when_there_is_one(job, tmp_path):
    place = tmp_path / "loud.py"
    place.write_text(LOUD)
    place.with_name("sample_tasks.py").write_text(TASKS.read_text())
    log_file = tmp_path / "ranks.log"
    with Trainer(f"{place}:Loud", {}, workdir=tmp_path, log_file=log_file) as trainer:
        trainer.run(job)
    assert "hello" in log_file.read_text()
    assert log_file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("processes", [1, 2])
def test_ranks_share_the_cores_unless_told_otherwise(processes, trainer, job, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    total, ranks = trainer("Where", processes).run(replace(job, kind="evaluate")).metrics["threads"]
    cores = len(os.sched_getaffinity(0))
    assert total / ranks == max(1, cores // processes)


def test_gpus_are_counted_without_torch(monkeypatch):
    monkeypatch.setattr(os, "listdir", lambda folder: ["null", "nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpu_count() == 2
    for visible, expected in (("0", 1), ("", 0), ("-1", 0), ("0,1,2", 2)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert gpu_count() == expected
