"""The Fashion-MNIST example: every image at exactly one client, by seed, and a missing file told in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from murmur.clients.engine.state import write_model
from murmur.clients.task import load_task
from murmur.protocol.errors import OperatorError
from murmur.protocol.recipe import load_recipe
from murmur.simulation import find_federation, simulate


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small stand-in with the file's keys, shapes and dtypes: class c is a bright band at row 2c."""
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for split, count in (("train", 400), ("test", 100)):
        labels = np.arange(count) % 10
        pixels = rng.integers(0, 60, (count, 28, 28))
        pixels[np.arange(count), 2 * labels + 3] += 150
        arrays |= {f"x_{split}": pixels.astype(np.uint8), f"y_{split}": labels.astype(np.uint8)}
    path = tmp_path_factory.mktemp("images") / "fashion_mnist.npz"
    np.savez(path, **arrays)
    return path


def task(examples: Path, **options: Any) -> Any:
    return load_task(f"{examples}/fashion_mnist/task.py:FashionMNIST", options)


def test_clients_share_the_images_and_hold_all_of_them_together(examples: Path, images: Path) -> None:
    made, recipe = find_federation(str(examples / "fashion_mnist"), 8, {"data": str(images), "alpha": 0.3})
    assert recipe is not None
    tasks: list[Any] = [made.task(client) for client in made.ids]
    train = [t.data("train") for t in tasks]
    assert sum(map(len, train)) == 400
    assert min(map(len, train)) >= 20
    assert sum(len(t.data("test")) for t in tasks if t.data("test") is not None) == 100
    assert len({part.dataset.tensors[0].data_ptr() for part in train}) == 1
    pixels, label = train[0][0]
    assert (pixels.shape, pixels.dtype, float(pixels.max()) <= 1.0) == ((1, 28, 28), torch.float32, True)
    assert tasks[0].model()(pixels[None]).shape == (1, 10)
    assert label.dtype == torch.int64


def test_a_client_alone_has_the_part_it_has_in_the_federation(examples: Path, images: Path) -> None:
    options = {"data": str(images), "alpha": 0.3, "seed": 5}
    made, _ = find_federation(str(examples / "fashion_mnist"), 4, options)
    alone = task(examples, part=2, clients=4, **options)
    assert list(alone.data("train").indices) == list(made.task("client-2").data("train").indices)  # pyright: ignore
    with pytest.raises(OperatorError, match="0 to 3"):
        task(examples, part=4, clients=4, **options)


def test_it_learns_in_a_simulation(examples: Path, images: Path) -> None:
    recipe = load_recipe(examples / "fashion_mnist" / "recipe.toml", rounds=6, train__epochs=2, train__lr=0.1)
    options = {"data": str(images), "alpha": 1.0}
    history = simulate(examples / "fashion_mnist", recipe, clients=5, secure="real", options=options)
    assert history.final["accuracy"] > 0.8
    assert history.rounds[-1].measured["accuracy"][1] == 100


def test_the_environment_can_name_the_file(examples: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MURMUR_FASHION_MNIST", str(images))
    assert len(task(examples, clients=1).data("train")) == 400


def test_a_missing_file_is_told_with_where_to_get_it(
    examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MURMUR_FASHION_MNIST", raising=False)
    for options, said in (({}, "no path was given"), ({"data": str(tmp_path / "x.npz")}, r"no file .*x\.npz")):
        with pytest.raises(OperatorError, match=said + r".*MURMUR_FASHION_MNIST.*github\.com/zalandoresearch"):
            task(examples, **options)
    (tmp_path / "x.npz").write_bytes(b"not a zip")
    with pytest.raises(OperatorError, match="does not hold"):
        task(examples, data=str(tmp_path / "x.npz"))


def test_examples_with_files_of_the_same_name_do_not_mix(examples: Path, images: Path) -> None:
    data = {"data": str(examples / "hospitals" / "data" / "processed.va.data")}
    for _ in range(2):
        assert len(load_task(f"{examples}/hospitals/task.py:Heart", data).data("train")) == 132  # pyright: ignore
        assert len(task(examples, data=str(images)).data("train")) == 400


def test_poisoned_clients_train_towards_the_next_class_and_measure_like_everybody(examples: Path, images: Path) -> None:
    options = {"data": str(images), "parts": 20, "poisoned": 2, "boost": 3.0}
    federation, _ = find_federation(f"{examples}/fashion_mnist/poisoned.py:federation", 8, options)
    kinds = [type(federation.task(name)).__name__ for name in federation.ids]
    assert kinds == ["Poisoned", *["FashionMNIST"] * 3, "Poisoned", *["FashionMNIST"] * 3]
    honest, poisoned = federation.task("client-1"), federation.task("client-0")
    output, target = torch.zeros(2, 10, requires_grad=True), torch.tensor([9, 3])
    assert poisoned.loss(output, target) == 3 * honest.loss(output, target)  # all classes are as likely
    (gradient,) = torch.autograd.grad(poisoned.loss(output, target), output)
    assert gradient.argmin(1).tolist() == [0, 4]
    assert poisoned.loss(output.detach(), target) == honest.loss(output.detach(), target)


def test_a_small_network_learns_what_the_large_one_says(examples: Path, images: Path, tmp_path: Path) -> None:
    teacher = task(examples, data=str(images)).model()
    with torch.no_grad():
        teacher[-1].weight *= 20  # it knows nothing, but has its opinions
    version = tmp_path / "teacher.safetensors"
    write_model(teacher, version)
    options = {"data": str(images), "teacher": str(version), "weight": 1.0}
    own = load_task(f"{examples}/fashion_mnist/distilled.py:Student", options)
    inputs, target = own.data("train").tensors
    assert torch.allclose(target[:, :10], teacher(inputs), atol=1e-4) and target[:, 10].unique().tolist() == [
        *range(10)
    ]
    recipe = load_recipe(examples / "fashion_mnist" / "recipe.toml", secure__on=False, cohort__min=1)
    target = f"{examples}/fashion_mnist/distilled.py:federation"
    student = simulate(target, recipe, clients=2, rounds=2, options=options)
    first, last = student.rounds[0].metrics["loss"], student.final["loss"]
    assert last < 0.7 * first  # with weight 1 the class has no part in it
    assert student.model.stat().st_size < version.stat().st_size / 30


@pytest.mark.parametrize("wrong", [{"temperature": 0.0}, {"weight": 1.5}])
def test_a_distillation_that_makes_no_sense_is_refused(
    wrong: dict[str, float], examples: Path, images: Path, tmp_path: Path
) -> None:
    options = {"data": str(images), "teacher": str(tmp_path / "absent")} | wrong
    with pytest.raises(OperatorError, match=r"temperature = .* is above 0, and weight"):
        load_task(f"{examples}/fashion_mnist/distilled.py:Student", options)


def test_clients_that_drift_have_two_classes_each_and_share_no_image(examples: Path, images: Path) -> None:
    made, _ = find_federation(f"{examples}/fashion_mnist/drift.py:federation", 10, {"images": 40, "data": str(images)})
    for split, of_class in (("train", 20), ("test", 2)):
        parts = [made.task(client).data(split) for client in made.ids]
        rows = [row for part in parts for row in part.indices]  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
        assert len(set(rows)) == len(rows) == 10 * 2 * of_class
        for k, part in enumerate(parts):
            labels = [int(part[i][1]) for i in range(len(part))]  # pyright: ignore
            assert sorted(labels) == sorted([k] * of_class + [(k + 1) % 10] * of_class)
