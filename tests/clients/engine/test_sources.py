from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from murmur.clients.engine import checkpoint
from murmur.clients.engine.batches import load
from murmur.clients.engine.drawing import epoch_order
from murmur.clients.engine.loop import run_job
from murmur.clients.engine.sources import Sets, Stream, classes
from murmur.clients.engine.state import map_tensors, read_model
from murmur.clients.job import Cancelled
from murmur.clients.task import load_task
from murmur.clients.trainer import Trainer, TrainerFailed
from murmur.protocol.errors import OperatorError
from murmur.protocol.sections import Dp, Mixture
from murmur.protocol.tensors import read_layout

TASKS = Path(__file__).with_name("data_tasks.py")
HARD = {"batch_size": 16, "epochs": 2, "lr": 0.1, "optimizer_options": {"momentum": 0.9}}


@pytest.fixture
def task():
    return lambda name="Wards", **options: load_task(f"{TASKS}:{name}", options)


@pytest.fixture
def two_ranks(tmp_path, make_job):
    def run(name, options, **settings):
        job = make_job(name, options, **settings)
        with Trainer(f"{TASKS}:{name}", options, processes=2, workdir=tmp_path) as trainer:
            result = trainer.run(job)
        return written(job), result

    return run


def written(job):
    return {n: t.clone() for n, t in map_tensors(job.update, read_layout(job.update)).items()}


def apart(one, other):
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def test_rows_of_several_sets_have_numbers_one_after_the_other():
    numbers = {"a": torch.arange(3), "none": torch.zeros(0), "b": torch.arange(10, 12)}
    data = Sets({name: TensorDataset(n) for name, n in numbers.items()})
    assert [int(data[row][0]) for row in range(len(data))] == [0, 1, 2, 10, 11]
    assert [part.tolist() for part in data.by_set(torch.tensor([4, 0, 3, 2]))] == [[0, 2], [4, 3]]
    assert [data.names[data.set_of(row)] for row in (2, 3)] == ["a", "b"]


# Several data sets


def test_two_halves_train_as_the_whole_does(alone):
    whole, _ = alone("Wards", {"joined": True}, **HARD)
    halves, result = alone("Wards", {}, **HARD)
    assert apart(whole, halves) <= 1e-6
    assert (result.examples, result.steps) == (63, 8)
    assert result.metrics["accuracy"][1] == 21


@pytest.mark.parametrize(
    ("mixture", "micro_batch"),
    [
        (Mixture(), 0),
        (Mixture(weights={"ct": 1, "mri": 3}), 3),
        (Mixture(mode="round-robin", batch_sizes={"ct": 12, "mri": 5}), 0),
        (Mixture(mode="round-robin", weights={"ct": 1, "mri": 1}), 3),
    ],
    ids=str,
)
def test_heads_train_on_two_ranks_as_on_one(mixture, micro_batch, alone, two_ranks):
    settings = HARD | {"mixture": mixture, "micro_batch": micro_batch}
    one, first = alone("Heads", {}, **settings)
    two, second = two_ranks("Heads", {}, **settings)
    assert apart(one, two) <= 1e-6
    assert first.examples == second.examples == 63 and first.steps == second.steps
    assert max(float(t.abs().max()) for t in one.values()) > 1e-2


def test_a_batch_of_several_sets_is_one_step_over_the_sum_of_their_losses(task, make_job):
    """The oracle: an ordinary loop that adds up the losses of both sets' rows, over the number of rows."""
    job = make_job("Heads", {}, batch_size=16, lr=0.1)
    run_job(task("Heads"), job)
    own = task("Heads")
    module, data = own.model(), own.data("train")
    read_model(module, job.model)
    start = {n: t.clone() for n, t in module.state_dict().items()}
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for batch in epoch_order(job, 0, 63).split(16):
        total = torch.zeros(())
        for name, rows in (("ct", batch[batch < 47]), ("mri", batch[batch >= 47] - 47)):
            inputs, target = (t[rows] for t in data[name].tensors)
            total = total + own.loss(module((name, inputs)), (name, target))
        optimizer.zero_grad()
        (total / len(batch)).backward()
        optimizer.step()
    assert apart(written(job), {n: t - start[n] for n, t in module.state_dict().items()}) <= 1e-6


