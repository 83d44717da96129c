from __future__ import annotations

import subprocess
import sys

import pytest
import safetensors.torch
import torch
from torch import nn

from murmur.clients.engine import state
from murmur.clients.engine.state import (
    initial_model,
    layout_of,
    map_tensors,
    named_tensors,
    read_model,
    write_model,
    write_update,
)
from murmur.protocol.errors import BadUpdate, OperatorError
from murmur.protocol.tensors import map_file, read_layout


class Mixed(nn.Module):
    """Every kind of tensor that a model may carry."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 2))
        self.brief = nn.Parameter(torch.randn(5).bfloat16())
        self.long = nn.Parameter(torch.randn(2, 2, dtype=torch.float64))
        self.empty = nn.Parameter(torch.zeros(0, 4))
        self.register_buffer("steps", torch.tensor(7))
        self.register_buffer("seen", torch.tensor([1, 250], dtype=torch.uint8))
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("scratch", torch.randn(4), persistent=False)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


def same(one, other):
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_model_comes_back_as_it_was(tmp_path):
    ours, theirs = Mixed(), Mixed()
    layout = write_model(ours, tmp_path / "m")
    assert not same(ours, theirs)
    assert read_model(theirs, tmp_path / "m") == layout == read_layout(tmp_path / "m")
    assert same(ours, theirs)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_the_file_is_the_one_that_safetensors_writes(tmp_path):
    model = Mixed()
    write_model(model, tmp_path / "ours")
    safetensors.torch.save_file(model.state_dict(), tmp_path / "theirs", {"buffers": "mask,seen,steps"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_buffers_are_named_and_those_that_do_not_persist_stay_behind():
    layout = layout_of(Mixed())
    assert layout.buffers == {"steps", "seen", "mask"}
    assert "scratch" not in {t.name for t in layout.tensors}


def test_tied_weights_travel_once_and_stay_tied(tmp_path):
    ours, theirs = Tied(), Tied()
    layout = write_model(ours, tmp_path / "m")
    assert [t.name for t in layout.tensors] == ["embed.weight"]
    read_model(theirs, tmp_path / "m")
    assert same(ours, theirs)
    assert theirs.head.weight is theirs.embed.weight


def test_tensors_that_share_a_part_are_refused():
    model = nn.Module()
    whole = torch.zeros(10)
    model.register_buffer("a", whole[:6])
    model.register_buffer("b", whole[6:])
    assert len(layout_of(model).tensors) == 2  # one storage, no overlap: as cuDNN keeps the weights of an LSTM
    model.register_buffer("c", whole[4:8])
    with pytest.raises(OperatorError, match="'a' and 'c' of the model share some of their memory"):
        layout_of(model)


def test_state_that_cannot_travel_is_refused():
    model = nn.Module()
    model.register_buffer("wave", torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(OperatorError, match=r"'wave' of the model is torch\.complex64"):
        layout_of(model)

    class Extra(nn.Module):
        def get_extra_state(self):
            return {"a": 1}

    with pytest.raises(OperatorError, match="'_extra_state' of the model's state is a dict"):
        layout_of(Extra())


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (nn.Linear(5, 2), r"'weight' has shape \[2, 5\], \[2, 4\] was asked for"),
        (nn.Linear(4, 2, bias=False), "1 tensors are missing, the first is 'bias'"),
        (nn.Linear(4, 2).double(), "dtype F64, F32 was asked for"),
        (nn.Sequential(nn.Linear(4, 2)), "2 tensors are missing"),
    ],
    ids=["shape", "missing", "dtype", "names"],
)
def test_another_model_is_not_loaded(other, words, tmp_path):
    write_model(other, tmp_path / "m")
    model = nn.Linear(4, 2)
    before = model.weight.clone()
    with pytest.raises(OperatorError, match=words):
        read_model(model, tmp_path / "m")
    assert torch.equal(model.weight, before)


def test_a_broken_file_is_a_bad_update_and_not_the_operators_mistake(tmp_path):
    model = nn.Linear(4, 2)
    write_model(model, tmp_path / "m")
    (tmp_path / "m").write_bytes((tmp_path / "m").read_bytes()[:-1])
    with pytest.raises(BadUpdate):
        read_model(model, tmp_path / "m")


def test_an_initial_model_is_the_seeds_and_leaves_the_generators_alone(task, tmp_path):
    before = torch.get_rng_state()
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        initial_model(task(), seed, tmp_path / name)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b != c
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("chunk", [state.CHUNK, 3])
def test_an_update_is_trained_minus_incoming_in_the_wires_types(chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(state, "CHUNK", chunk)
    model = Mixed()
    write_model(model, tmp_path / "m")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn_like(p)
        model.steps += 3
        model.seen -= 1
        model.mask[0] = False
    layout = write_update(named_tensors(model), tmp_path / "m", tmp_path / "u")
    assert layout == read_layout(tmp_path / "m").update() == read_layout(tmp_path / "u")
    assert {t.name: t.dtype for t in layout.tensors} == {
        "weight": "F32",
        "brief": "F32",
        "long": "F64",
        "empty": "F32",
        "steps": "I64",
        "seen": "I64",
    }
    update = {name: torch.tensor(array) for name, array in map_file(tmp_path / "u", layout).items()}
    after = model.state_dict()
    assert update["steps"] == 3
    assert update["seen"].tolist() == [-1, -1]
    assert torch.equal(update["long"], after["long"] - before["long"])
    assert torch.equal(update["weight"], after["weight"] - before["weight"])
    assert torch.equal(update["brief"], after["brief"].float() - before["brief"].float())
    assert (tmp_path / "u").read_bytes() != (tmp_path / "m").read_bytes()


def test_an_update_with_nan_is_not_written(tmp_path):
    model = Mixed()
    write_model(model, tmp_path / "m")
    with torch.no_grad():
        model.weight[0, 0] = float("nan")
    with pytest.raises(OperatorError, match="ended in NaN or infinity"):
        write_update(named_tensors(model), tmp_path / "m", tmp_path / "u")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_the_file_is_mapped_and_writing_to_it_changes_a_private_copy(tmp_path):
    model = nn.Linear(4, 2)
    layout = write_model(model, tmp_path / "m")
    content = (tmp_path / "m").read_bytes()
    map_tensors(tmp_path / "m", layout)["weight"].zero_()
    assert (tmp_path / "m").read_bytes() == content


MEMORY = """
import resource, sys, torch
from pathlib import Path
from murmur.clients.engine.state import named_tensors, write_model, write_update

torch.set_num_threads(1)
model = torch.nn.Linear(4096, 6144, bias=False)
write_model(model, Path(sys.argv[1], "m"))
with torch.no_grad():
    model.weight += 1
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_update(named_tensors(model), Path(sys.argv[1], "m"), Path(sys.argv[1], "u"))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / (model.weight.nbytes / 1024))
"""


def test_writing_an_update_holds_one_copy_of_the_model_at_most(tmp_path):
    # 96 MiB. The copy is the mapped file, whose pages count while they are looked at; on the heap there is a chunk.
    run = [sys.executable, "-P", "-c", MEMORY, str(tmp_path)]
    grown = float(subprocess.run(run, check=True, capture_output=True, text=True).stdout)
    print("grown by", grown, "models")
    assert grown < 1.2
