"""FedYogi of Flower's end to end: a coordinator and three agents, masked, end in the simulator's model."""

from pathlib import Path

import numpy as np
import pytest

from .test_scaffold import both

RECIPE = """
name = "t"
task = "t"
rounds = 3
cohort = {size = 3, min = 3}
strategy = {flower = "fedyogi", flower_options = {eta = 0.1}, max_weight = 8}
train = {epochs = 2, batch_size = 3, lr = 0.1}
"""


@pytest.mark.slow
def test_fedyogi_moves_a_coordinator_as_it_moves_the_simulator(tmp_path: Path):
    pulled, simulated = both(tmp_path, RECIPE)
    assert pulled.keys() == simulated.keys() == {"0.weight"}
    np.testing.assert_allclose(pulled["0.weight"], simulated["0.weight"], atol=1e-6, rtol=0)
