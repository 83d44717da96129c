"""McMahan et al. 2017: their networks by number of parameters, their shards, and how rounds are counted."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from murmur.protocol.errors import OperatorError


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A stand-in with the file's keys: class c is a band at row 2c, brighter than the noise."""
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for split, count in (("train", 2000), ("test", 500)):
        labels = rng.integers(0, 10, count)
        pixels = rng.integers(0, 150, (count, 28, 28))
        pixels[np.arange(count), 2 * labels + 3] += 100
        arrays |= {f"x_{split}": pixels.astype(np.uint8), f"y_{split}": labels.astype(np.uint8)}
    path = tmp_path_factory.mktemp("images") / "mnist.npz"
    np.savez(path, **arrays)
    return str(path)


@pytest.fixture
def rounds_to(
    module: Callable[[str], ModuleType], examples: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(examples / "mcmahan"))
    monkeypatch.delitem(sys.modules, "task", raising=False)
    yield module("mcmahan/rounds_to.py")
    sys.modules.pop("task", None)


def test_the_networks_have_as_many_parameters_as_the_papers(rounds_to: Any, images: str) -> None:
    for network, count in (("2nn", 199_210), ("cnn", 1_663_370)):  # section 3 of the paper
        model = rounds_to.everybody(images, network).model()
        assert sum(p.numel() for p in model.parameters()) == count


def test_shards_give_a_client_few_classes_and_no_image_twice(rounds_to: Any, images: str) -> None:
    clients = rounds_to.federation(20, images, split="shards")
    held = [[int(y) for _, y in c.data("train")] for c in clients]
    assert [len(rows) for rows in held] == [100] * 20
    assert max(len(set(rows)) for rows in held) <= 4  # two pieces, each over a border at most
    assert len({row for c in clients for row in c.data("train").indices}) == 2000
    assert sum(len(c.data("test")) for c in clients) == 500
    with pytest.raises(OperatorError, match="iid or shards"):
        rounds_to.federation(20, images, split="other")


def test_a_missing_file_is_told_with_where_to_get_it(rounds_to: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MURMUR_IMAGES", raising=False)
    with pytest.raises(OperatorError, match="no path was given"):
        rounds_to.find_images("")
    with pytest.raises(OperatorError, match=r"no file nowhere\.npz"):
        rounds_to.find_images("nowhere.npz")


@pytest.mark.slow
def test_more_steps_between_two_rounds_need_fewer_rounds(rounds_to: Any, images: str) -> None:
    """Table 2 of the paper: B = 10 needs fewer rounds than B = ∞, and shards need more than an even division."""

    def rounds(batch: int, split: str) -> float:
        recipe = rounds_to.load_recipe(
            rounds_to.RECIPE, rounds=40, cohort__size=5, train={"epochs": 1, "batch_size": batch, "lr": 0.1}
        )
        clients, whole = rounds_to.federation(20, images, split=split), rounds_to.everybody(images)
        found = rounds_to.accuracies(clients, whole, recipe, target=0.8, every=2)
        return rounds_to.rounds_to(found, 0.8) or math.inf

    quick = rounds(10, "iid")
    assert quick < 20
    assert quick < rounds(10, "shards")
    assert quick < rounds(100, "iid")
