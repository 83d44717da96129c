"""What travels of a model, what is frozen at every site, and what the file of an older release had."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from murmur.clients.engine.loop import run_job
from murmur.clients.engine.own import load_model
from murmur.clients.engine.parts import digest
from murmur.clients.engine.session import Session
from murmur.clients.engine.state import built, initial_model, layout_of, parts_of, read_model, write_model
from murmur.protocol.encoding import canonical_json
from murmur.protocol.errors import BadUpdate, OperatorError
from murmur.protocol.tensors import read_layout

from .conftest import tensors
from .test_checkpoint import ALWAYS, ONE, files, interrupted, resumed, waits
from .test_loop import HARD, apart, size

_ = waits  # a fixture


def names(module, **how):
    return {t.name for t in layout_of(module, parts_of(module, **how)).tensors}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_parameters_that_train_travel_with_the_buffers_of_modules_that_train(task):
    parts = parts_of(task("Frozen").model())
    trained = {"1.0.weight", "1.0.bias", "1.1.weight", "1.1.bias", "1.3.weight", "1.3.bias"}
    statistics = {"1.1.running_mean", "1.1.running_var", "1.1.num_batches_tracked"}
    assert {*parts.travels} == trained | statistics and parts.buffers == statistics
    assert [n for n in parts.frozen if "running" in n] == ["0.1.running_mean", "0.1.running_var"]
    assert parts.local == ()


def test_a_buffer_of_a_module_without_parameters_goes_with_the_module_around_it():
    def block():
        return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False))

    model = nn.Sequential(block(), block(), nn.BatchNorm1d(2, affine=False))
    everything = {*model.state_dict()}
    assert names(model) == everything and parts_of(model).base == ""  # nothing frozen: as it always was
    model[0].requires_grad_(False)
    assert everything - names(model) == {n for n in everything if n.startswith("0.")}  # the last one: the model trains
    assert names(nn.BatchNorm1d(2, affine=False)) == {"running_mean", "running_var", "num_batches_tracked"}


def test_the_digest_is_of_names_dtypes_shapes_and_bits():
    tensors = {"b": torch.tensor([1.0, 2.0]), "a": torch.tensor([[3]], dtype=torch.int16)}
    by_hand = hashlib.sha256(canonical_json(["a", "torch.int16", [1, 1]]) + b"\x03\x00")
    by_hand.update(canonical_json(["b", "torch.float32", [2]]) + bytes.fromhex("0000803f00000040"))
    assert digest(tensors) == by_hand.hexdigest() == digest(dict(reversed(tensors.items())))
    wide = torch.arange(12.0).reshape(3, 4)
    assert digest({"w": wide.T.contiguous().T}) == digest({"w": wide})
    others = [{"w": wide + 1e-6}, {"v": wide}, {"w": wide.reshape(4, 3)}, {"w": wide.view(torch.int32)}]
    assert len({digest(t) for t in [*others, {"w": wide}]}) == 5


def test_a_version_names_the_base_and_has_nothing_of_it(task, tmp_path):
    layout = initial_model(task("Frozen"), 7, tmp_path / "m")
    assert layout.base == parts_of(task("Frozen").model()).base != ""
    assert read_layout(tmp_path / "m") == layout and layout.base.encode() in (tmp_path / "m").read_bytes()[:200]
    assert not any(t.name.startswith("0.") for t in layout.tensors)
    assert layout.update().base == "" and layout.digest() != replace(layout, base="").digest()


def test_another_base_is_refused_with_both_digests_and_nothing_is_loaded(task, tmp_path):
    ours = initial_model(task("Frozen", base=1), 7, tmp_path / "m")
    module = built(task("Frozen", base=2))
    theirs, before = parts_of(module).base, {n: t.clone() for n, t in module.state_dict().items()}
    with pytest.raises(OperatorError, match=f"base has the SHA-256 {ours.base}, this site's {theirs}: every site"):
        read_model(module, tmp_path / "m")
    assert same(before, module.state_dict())


def test_a_trainer_of_another_base_or_of_more_or_fewer_parts_reports_it(task, make_job):
    job = make_job("Adapted")
    for options, words in (
        ({"base": 2}, "every site needs the same"),
        ({"freeze_a": True}, "1 tensors too many|2 tensors too many"),
    ):
        with pytest.raises(OperatorError, match=words):
            run_job(task("Adapted", **options), job)
    with pytest.raises(OperatorError, match=r"2 tensors are missing, the first is '0\.down\.weight'"):
        run_job(task("Adapted"), make_job("Adapted", {"freeze_a": True}))


def test_a_base_that_is_drawn_anew_each_time_cannot_start_a_run(task, tmp_path):
    drawn = task()
    drawn.model = lambda: nn.Sequential(nn.Linear(8, 8).requires_grad_(False), nn.Linear(8, 3))
    with pytest.raises(OperatorError, match=r"another one each time that model\(\) builds it"):
        initial_model(drawn, 7, tmp_path / "m")
    assert not [*tmp_path.iterdir()]


def test_a_model_of_which_nothing_travels_cannot_start_a_run(task, tmp_path):
    still = task()
    still.model = lambda: nn.Linear(8, 3).requires_grad_(False)
    with pytest.raises(OperatorError, match="nothing of the task's model would travel"):
        initial_model(still, 7, tmp_path / "m")


def test_a_version_of_an_older_release_has_the_frozen_tensors_and_goes_on_so(task, make_job, tmp_path):
    job, module = make_job("Frozen", **HARD), built(task("Frozen", base=2))
    whole = parts_of(module)
    write_model(module, tmp_path / "old", replace(whole, travels=whole.travels + whole.frozen, base=""))
    assert {t.name for t in read_layout(tmp_path / "old").tensors} == {*module.state_dict()}
    job = replace(job, model=tmp_path / "old")
    session = Session()
    run_job(task("Frozen", base=1), job, session=session)
    assert torch.equal(session.module.state_dict()["0.0.weight"], module.state_dict()["0.0.weight"])
    assert read_layout(job.update) == read_layout(job.model).update()


def test_a_frozen_part_is_bit_identical_after_training_and_normalizes_as_it_was_made(task, make_job):
    job, session, frozen = make_job("Frozen", **HARD), Session(), task("Frozen")
    run_job(frozen, job, session=session)
    fresh, trained = built(frozen).state_dict(), session.module.state_dict()
    assert same({n: t for n, t in fresh.items() if n[0] == "0"}, {n: t for n, t in trained.items() if n[0] == "0"})
    assert not session.module[0][1].training and session.module[1][1].training
    # The oracle computes the frozen part once, in evaluation mode, and trains the head alone on what it gives.
    inputs, target = frozen.data("train").tensors
    with torch.no_grad():
        features = built(frozen).eval()[0](inputs)
    alone = task("Frozen")
    alone.model = lambda: load_model(frozen, job.model).train()[1]
    head = replace(job, model=job.model.with_name("head"))
    write_model(alone.model(), head.model)
    alone.data = lambda split: torch.utils.data.TensorDataset(features, target) if split == "train" else None
    wanted = tensors(run_job(frozen, job).update)
    found = tensors(run_job(alone, head).update)
    assert size(wanted) > 0.01 and apart({n.removeprefix("1."): t for n, t in wanted.items()}, found) < 1e-6


@pytest.mark.parametrize("settings", [{}, {"micro_batch": 4, "precision": "bf16"}, {"mu": 0.5}], ids=str)
@pytest.mark.parametrize("name", ["Frozen", "Adapted"])
def test_two_ranks_train_what_is_not_frozen_as_one_does(name, settings, alone, in_ranks):
    settings = HARD | settings
    one, two = alone(name, {"n": 64}, **settings)[0], in_ranks(name, {"n": 64}, **settings)[0]
    if name == "Frozen":  # BatchNorm that trains sees other batches on two ranks; without it the two must agree
        one, two = ({n: t for n, t in u.items() if n.startswith("1.3.b")} for u in (one, two))
    assert size(one) > 0.01 and apart(one, two) < (1e-6 if name == "Adapted" and "precision" not in settings else 2e-2)


def test_a_checkpoint_has_nothing_of_the_base_and_ends_in_the_same_bits(task, make_job, tmp_path, waits):
    options = {"dropout": 0.3}
    frozen, job = task("Frozen", **options), make_job("Frozen", options, batch_size=16, epochs=3)
    run_job(frozen, job)
    wanted = job.update.read_bytes()
    job = replace(job, checkpoint=tmp_path / "kept", checkpoint_s=ALWAYS, digest=ONE)
    interrupted(frozen, job, 8)
    kept = {t.name for t in read_layout(files(job.checkpoint)[-1]).tensors}
    assert "parameter.1.0.weight" in kept and "parameter.0.0.weight" not in kept
    assert resumed(frozen, job)[1] == 9
    assert job.update.read_bytes() == wanted


@pytest.mark.parametrize("base", ["", "0" * 63, "G" * 64, "0" * 65, 5, None, ["0" * 64]], ids=str)
def test_a_header_whose_base_is_no_digest_is_refused(base, tmp_path):
    for facts in ({"base": base}, {"base": base, "buffers": "w"}, {"buffers": "w", "base": "0" * 64}):
        text = json.dumps(
            {"__metadata__": facts, "w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, separators=(",", ":")
        ).encode()
        text += b" " * (-len(text) % 8)
        (tmp_path / "m").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
        with pytest.raises(BadUpdate):
            read_layout(tmp_path / "m")
