"""The server's step: FedAvg is addition, other optimizers are torch's own, and their moments outlive the process."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from murmur.aggregation.server import server_step, unflatten
from murmur.aggregation.strategies import fedadam, fedavg, fedavgm
from murmur.protocol.errors import BadUpdate, OperatorError
from murmur.protocol.sections import Strategy
from murmur.protocol.tensors import Layout, TensorSpec, map_file, read_layout, write_file

torch.set_num_threads(1)
BATCH_NORM = Layout(
    (
        TensorSpec("weight", "F32", (2,)),
        TensorSpec("running_mean", "F32", (2,)),
        TensorSpec("num_batches_tracked", "I64", ()),
        TensorSpec("mask", "BOOL", (2,)),
    ),
    buffers=frozenset({"running_mean", "num_batches_tracked", "mask"}),
)
VERSION = {
    "weight": np.float32([1.0, 2.0]),
    "running_mean": np.float32([0.5, -0.5]),
    "num_batches_tracked": np.int64(10),
    "mask": np.array([True, False]),
}
MEAN: dict[str, Any] = {
    "weight": np.array([0.25, -1.0]),
    "running_mean": np.array([1.0, 2.0]),
    "num_batches_tracked": np.array(7),
}


def step(
    folder: Path, arrays: dict[str, Any], mean: dict[str, Any], layout: Layout, strategy: Strategy, state: str = ""
) -> tuple[dict[str, Any], Path | None]:
    """One server step from arrays to arrays; also the path of the state that it wrote, if any."""
    write_file(folder / "version", {k: np.asarray(v) for k, v in arrays.items()}, layout)
    old = folder / state if state else None
    kept = server_step(folder / "version", layout, mean, strategy, old, folder / "new", folder / f"{state}+")
    return map_file(folder / "new", layout), folder / f"{state}+" if kept else None


def test_fedavg_adds_the_mean(tmp_path: Path) -> None:
    new, state = step(tmp_path, VERSION, MEAN, BATCH_NORM, fedavg())
    assert new["weight"].tolist() == [1.25, 1.0]
    assert state is None


def test_a_scalar_that_is_trained_moves_as_any_other_parameter(tmp_path: Path) -> None:
    layout = Layout((TensorSpec("scale", "F32", ()),))
    new, _ = step(tmp_path, {"scale": np.float32(1.5)}, {"scale": np.asarray(0.25)}, layout, fedavg())
    assert (float(new["scale"]), new["scale"].shape) == (1.75, ())


def test_fedavg_is_exactly_the_float32_sum_of_version_and_mean(tmp_path: Path) -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    rng = np.random.default_rng(seed)
    layout = Layout((TensorSpec("w", "F32", (1000,)),))
    w, mean = rng.standard_normal(1000).astype(np.float32), rng.standard_normal(1000) * 1e-3
    new, _ = step(tmp_path, {"w": w}, {"w": mean}, layout, fedavg())
    assert new["w"].tobytes() == (w + mean.astype(np.float32)).tobytes()


def test_buffers_move_by_the_mean_and_booleans_stay_whatever_the_optimizer(tmp_path: Path) -> None:
    for strategy in (fedavg(), fedavgm(0.9, 0.1), fedadam(0.01)):
        new, _ = step(tmp_path, VERSION, MEAN, BATCH_NORM, strategy)
        assert new["running_mean"].tolist() == [1.5, 1.5]
        assert int(new["num_batches_tracked"]) == 17
        assert new["mask"].tolist() == [True, False]


def test_the_version_keeps_its_layout_and_the_same_bytes_come_out_each_time(tmp_path: Path) -> None:
    step(tmp_path, VERSION, MEAN, BATCH_NORM, fedavgm())
    first = (tmp_path / "new").read_bytes(), (tmp_path / "+").read_bytes()
    step(tmp_path, VERSION, MEAN, BATCH_NORM, fedavgm())
    assert ((tmp_path / "new").read_bytes(), (tmp_path / "+").read_bytes()) == first
    assert read_layout(tmp_path / "new") == BATCH_NORM
    read_layout(tmp_path / "+")  # a canonical file as well


def test_f16_is_added_in_float32_and_rounded_once(tmp_path: Path) -> None:
    layout = Layout((TensorSpec("w", "F16", (2,)),))
    # 2049 lies between the float16 neighbours 2048 and 2050 and goes to the even one; 2051 to 2052
    new, _ = step(tmp_path, {"w": np.float16([2048, 2050])}, {"w": np.array([1.0, 1.0])}, layout, fedavg())
    assert new["w"].dtype == np.float16
    assert new["w"].tolist() == [2048.0, 2052.0]


def test_bf16_is_added_in_float32_and_rounded_to_nearest_even(tmp_path: Path) -> None:
    layout = Layout((TensorSpec("w", "BF16", (3,)),))
    old = torch.tensor([1.0, 1.0, -3.0], dtype=torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    # the bfloat16 neighbours of 1 are 1/128 apart: a quarter of that is lost, three quarters are a whole one
    new, _ = step(tmp_path, {"w": old}, {"w": np.array([1 / 512, 3 / 512, 1.0])}, layout, fedavg())
    values = torch.from_numpy(new["w"].view(np.int16).copy()).view(torch.bfloat16)
    assert values.tolist() == [1.0, 1.0078125, -2.0]


def test_f64_keeps_every_bit(tmp_path: Path) -> None:
    layout = Layout((TensorSpec("w", "F64", (1,)),))
    new, _ = step(tmp_path, {"w": np.array([1.0])}, {"w": np.array([1e-12])}, layout, fedavg())
    assert new["w"][0] == 1.0 + 1e-12


def test_small_integers_stop_at_the_end_of_their_range(tmp_path: Path) -> None:
    layout = Layout((TensorSpec("u", "U8", (3,)), TensorSpec("i", "I64", (2,))), frozenset({"u", "i"}))
    top, bottom = (1 << 63) - 1, -(1 << 63)
    mean = {"u": np.array([5, -20, 300]), "i": np.array([1, -1])}
    new, _ = step(tmp_path, {"u": np.uint8([10, 10, 10]), "i": np.array([top, bottom])}, mean, layout, fedavg())
    assert new["u"].tolist() == [15, 0, 255]
    assert new["i"].tolist() == [top, bottom]


@pytest.mark.parametrize(
    "strategy",
    [
        fedavg(),
        Strategy(server_lr=0.3),
        fedavgm(0.9, 0.5),
        fedadam(0.1),
        Strategy(server="AdamW", server_lr=0.1, server_options={"weight_decay": 0.1, "amsgrad": True}),
        Strategy(server="NAdam", server_lr=0.1),
        Strategy(server="Adagrad", server_lr=0.1, server_options={"initial_accumulator_value": 0.5}),
        Strategy(server="RMSprop", server_lr=0.1, server_options={"momentum": 0.5, "centered": True}),
        Strategy(server="Rprop", server_lr=0.1),
        Strategy(server="ASGD", server_lr=0.1),
        Strategy(server="Adafactor", server_lr=0.1),
    ],
    ids=lambda s: s.server,
)
@pytest.mark.parametrize("dtype", ["F32", "F64"])
def test_steps_in_separate_calls_equal_one_run_of_torch(tmp_path: Path, strategy: Strategy, dtype: str) -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    rng = np.random.default_rng(seed)
    kind: Any = np.float32 if dtype == "F32" else np.float64
    layout = Layout((TensorSpec("w", dtype, (3, 2)), TensorSpec("b", dtype, (2,))))
    arrays: dict[str, Any] = {"w": rng.standard_normal((3, 2)).astype(kind), "b": rng.standard_normal(2).astype(kind)}
    params = [torch.nn.Parameter(torch.from_numpy(arrays[n].copy())) for n in ("w", "b")]
    options: dict[str, Any] = dict(strategy.server_options)
    if "beta1" in options:
        options["betas"] = (options.pop("beta1"), options.pop("beta2"))
    reference = getattr(torch.optim, strategy.server)(params, lr=strategy.server_lr, **options)
    state = ""
    for _ in range(4):
        mean = {"w": rng.standard_normal((3, 2)), "b": rng.standard_normal(2)}
        for p, name in zip(params, ("w", "b"), strict=True):
            p.grad = torch.from_numpy(-mean[name].astype(kind))
        reference.step()
        new, kept = step(tmp_path, arrays, mean, layout, strategy, state)
        arrays = {name: array.copy() for name, array in new.items()}
        state = kept.name if kept else ""
    assert [arrays[n].tolist() for n in ("w", "b")] == [p.tolist() for p in params]


def test_momentum_persists_by_the_numbers(tmp_path: Path) -> None:
    layout = Layout((TensorSpec("w", "F32", (1,)),))
    one, state = step(tmp_path, {"w": [0.0]}, {"w": np.array([1.0])}, layout, fedavgm(0.5, 1.0))
    assert state is not None
    assert one["w"].tolist() == [1.0]
    two, _ = step(tmp_path, {"w": one["w"].copy()}, {"w": np.array([1.0])}, layout, fedavgm(0.5, 1.0), state.name)
    assert two["w"].tolist() == [2.5]  # 1 + (0.5 · 1 + 1)


def test_the_state_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    _, state = step(tmp_path, VERSION, MEAN, BATCH_NORM, fedavgm(0.9))
    assert state is not None
    for strategy in (fedavgm(0.8), fedadam(0.1)):
        with pytest.raises(OperatorError, match="another optimizer"):
            step(tmp_path, VERSION, MEAN, BATCH_NORM, strategy, state.name)


def test_an_unknown_optimizer_is_answered_with_its_near_name(tmp_path: Path) -> None:
    with pytest.raises(OperatorError, match="did you mean"):
        step(tmp_path, VERSION, MEAN, BATCH_NORM, Strategy(server="Adan"))
    assert not (tmp_path / "new").exists()


def test_an_optimizer_that_cannot_train_this_model_is_an_operators_error(tmp_path: Path) -> None:
    with pytest.raises(OperatorError, match="Muon"):
        step(tmp_path, VERSION, MEAN, BATCH_NORM, Strategy(server="Muon"))  # takes matrices only


def test_a_step_to_infinity_writes_nothing(tmp_path: Path) -> None:
    layout = Layout((TensorSpec("w", "F16", (1,)),))
    with pytest.raises(OperatorError, match="infinite"):
        step(tmp_path, {"w": np.float16([60000])}, {"w": np.array([60000.0])}, layout, fedavgm())
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "+").exists()


def test_a_state_without_a_place_is_not_lost_silently(tmp_path: Path) -> None:
    write_file(tmp_path / "version", VERSION, BATCH_NORM)
    with pytest.raises(ValueError, match="keeps a state"):
        server_step(tmp_path / "version", BATCH_NORM, MEAN, fedavgm(), None, tmp_path / "new", None)


def test_a_mean_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tensors"):
        step(tmp_path, VERSION, MEAN | {"weight": np.zeros(3)}, BATCH_NORM, fedavg())
    with pytest.raises(ValueError, match="tensors"):
        step(tmp_path, VERSION, {"weight": np.zeros(2)}, BATCH_NORM, fedavg())


def test_a_version_of_another_layout_is_refused(tmp_path: Path) -> None:
    other = Layout((TensorSpec("weight", "F32", (2,)),))
    write_file(tmp_path / "version", {"weight": np.float32([1, 2])}, other)
    with pytest.raises(BadUpdate, match="missing"):
        server_step(tmp_path / "version", BATCH_NORM, MEAN, fedavg(), None, tmp_path / "new", None)


def test_a_model_without_parameters_moves_its_buffers(tmp_path: Path) -> None:
    layout = Layout((TensorSpec("m", "F32", (1,)),), frozenset({"m"}))
    new, state = step(tmp_path, {"m": [1.0]}, {"m": np.array([2.0])}, layout, fedadam(0.1))
    assert (new["m"].tolist(), state) == ([3.0], None)


def test_an_empty_tensor_is_carried_along(tmp_path: Path) -> None:
    layout = Layout((TensorSpec("e", "F32", (0, 3)), TensorSpec("w", "F32", (1,))))
    mean = {"e": np.zeros((0, 3)), "w": np.array([1.0])}
    new, _ = step(tmp_path, {"e": np.zeros((0, 3)), "w": [1.0]}, mean, layout, fedadam(0.1))
    assert new["e"].shape == (0, 3)


def test_flat_vectors_unfold_in_the_order_of_the_update() -> None:
    specs = (("b", "F16", (2,)), ("a", "F32", (1,)), ("d", "F64", (1,)), ("n", "U8", (2,)), ("k", "I64", ()))
    layout = Layout((*(TensorSpec(*s) for s in specs), TensorSpec("mask", "BOOL", (1,))))
    mean = unflatten(np.array([9.0, 1.0, 2.0, 3.0]), np.array([7, 8, 6]), layout)
    assert {n: a.tolist() for n, a in mean.items()} == {"d": [9.0], "a": [1.0], "b": [2.0, 3.0], "k": 7, "n": [8, 6]}
    with pytest.raises(ValueError, match="4 floats and 3 integers"):
        unflatten(np.zeros(3), np.zeros(3, np.int64), layout)
