from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from murmur.clients.engine.compression import (
    narrowed,
    pruned,
    quantized,
    read_tensors,
    rounded,
    weights,
)
from murmur.clients.engine.drawing import epoch_order
from murmur.clients.engine.loop import run_job
from murmur.clients.engine.state import map_tensors, read_model, write_model, write_tensors
from murmur.protocol.errors import OperatorError
from murmur.protocol.recipe import parse_recipe
from murmur.protocol.tensors import read_layout

HARD = {"batch_size": 16, "epochs": 2, "lr": 0.1, "optimizer_options": {"momentum": 0.9, "weight_decay": 0.01}}


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 50), nn.Linear(50, 3))
    write_model(net, tmp_path / "model")
    return tmp_path / "model"


def in_float(path):
    return read_tensors(path)[0]


def test_the_smallest_half_of_all_weights_becomes_zero(model):
    tensors, buffers = read_tensors(model)
    found = pruned(tensors, buffers, 0.5)
    names = weights(tensors, buffers)
    assert names == ["0.weight", "3.weight", "4.weight"]
    flat, cut = (torch.cat([t[name].flatten() for name in names]) for t in (tensors, found))
    assert int((cut == 0).sum()) == round(len(flat) / 2)
    assert flat[cut == 0].abs().max() <= flat[cut != 0].abs().min()
    assert torch.equal(cut[cut != 0], flat[cut != 0])
    assert not bool(cut.signbit()[cut == 0].any())  # zeros, and no negative ones
    assert all(torch.equal(found[name], tensors[name]) for name in tensors.keys() - set(names))


def test_int8_is_what_the_formula_says(tmp_path):
    weight = torch.tensor([[1.27, -0.6, 0.004], [0.0, 0.0, 0.0], [-254.0, 100.0, 3.0]])
    found = quantized({"w": weight, "b": torch.tensor([0.3])}, frozenset())
    assert found["w"].tolist() == [[127, -60, 0], [0, 0, 0], [-127, 50, 2]]  # 0.4 levels, 1.5 to the even 2
    assert found["w.scale"].tolist() == pytest.approx([0.01, 1, 2])
    size = write_tensors(found, tmp_path / "int8").file_bytes
    assert size == (tmp_path / "int8").stat().st_size
    assert {n: str(t.dtype) for n, t in load_file(tmp_path / "int8").items()} == {
        "w": "torch.int8", "w.scale": "torch.float32", "b": "torch.float32",
    }  # fmt: skip
    back = in_float(tmp_path / "int8")
    assert back.keys() == {"w", "b"}
    assert torch.equal(back["w"], rounded(weight))


def test_an_int8_file_is_a_third_at_most_and_each_weight_half_a_level_off(model, tmp_path):
    tensors, buffers = read_tensors(model)
    size = write_tensors(quantized(tensors, buffers), tmp_path / "int8", buffers).file_bytes
    assert size <= 0.35 * model.stat().st_size
    back = in_float(tmp_path / "int8")
    assert back.keys() == tensors.keys()
    for name in tensors:
        error = (back[name] - tensors[name]).abs()
        level = tensors[name].flatten(1).abs().amax(1) / 127 if name in weights(tensors, buffers) else torch.zeros(1)
        assert (error.flatten(1).amax(1) if error.ndim > 1 else error).le(level.max() * 0.5 + 1e-6).all()


def test_a_pruned_int8_file_keeps_its_zeros(model, tmp_path):
    tensors, buffers = read_tensors(model)
    cut = pruned(tensors, buffers, 0.8)
    write_tensors(quantized(cut, buffers), tmp_path / "both", buffers)
    back = in_float(tmp_path / "both")
    assert all(bool((back[name][cut[name] == 0] == 0).all()) for name in weights(cut, buffers))


def test_bf16_halves_the_floats_and_leaves_counters_and_the_header_canonical(model, tmp_path):
    tensors, buffers = read_tensors(model)
    write_tensors(narrowed(tensors), tmp_path / "bf16", buffers)
    layout = read_layout(tmp_path / "bf16")
    assert {t.dtype for t in layout.tensors} == {"BF16", "I64"} and layout.buffers == buffers
    assert torch.equal(in_float(tmp_path / "bf16")["0.weight"], tensors["0.weight"].bfloat16())


