"""Versions that a simulation kept, measured on one task's data: by hand for a model of one number."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from murmur.protocol.errors import OperatorError
from murmur.simulation import simulate
from murmur.simulation.measuring import measure, measure_version, rounds_to


class Slope:
    """y = w x; the loss is the sum of absolute errors, a hit is an error below 1."""

    def model(self) -> nn.Module:
        return nn.Linear(1, 1, bias=False)

    def data(self, split: str) -> TensorDataset | None:
        x = {"train": [1.0, 3.0], "test": [1.0, 2.0, 3.0, 4.0]}.get(split)
        return None if x is None else TensorDataset(torch.tensor(x)[:, None], 2 * torch.tensor(x)[:, None])

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return (output - target).abs().sum()

    def metrics(self, output: Tensor, target: Tensor) -> dict[str, tuple[Tensor, int]]:
        return {"hits": (((output - target).abs() < 1).sum(), len(target))}


def version(folder: Path, n: int, slope: float) -> Path:
    save_file({"weight": torch.tensor([[slope]])}, path := folder / f"version-{n}.safetensors")
    return path


def test_versions_are_measured_on_all_of_a_split_in_their_order(tmp_path: Path) -> None:
    version(tmp_path, 10, 2.0)
    version(tmp_path, 9, 1.5)  # errors of 0.5, 1, 1.5 and 2
    found = measure(Slope(), tmp_path, metrics=("loss", "hits"))
    assert list(found) == [9, 10]
    assert found == {9: {"loss": 1.25, "hits": 0.25}, 10: {"loss": 0.0, "hits": 1.0}}
    assert measure_version(Slope(), version(tmp_path, 11, 0.0), split="train", metrics=("loss",)) == {"loss": 4.0}


def test_every_version_of_a_simulation_is_found_in_its_folder(tmp_path: Path) -> None:
    simulate([Slope()] * 3, rounds=2, seed=1, folder=tmp_path)
    assert list(measure(Slope(), tmp_path)) == [0, 1, 2]
    assert list(measure(Slope(), tmp_path, every=2)) == [0, 2]
    assert list(measure(Slope(), tmp_path, every=5)) == [0, 2]


def test_rounds_are_read_from_the_best_so_far_on_a_straight_line() -> None:
    assert rounds_to({0: 0.1, 2: 0.5, 4: 0.9}, 0.7) == pytest.approx(3)
    assert rounds_to({0: 0.1, 1: 0.5, 2: 0.4, 3: 0.8}, 0.6) == pytest.approx(2 + 1 / 3)
    assert rounds_to({0: 0.1, 1: 0.5, 2: 0.4, 3: 0.8}, 0.5) == 1
    assert rounds_to({0: 0.1, 1: 0.5}, 0.6) is None
    assert rounds_to({0: 0.7}, 0.6) == 0


def test_nothing_to_measure_is_told(tmp_path: Path) -> None:
    with pytest.raises(OperatorError, match="holds no versions: name it as the folder of a simulation"):
        measure(Slope(), tmp_path)
    with pytest.raises(OperatorError, match="no data 'third'"):
        measure_version(Slope(), version(tmp_path, 0, 1.0), split="third")
