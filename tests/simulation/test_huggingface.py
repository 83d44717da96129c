"""`from_huggingface`, with stand-ins that have the methods it uses, and once with the packages themselves."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from murmur.protocol.errors import OperatorError
from murmur.protocol.recipe import Recipe, parse_recipe
from murmur.simulation import Federation, from_huggingface, simulate
from murmur.simulation.partitioning import iid

MISSING = [name for name in ("datasets", "flwr_datasets") if importlib.util.find_spec(name) is None]
COLUMNS = {
    "age": [40.0, 50.0, 60.0, 70.0, 80.0, 90.0],
    "dose": [1, 2, 3, 4, 5, 6],
    "ill": [0, 1, 0, 1, 1, 0],
    "ward": ["North 1", "South", "North 1", "South", "South", "North 1"],
}


class Rows:
    """The part of `datasets.Dataset` that is used."""

    def __init__(self, columns: dict[str, Any]) -> None:
        self._columns = columns
        self.column_names = list(columns)

    def __len__(self) -> int:
        return len(next(iter(self._columns.values())))

    def select(self, indices: Any) -> Rows:
        return Rows({name: [values[int(n)] for n in indices] for name, values in self._columns.items()})

    def select_columns(self, names: list[str]) -> Rows:
        return Rows({name: self._columns[name] for name in names})

    def with_format(self, kind: str) -> Rows:
        assert kind == "numpy"
        return self

    def __getitem__(self, part: slice) -> dict[str, Any]:
        return {name: _array(values[part]) for name, values in self._columns.items()}


class Partitioner:
    """Two partitions: of a `flwr_datasets` partitioner, what is used."""

    num_partitions = 2

    def __init__(self, ids: dict[int, str] | None = None) -> None:
        self.loaded: list[int] = []
        self.partition_id_to_natural_id = ids

    def load_partition(self, partition_id: int) -> Rows:
        self.loaded.append(partition_id)
        return Rows(COLUMNS).select(range(3 * partition_id, 3 * partition_id + 3))


class Divided:
    """A `FederatedDataset` with one such partitioner."""

    def __init__(self) -> None:
        self.partitioners = {"train": Partitioner()}

    def load_partition(self, partition_id: int, split: str | None = None) -> Rows:
        return self.partitioners[split or ""].load_partition(partition_id)


def _array(values: Any) -> np.ndarray[Any, Any]:
    try:
        return np.asarray(values)
    except ValueError:  # rows of different lengths
        return np.array(values, dtype=object)


def _model() -> nn.Module:
    return nn.Linear(2, 2)


def _given(source: Any, **changed: Any) -> Federation:
    settings: dict[str, Any] = {"features": ["age", "dose"], "label": "ill"}
    return from_huggingface(source, _model, **settings | changed)


def _recipe(lr: float) -> Recipe:
    settings = {"epochs": 1, "batch_size": 4, "lr": lr}
    return parse_recipe({"name": "wards", "task": "wards", "metrics": ["accuracy"], "train": settings})


def _held(federation: Federation, client: str, split: str = "train") -> tuple[Any, Any]:
    data: Any = federation.task(client).data(split)
    return data.tensors[0].tolist(), data.tensors[1].tolist()


WAYS: dict[str, Callable[[], Any]] = {
    "sequence": lambda: [Partitioner().load_partition(n) for n in range(2)],
    "partitioner": Partitioner,
    "federated data set": Divided,
}


@pytest.mark.parametrize("way", WAYS)
def test_every_source_gives_the_same_clients(way: str) -> None:
    federation = _given(WAYS[way]())
    assert federation.ids == ("client-0", "client-1")
    assert _held(federation, "client-0") == ([[40, 1], [50, 2], [60, 3]], [0, 1, 0])
    assert _held(federation, "client-1") == ([[70, 4], [80, 5], [90, 6]], [1, 1, 0])
    assert federation.task("client-0").data("test") is None


def test_a_column_makes_a_client_of_each_of_its_values_and_a_name_that_a_coordinator_takes() -> None:
    federation = _given(Rows(COLUMNS), by="ward")
    assert federation.ids == ("north-1", "south")
    assert _held(federation, "south") == ([[50, 2], [70, 4], [80, 5]], [1, 1, 1])


def test_our_own_partitions_divide_their_data_sets() -> None:
    federation = _given(Rows(COLUMNS), by=iid(6, 3, seed=1))
    held = [row for client in federation.ids for row in _held(federation, client)[0]]
    assert len(federation) == 3 and sorted(held) == _held(_given([Rows(COLUMNS)]), "client-0")[0]


def test_natural_ids_of_a_partitioner_become_the_clients_names() -> None:
    assert _given(Partitioner({0: "Dr. Who", 1: "7"})).ids == ("7", "dr.-who")


def test_no_partition_is_read_before_its_client_is_asked() -> None:
    partitioner = Partitioner()
    federation = _given(partitioner)
    assert partitioner.loaded == []
    federation.task("client-1").data("train")
    federation.task("client-1").data("test")
    assert partitioner.loaded == [1]


def test_a_client_keeps_a_share_for_tests_or_brings_its_own() -> None:
    federation = _given({"a": Rows(COLUMNS)}, test=0.34)  # 2.04 of 6
    train, test = (_held(federation, "a", split)[0] for split in ("train", "test"))
    assert len(test) == 2 and sorted(train + test) == _held(_given({"a": Rows(COLUMNS)}), "a")[0]
    own = {"a": {"train": Rows(COLUMNS), "test": Rows(COLUMNS).select([5])}}
    assert _held(_given(own), "a", "test") == ([[90, 6]], [0])


def test_bytes_become_images_in_0_to_1_whole_numbers_stay_and_transform_says_otherwise() -> None:
    images = np.array([[[0, 255]], [[51, 102]]], np.uint8)
    rows = Rows({"image": images, "tokens": np.array([[1, 2], [3, 4]]), "ill": np.array([0, 1])})

    def inputs(**changed: Any) -> torch.Tensor:
        data: Any = from_huggingface([rows], _model, label="ill", **changed).task("client-0").data("train")
        return data.tensors[0]

    assert inputs(features="image").tolist() == [[[0, 1]], [[pytest.approx(0.2), pytest.approx(0.4)]]]
    assert inputs(features="tokens").dtype == torch.int64
    assert inputs(features="image", transform=lambda a: a.reshape(2, 2) / 51).tolist() == [[0, 5], [1, 2]]


def test_a_simulation_learns_from_them() -> None:
    rows = {"age": [-1.0, 1.0] * 8, "dose": [0] * 16, "ill": [0, 1] * 8}
    history = simulate(_given([Rows(rows)] * 3, test=0.25), _recipe(1.0), rounds=6)
    assert history.rounds[-1].metrics["accuracy"] == 1 and history.backend == "vectorized"


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "no division": (lambda: _given(Rows(COLUMNS)), "one data set is one client: give by"),
    "divided twice": (lambda: _given(Partitioner(), by="ward"), "divided already: leave it out"),
    "a dict of splits": (lambda: _given({"train": Rows(COLUMNS), "test": Rows(COLUMNS)}), r'source\["train"\]'),
    "no such split": (lambda: _given(Divided(), split="test"), "divided in train, not in 'test'"),
    "a stream": (lambda: _given(iter(())), "a streamed one has to be read first"),
    "a share of one": (lambda: _given(Partitioner(), test=1.0), "test = 1: a share"),
    "two names alike": (lambda: _given({"A b": None, "a-b": None}), "'A b' and 'a-b' would both be the client 'a-b'"),
    "no such column": (lambda: _held(_given([Rows(COLUMNS)], label="sick"), "client-0"), "client-0: .* 'sick'"),
    "words": (lambda: _held(_given([Rows(COLUMNS)], label="ward"), "client-0"), "'ward' holds text: make numbers"),
    "rows apart": (
        lambda: _held(_given([Rows({"x": [[1], [1, 2]], "ill": [0, 1]})], features="x"), "client-0"),
        "'x' has rows of different shapes",
    ),
    "nobody's rows": (lambda: _given(Rows({"ward": ["a", None]}), by="ward"), "without a value, which belong to no"),
    "no target": (
        lambda: _held(_given([Rows({"x": [1.0, 2.0], "ill": [0.0, np.nan]})], features="x"), "client-0"),
        "'ill' has rows without a value",
    ),
    "tests twice": (lambda: _held(_given([{"train": Rows(COLUMNS), "test": Rows(COLUMNS)}], test=0.5), "client-0"),
                    "'test' already: leave test= out"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_is_refused_with_what_to_change(what: str) -> None:
    wrong, said = BAD[what]
    with pytest.raises(OperatorError, match=said):
        wrong()


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
def test_the_packages_data_sets_and_partitions_are_taken() -> None:
    import datasets  # pyright: ignore[reportMissingImports]: no dependency of ours
    from flwr_datasets.partitioner import (  # pyright: ignore[reportMissingImports]: as above
        DirichletPartitioner,
        IidPartitioner,
        NaturalIdPartitioner,
    )

    whole = datasets.Dataset.from_dict(COLUMNS)
    wards = _given(whole, by="ward")
    assert wards.ids == ("north-1", "south") and _held(wards, "south") == _held(
        _given(Rows(COLUMNS), by="ward"), "south"
    )
    own = _given({"a": whole.train_test_split(test_size=2, seed=1)})
    assert len(_held(own, "a")[0]) == 4 and len(_held(own, "a", "test")[0]) == 2

    natural, even = NaturalIdPartitioner(partition_by="ward"), IidPartitioner(num_partitions=2)
    mixed = DirichletPartitioner(num_partitions=2, partition_by="ill", alpha=10.0, min_partition_size=1, seed=1)
    for partitioner in (natural, even, mixed):
        partitioner.dataset = whole
        federation = _given(partitioner)
        held = [row for client in federation.ids for row in _held(federation, client)[0]]
        assert sorted(held) == _held(_given([whole]), "client-0")[0]
    assert _given(natural).ids == ("north-1", "south")
    image = datasets.Dataset.from_dict({"x": np.full((4, 2, 2), 255, np.uint8), "ill": [0, 1, 0, 1]})
    image = image.cast_column("x", datasets.Array2D((2, 2), "uint8"))
    scaled = from_huggingface([image], _model, features="x", label="ill", transform=lambda a: a / 255)
    data: Any = scaled.task("client-0").data("train")
    assert data.tensors[0].unique().tolist() == [1.0] and data.tensors[0].shape == (4, 2, 2)
    history = simulate(_given(even), _recipe(1e-4), rounds=2)
    assert len(history.rounds) == 2
