"""bfloat16 on the wire: the rounding is the one that torch does, and a narrow update is summed as what it says."""

from pathlib import Path

import numpy as np
import pytest
import torch

from murmur.aggregation.weighted_sum import Contribution, check_finite, weighted_mean
from murmur.protocol.errors import BadUpdate, OperatorError
from murmur.protocol.recipe import parse_recipe
from murmur.protocol.tensors import Layout, TensorSpec, map_file, write_file
from murmur.protocol.wire import from_bf16, narrow, to_bf16

MODEL = Layout((TensorSpec("d", "F64", (2,)), TensorSpec("i", "I64", (2,)), TensorSpec("w", "F32", (3, 5))))
EDGES = [0.0, -0.0, 1.0, 1.00390625, 1.01171875, 3.4e38, -3.4e38, 1e-40, np.inf, -np.inf]
# 1 + 1/256 lies half way between two bfloat16 and goes to the even one, 1; 1 + 3/256 goes up to 1 + 4/256


def test_rounding_is_to_nearest_ties_to_even():
    assert from_bf16(to_bf16(np.float32([1 + 1 / 256, 1 + 3 / 256, 0.1]))).tolist() == [1.0, 1.015625, 0.10009765625]


def test_every_rounding_is_that_of_torch():
    draw = np.random.default_rng(7)
    values = np.concatenate([draw.integers(0, 1 << 32, 100_000, np.uint32).view("<f4"), np.float32(EDGES)])
    finite = values[~np.isnan(values)]
    expected = torch.from_numpy(finite).to(torch.bfloat16).to(torch.float32).numpy()
    assert np.array_equal(from_bf16(to_bf16(finite)).view("<u4"), expected.view("<u4"))
    assert np.isnan(from_bf16(to_bf16(np.uint32([0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF]).view("<f4")))).all()


def update(path: Path, value: float) -> Path:
    arrays = {"d": np.full(2, value), "i": np.full(2, 3), "w": np.full((3, 5), value, np.float32)}
    write_file(path, arrays, MODEL.update())
    return path


def test_a_narrow_update_is_half_as_large_and_keeps_what_is_not_float32(tmp_path: Path):
    narrow(update(tmp_path / "u", 0.1), MODEL, tmp_path / "n")
    wire = MODEL.update("bf16")
    assert (tmp_path / "n").stat().st_size == wire.file_bytes
    assert MODEL.update().nbytes - wire.nbytes == 15 * 2
    found = map_file(tmp_path / "n", wire)
    assert found["d"].tolist() == [0.1, 0.1] and found["i"].tolist() == [3, 3]
    assert from_bf16(found["w"])[0, 0] == np.float32(0.10009765625)


def test_the_mean_of_narrow_updates_is_that_of_the_values_they_carry(tmp_path: Path):
    given = []
    for name, value, weight in (("a", 0.1, 1.0), ("b", 0.3, 3.0)):
        narrow(update(tmp_path / "u", value), MODEL, tmp_path / name)
        given.append(Contribution(client=name, path=tmp_path / name, weight=weight))
    mean = weighted_mean(given, MODEL.update("bf16"), chunk=4)
    assert np.all(mean["w"] == (0.10009765625 + 3 * 0.30078125) / 4)
    assert np.all(mean["d"] == (0.1 + 3.0 * 0.3) / 4)


def test_a_narrow_update_that_is_not_finite_is_refused(tmp_path: Path):
    narrow(update(tmp_path / "u", np.nan), MODEL, tmp_path / "n")
    with pytest.raises(BadUpdate, match="NaN"):
        check_finite(tmp_path / "n", MODEL.update("bf16"))


def test_a_masked_run_refuses_it():
    with pytest.raises(OperatorError, match="plain runs"):
        parse_recipe({"name": "r", "task": "t", "train": {"wire": "bf16"}})


def test_agents_of_the_earlier_release_hear_of_it_only_where_it_is_on():
    plain = {"name": "r", "task": "t", "secure": {"on": False}}
    assert "wire" not in parse_recipe(plain).model_dump(mode="json")["train"]
    narrow_run = parse_recipe(plain | {"train": {"wire": "bf16"}})
    assert narrow_run.model_dump(mode="json")["train"]["wire"] == "bf16"
    assert parse_recipe(narrow_run.model_dump(mode="json")) == narrow_run