def test_a_head_moves_by_its_own_set_alone(alone):
    weights = {"ct": 1e9, "mri": 1e-9}  # so that an epoch has none of the other set
    update, _ = alone("Heads", {}, mixture=Mixture(weights=weights), **HARD)
    moved = {name for name, t in update.items() if t.abs().max() > 0}
    assert moved == {f"{part}.{kind}" for part in ("lift.ct", "trunk", "heads.ct") for kind in ("weight", "bias")}


def test_the_task_is_told_the_set_of_each_piece_and_metrics_may_say_it(alone, two_ranks):
    settings = {"metrics": ("loss", "ct", "mri")}
    _, result = alone("Heads", {}, **settings)
    totals = {"ct": 15.0, "mri": 6.0}  # rows of the split "test"
    assert {name: result.metrics[name][0] for name in totals} == totals
    _, result = two_ranks("Heads", {}, **settings)
    assert {name: result.metrics[name][0] for name in totals} == totals


@pytest.mark.parametrize("workers", [0, 2])
def test_items_that_are_fetched_one_by_one_are_the_same(workers, task, alone):
    by_tensor, _ = alone("Heads", {}, **HARD)
    one_by_one, _ = alone("Heads", {"fault": "one by one"}, **HARD)
    assert apart(by_tensor, one_by_one) == 0
    data = Sets(task("Heads", fault="one by one").data("train"), told=True)
    (inputs, target), (last, _) = load(data, iter([torch.tensor([3, 1]), torch.tensor([62])]), workers=workers)
    assert inputs[0] == target[0] == "ct" and inputs[1].shape == (2, 8) and target[1].shape == (2,)
    assert last[0] == "mri" and last[1].shape == (1, 5)


def test_a_round_of_a_mixture_ends_in_the_same_bits_after_a_kill(task, make_job, tmp_path, monkeypatch):
    finished(monkeypatch)
    job = make_job("Heads", {}, mixture=Mixture(weights={"ct": 1, "mri": 3}), **HARD)
    run_job(task("Heads"), job)
    wanted = job.update.read_bytes()
    job = replace(job, checkpoint=tmp_path / "kept", checkpoint_s=1e-9, digest="0" * 64)
    with pytest.raises(Cancelled):
        run_job(task("Heads"), job, stop=after(7))
    told = []
    run_job(task("Heads"), job, report=told.append)
    assert told[0].step > 5 and job.update.read_bytes() == wanted


def finished(monkeypatch):
    """Each checkpoint is on disk before the next step begins."""
    real = checkpoint.Checkpoints.write
    monkeypatch.setattr(checkpoint.Checkpoints, "write", lambda self, *args: (real(self, *args), self.close())[0])


def after(count):
    asked = iter(range(10_000))
    return lambda: next(asked) == count


def test_a_mean_in_one_of_the_heads_is_noticed(task, make_job):
    job, own = make_job("Heads", {}, **HARD), task("Heads")
    real = own.loss
    own.loss = lambda output, target: real(output, target) / (len(target[1]) if target[0] == "mri" else 1)
    with pytest.raises(OperatorError, match="looks like a mean"):
        run_job(own, job)


@pytest.mark.parametrize(
    ("name", "options", "settings", "words"),
    [
        ("Wards", {"joined": True}, {"mixture": Mixture(mode="round-robin")}, "gives one, not a dict"),
        ("Wards", {}, {"dp": Dp(mode="local")}, "several data sets would break what is accounted for"),
        ("Streamed", {}, {"dp": Dp(mode="local")}, "a stream would break what is accounted for"),
        ("Streamed", {}, {"balanced": True}, "needs to know all classes beforehand"),
        ("Streamed", {"promised": 0}, {}, r"stream without a length: give the task examples\(split\)"),
        ("Streamed", {"promised": 64}, {}, "ended after 63 examples, and 64 were promised"),
        ("Streamed", {"workers": 2}, {}, "one process reads in its order: set workers to 0 or 1"),
        ("Streamed", {"both": True}, {}, "gave a Lines as 'a': only data sets with a length"),
        ("Rare", {"told": "nobody"}, {"balanced": True}, r"give the task labels\(split\)"),
    ],
)
def test_what_cannot_be_exact_is_refused_with_words(name, options, settings, words, alone):
    with pytest.raises(OperatorError, match=words):
        alone(name, options, **settings)


