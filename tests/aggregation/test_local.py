"""What a version holds for local algorithms, and how the mean update is scaled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from murmur.aggregation.local import controls, first_version, rescale, with_controls, without_controls
from murmur.aggregation.server import server_step
from murmur.aggregation.strategies import fedavg, fednova, scaffold
from murmur.protocol.errors import BadUpdate
from murmur.protocol.tensors import Layout, TensorSpec, map_file, read_layout, write_file

MODEL = Layout(
    (
        TensorSpec("w", "F32", (2, 2)),
        TensorSpec("half", "BF16", (2,)),
        TensorSpec("wide", "F64", (1,)),
        TensorSpec("mean", "F32", (2,)),
        TensorSpec("seen", "I64", ()),
    ),
    frozenset({"mean", "seen"}),
)
DTYPES = {"F32": "<f4", "F64": "<f8", "BF16": "<u2", "I64": "<i8"}


def model(path: Path, layout: Layout = MODEL, value: float = 1.0) -> Path:
    write_file(path, {t.name: np.full(t.shape, value, DTYPES[t.dtype]) for t in layout.tensors}, layout)
    return path


def test_every_parameter_has_a_control_variate_that_does_not_train() -> None:
    held = controls(with_controls(MODEL))
    assert {(t.name, t.dtype, t.shape) for t in held} == {
        ("control/w", "F32", (2, 2)),
        ("control/half", "F32", (2,)),
        ("control/wide", "F64", (1,)),
    }
    assert {t.name for t in held} <= with_controls(MODEL).buffers
    assert without_controls(with_controls(MODEL)) == MODEL == without_controls(MODEL)


def test_a_parameter_that_is_called_control_is_no_control_variate() -> None:
    odd = Layout((TensorSpec("control/w", "F32", (1,)),))
    assert controls(odd) == () and without_controls(odd) == odd


def test_a_first_version_of_scaffold_begins_at_zero_whatever_it_is_made_from(tmp_path: Path) -> None:
    layout = with_controls(MODEL)
    plain, other = model(tmp_path / "plain"), model(tmp_path / "other", layout)
    for given in (plain, other):
        assert first_version(given, read_layout(given), scaffold(), tmp_path / "out")
        found = map_file(tmp_path / "out", read_layout(tmp_path / "out"))
        assert read_layout(tmp_path / "out") == layout
        assert not any(found[t.name].any() for t in controls(layout))
        assert all((found[t.name] == 1).all() for t in MODEL.tensors)


def test_a_first_version_of_others_is_the_model_alone(tmp_path: Path) -> None:
    plain, other = model(tmp_path / "plain"), model(tmp_path / "other", with_controls(MODEL))
    assert not first_version(plain, MODEL, fedavg(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert first_version(other, read_layout(other), fedavg(), tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == plain.read_bytes()


def mean_of(layout: Layout) -> dict[str, Any]:
    return {t.name: np.full(t.shape, 2, "<i8" if t.dtype == "I64" else "<f8") for t in layout.tensors}


@pytest.mark.parametrize(("population", "part"), [(0, 1.0), (12, 0.25), (2, 1.0)])
def test_control_variates_move_by_the_part_of_the_clients_that_was_there(
    population: int, part: float, tmp_path: Path
) -> None:
    layout, strategy = with_controls(MODEL), scaffold(population)
    mean = mean_of(layout)
    rescale(mean, layout, strategy, summed=3)
    assert {name: float(a.flat[0]) for name, a in mean.items() if "control" in name} == dict.fromkeys(
        ("control/w", "control/half", "control/wide"), 2 * part
    )
    assert all((mean[t.name] == 2).all() for t in MODEL.tensors)
    first_version(model(tmp_path / "m"), MODEL, strategy, tmp_path / "v0")
    faster = strategy.model_copy(update={"server_lr": 0.5})  # of the parameters only
    server_step(tmp_path / "v0", layout, mean, faster, None, tmp_path / "v1", None)
    after = map_file(tmp_path / "v1", layout)
    assert (after["control/w"] == 2 * part).all() and (after["w"] == 1 + 0.5 * 2).all() and (after["mean"] == 3).all()


def test_fednova_scales_parameters_by_the_mean_of_the_steps_and_nothing_else() -> None:
    mean = mean_of(MODEL)
    rescale(mean, MODEL, fednova(), summed=2, steps=(10 * 4 + 30 * 8, 40))  # clients of 10 and 30 examples
    assert {name: float(a.flat[0]) for name, a in mean.items()} == {
        "w": 14,
        "half": 14,
        "wide": 14,
        "mean": 2,
        "seen": 2,
    }
    for steps in ((0.0, 0.0), (0.0, 40.0), (-3.0, 40.0)):
        with pytest.raises(BadUpdate, match="effective steps together"):
            rescale(mean, MODEL, fednova(), summed=2, steps=steps)


def test_fedavg_scales_nothing() -> None:
    mean = mean_of(MODEL)
    rescale(mean, MODEL, fedavg(), summed=2, steps=(10, 1))
    assert all((a == 2).all() for a in mean.values())