def test_a_file_written_again_as_it_is_has_the_same_bytes(model, tmp_path):
    again, kept = read_tensors(model)
    write_tensors(again, tmp_path / "again", kept)
    assert (tmp_path / "again").read_bytes() == model.read_bytes()


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"w": torch.ones(2, 2), "w.scale": torch.ones(2)}, "which int8 needs"),
        ({"w": torch.full((2, 2), float("nan"))}, "not finite"),
    ],
)
def test_what_int8_cannot_hold_is_refused(tensors, words):
    with pytest.raises(OperatorError, match=words):
        quantized(tensors, frozenset())
    with pytest.raises(OperatorError, match="nothing to prune"):
        pruned({"b": torch.ones(3)}, frozenset(), 0.5)


# In training


def test_quantization_aware_training_is_a_loop_with_rounded_weights_in_the_forward(task, make_job, alone):
    """The oracle writes the straight-through estimator as an expression of autograd: w + (rounded(w) - w).detach()."""
    job = make_job("Rows", qat=True, mu=0.3, clip_norm=0.5, **HARD)
    run_job(task("Rows"), job)
    module = task("Rows").model()
    read_model(module, job.model)
    start = {n: t.clone() for n, t in module.state_dict().items()}
    inputs, target = task("Rows").data("train").tensors
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, **job.train.optimizer_options)
    for epoch in range(2):
        for index in epoch_order(job, epoch, 63).split(16):
            seen = {n: p + (rounded(p) - p).detach() if p.ndim > 1 else p for n, p in module.named_parameters()}
            loss = nn.functional.cross_entropy(torch.func.functional_call(module, seen, inputs[index]), target[index])
            pull = sum(((p - start[n]) ** 2).sum() for n, p in module.named_parameters())
            optimizer.zero_grad()
            (loss + 0.15 * pull).backward()
            nn.utils.clip_grad_norm_(module.parameters(), 0.5)
            optimizer.step()
    update = map_tensors(job.update, read_layout(job.update))
    assert max(float((update[n] - (t - start[n])).abs().max()) for n, t in module.state_dict().items()) <= 1e-6
    plain, _ = alone("Rows", mu=0.3, clip_norm=0.5, **HARD)
    assert max(float((update[n] - plain[n]).abs().max()) for n in plain) > 1e-5  # or the test could not tell


def test_two_ranks_train_quantized_as_one(alone, in_ranks):
    settings = HARD | {"qat": True, "micro_batch": 5}
    one, two = alone("Rows", {}, **settings)[0], in_ranks("Rows", {}, **settings)[0]
    # A weight that differs by one rounding of fp32 may be rounded to another level for a step.
    assert max(float((one[n] - two[n]).abs().max()) for n in one) <= 1e-5


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_zeros_of_a_pruned_model_stay_zero_through_a_round(optimizer, task, make_job):
    job = make_job("Rows", keep_zeros=True, mu=0.3, **(HARD if optimizer == "SGD" else {"optimizer": "AdamW"}))
    tensors, buffers = read_tensors(job.model)
    cut = pruned(tensors, buffers, 0.5)
    write_tensors(cut, job.model, buffers)
    run_job(task("Rows"), job)
    update = in_float(job.update)
    for name in weights(cut, buffers):
        assert bool((update[name][cut[name] == 0] == 0).all())
        assert bool((update[name][cut[name] != 0] != 0).any())
    free = replace(job, train=job.train.model_copy(update={"keep_zeros": False}))
    run_job(task("Rows"), free)
    assert any(bool((in_float(job.update)[n][cut[n] == 0] != 0).any()) for n in weights(cut, buffers))


def test_biases_that_begin_at_zero_do_train(task, make_job):
    job = make_job("Rows", keep_zeros=True, **HARD)
    tensors, buffers = read_tensors(job.model)
    write_tensors(tensors | {"0.bias": torch.zeros(16)}, job.model, buffers)
    run_job(task("Rows"), job)
    assert bool((in_float(job.update)["0.bias"] != 0).any())


def test_noise_and_kept_zeros_contradict_each_other():
    values = {"name": "a", "task": "b", "train": {"keep_zeros": True}, "cohort": {"size": 4}}
    private = {"dp": {"mode": "central"}, "strategy": {"weighting": "uniform"}}
    with pytest.raises(OperatorError, match=r"zeros as well: set train.keep_zeros = false"):
        parse_recipe(values | private)
    assert {"qat", "keep_zeros"}.isdisjoint(parse_recipe({"name": "a", "task": "b"}).model_dump()["train"])