def test_a_task_that_wants_names_gives_them(task, make_job):
    own = task("Wards", joined=True)
    own.mixed = True
    with pytest.raises(OperatorError, match=r"mixed = True, and .* gave a ConcatDataset: give a dict"):
        run_job(own, make_job("Wards", {}))


# Classes


@pytest.mark.parametrize("told", ["targets", "labels"])
def test_a_rare_class_is_drawn_as_often_as_the_others(told, task, make_job):
    own, seen = task("Rare", told=told), []
    real = own.loss

    def loss(output, target):
        if torch.is_grad_enabled():
            seen.extend(target.tolist())
        return real(output, target)

    own.loss = loss
    result = run_job(own, make_job("Rare", {}, balanced=True, batch_size=16))
    assert [seen.count(kind) for kind in range(3)] == [21, 21, 21]
    assert result.examples == 63  # four of them are of the rare class, and each is counted once


def test_two_ranks_draw_the_same_balanced_batches_as_one(alone, two_ranks):
    settings = HARD | {"balanced": True}
    assert apart(alone("Rare", {}, **settings)[0], two_ranks("Rare", {}, **settings)[0]) <= 1e-6


@pytest.mark.parametrize(
    "labels", [torch.zeros(3), torch.zeros(2, dtype=torch.int64), torch.zeros(3, 1, dtype=torch.int64)]
)
def test_labels_are_one_whole_number_each(labels):
    class Told:
        def labels(self, split):
            return labels

    with pytest.raises(OperatorError, match="one whole number per example"):
        classes(Told(), "train", TensorDataset(torch.zeros(3), torch.zeros(3)))


# Streams


def in_order(task, job, name="Streamed"):
    """The oracle: an ordinary loop over the rows as they come."""
    own = task(name)
    module, rows = own.model(), own.data("train").rows
    read_model(module, job.model)
    start = {n: t.clone() for n, t in module.state_dict().items()}
    optimizer = torch.optim.SGD(module.parameters(), lr=job.train.lr, **job.train.optimizer_options)
    for _ in range(job.train.epochs):
        for inputs, target in zip(*(t.split(job.train.batch_size) for t in rows.tensors), strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(inputs), target).backward()
            optimizer.step()
    return {n: t - start[n] for n, t in module.state_dict().items()}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_is_trained_on_in_its_order(workers, task, make_job):
    job = make_job("Streamed", {}, **HARD)
    result = run_job(task("Streamed", workers=workers), job)
    assert apart(written(job), in_order(task, job)) <= 1e-6
    assert (result.examples, result.steps) == (63, 8)


def test_two_ranks_divide_a_stream(alone, two_ranks):
    one, first = alone("Streamed", {}, **HARD, micro_batch=5)
    two, second = two_ranks("Streamed", {}, **HARD, micro_batch=5)
    assert apart(one, two) <= 1e-6 and first.examples == second.examples == 63


def test_a_stream_is_read_once_an_epoch_and_no_further_than_asked(task, make_job):
    own, ahead = task("Streamed"), []
    real = own.loss

    def loss(output, target):
        if torch.is_grad_enabled():
            ahead.append(own.made["train"].read)
        return real(output, target)

    own.loss = loss
    run_job(own, make_job("Streamed", {}, batch_size=16, epochs=2, round=3))
    assert ahead == [16, 32, 48, 63] * 2
    assert own.made["train"].told == [0, 0, 4, 5]  # two looks at the loss; the third round's readings, two each


def test_only_what_is_asked_for_is_held(task):
    source = task("Streamed").data("train")
    data = Stream(source, 63)
    pieces = [torch.arange(first, first + 3) for first in range(1, 60, 7)]
    found = [inputs for inputs, _ in load(data, iter(pieces))]
    assert all(torch.equal(x, source.rows.tensors[0][p]) for x, p in zip(found, pieces, strict=True))
    assert source.readings == 1
    assert not [v for v in vars(data).values() if isinstance(v, (list, torch.Tensor))]


