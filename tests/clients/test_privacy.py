"""What a client does of differential privacy: clips before anything leaves, and refuses what it could not protect."""

import numpy as np
import pytest

from murmur.clients import conversation as conversation_module
from murmur.protocol.sections import Dp
from murmur.protocol.tensors import Layout, TensorSpec, check_file, map_file

from . import coordinator_double
from .conftest import NAMES, update_of
from .coordinator_double import CoordinatorDouble

PARAMETERS = Layout(
    (TensorSpec("w", "F32", (50, 40)), TensorSpec("exact", "F64", (7,)), TensorSpec("half", "F16", (3,)))
)
CENTRAL = Dp(mode="central", clip_norm=0.5)


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(conversation_module, "PACE_S", 0.02)


def flat(arrays) -> np.ndarray:
    return np.concatenate([a.reshape(-1).astype(np.float64) for a in arrays.values()])


@pytest.mark.parametrize(("clip_norm", "kept"), [(0.5, False), (100.0, True)])
def test_a_plain_update_is_clipped_as_one_vector_before_it_leaves(
    party, tmp_path, identities, monkeypatch, clip_norm, kept
):
    monkeypatch.setattr(coordinator_double, "MODEL", PARAMETERS)
    dp = CENTRAL.model_copy(update={"clip_norm": clip_norm})
    coordinator = CoordinatorDouble(tmp_path / "coordinator", identities, masked=False, weighting="uniform", dp=dp)
    party.policies = {name: {"require_secure": False} for name in NAMES}
    party.talk(coordinator, "alpha")
    path = party.folder / "received"
    path.write_bytes(coordinator.parts["alpha"].received)
    check_file(path, PARAMETERS.update())
    sent = flat(map_file(path, PARAMETERS.update()))
    trained = flat(update_of("alpha", coordinator.model_file))  # 2,010 values of deviation 0.1: a norm of 4.5
    if kept:
        assert np.array_equal(sent, trained)
    else:
        assert np.linalg.norm(sent) == pytest.approx(clip_norm, rel=1e-5) and np.linalg.norm(sent) <= clip_norm
        assert sent / np.linalg.norm(sent) == pytest.approx(trained / np.linalg.norm(trained), abs=1e-7)


@pytest.mark.parametrize("masked", [False, True])
def test_a_model_that_it_could_not_protect_is_refused_and_nothing_leaves(party, tmp_path, identities, masked):
    changes = {"weighting": "uniform", "max_weight": 1}
    dp = CENTRAL.model_copy(update={"mode": "distributed" if masked else "central"})
    coordinator = CoordinatorDouble(tmp_path / "coordinator", identities, masked=masked, dp=dp, **changes)
    party.policies = {name: {"require_secure": False} for name in NAMES}
    party.talk(coordinator)
    for name in NAMES:
        found = coordinator.parts[name].failure
        assert found is not None and "'norm.batches' is none" in found.detail
        assert not coordinator.parts[name].received