def test_each_loader_begins_a_stream_anew(task):
    """Not where the last one was left, by a job that was called off: what came before may decide what comes next."""
    data = Stream(task("Streamed").data("train"), 63)
    next(load(data, iter([torch.arange(5), torch.arange(5, 9)])))
    (inputs, _), *_ = load(data, iter([torch.arange(5, 9)]))
    assert torch.equal(inputs, data.source.rows.tensors[0][5:9]) and data.source.readings == 2


def test_a_resumed_stream_skips_what_was_done(task, make_job, tmp_path, monkeypatch):
    finished(monkeypatch)
    job = make_job("Streamed", {}, **HARD)
    run_job(task("Streamed"), job)
    wanted = job.update.read_bytes()
    job = replace(job, checkpoint=tmp_path / "kept", checkpoint_s=1e-9, digest="0" * 64)
    with pytest.raises(Cancelled):
        run_job(task("Streamed"), job, stop=after(8))
    told = []
    run_job(task("Streamed"), job, report=told.append)
    assert told[0].step > 6 and job.update.read_bytes() == wanted


def noted(note: Path) -> list[list[int]]:
    """Which rows each process has read, in the order they began."""
    found: dict[str, list[int]] = {}
    for process, row in map(str.split, note.read_text().splitlines()):
        found.setdefault(process, []).append(int(row))
    return [*found.values()]


@pytest.mark.slow
def test_a_killed_rank_goes_on_in_its_stream(make_job, tmp_path, monkeypatch):
    """Each of two ranks reads the stream; the second is killed in the middle of its first reading."""
    note, mark = tmp_path / "note", tmp_path / "mark"
    monkeypatch.setenv("MURMUR_TEST_MARK", str(mark))
    options = {"note": str(note), "fault": "killed late", "n": 100}
    mark.touch()  # undisturbed
    job = make_job("Stateful", options, **HARD)
    with Trainer(f"{TASKS}:Stateful", options, processes=2, workdir=tmp_path) as trainer:
        trainer.run(job)
    wanted = job.update.read_bytes()
    mark.unlink()
    note.unlink()
    job = replace(job, checkpoint=tmp_path / "kept", checkpoint_s=1e-9, digest="0" * 64)
    with Trainer(f"{TASKS}:Stateful", options, processes=2, workdir=tmp_path) as trainer:
        with pytest.raises(TrainerFailed, match="SIGKILL"):
            trainer.run(job)
        trainer.run(job)
    assert mark.exists() and job.update.read_bytes() == wanted
    read = [[(process[n], n and process[n - 1]) for n in range(len(process))] for process in noted(note)[2:]]
    assert len(read) == 2
    for rows in read:  # a reading that goes on begins elsewhere than at 0 and not behind the row before
        assert any(row and row != before + 1 for row, before in rows)


@pytest.mark.parametrize("kept", ["a stream that says where it is", "a state that cannot be kept"])
def test_a_stream_with_a_state_goes_on_where_it_was(kept, task, make_job, tmp_path, monkeypatch, caplog):
    finished(monkeypatch)
    note = tmp_path / "note"
    job = make_job("Stateful", {"note": str(note)}, **HARD)
    run_job(task("Stateful", note=str(note)), job)
    wanted = job.update.read_bytes()
    one, other = (task("Stateful", note=str(note)) for _ in range(2))
    if kept != "a stream that says where it is":
        real = one.data
        monkeypatch.setattr(one, "data", lambda split: unkept(real(split)))
    job = replace(job, checkpoint=tmp_path / "kept", checkpoint_s=1e-9, digest="0" * 64)
    with pytest.raises(Cancelled):
        run_job(one, job, stop=after(9))
    note.unlink()
    told = []
    run_job(other, job, report=told.append)
    assert job.update.read_bytes() == wanted
    done = told[0].step - 1 - 2 - 4  # batches of the second reading; before it the split "test" has two, the first four
    assert done in (2, 3)
    (read,) = noted(note)
    assert read[:8] == [0, 1, 2, 3] * 2  # the loss is looked at
    if kept == "a stream that says where it is":
        assert read[8:] == [*range(16 * done, 63)] and not [r for r in caplog.records if "place" in r.message]
    else:
        assert read[8:] == [*range(63)]
        assert "a set is neither a plain value nor a tensor" in str([r.__dict__ for r in caplog.records])


def unkept(data):
    if hasattr(data, "state_dict"):
        data.state_dict = lambda: {"seen": {1, 2}}
    return data
