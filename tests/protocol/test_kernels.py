"""That the kind of processor is known to MKL before a second thread can ask for it."""

import os
import subprocess
import sys

import pytest

# MKL reads this variable where it has not looked at the processor yet. 9 is what a processor with AVX-512 has between
# the two writes of its kind: on such a machine exp is then wrong by 1.5e-4.
HALFWAY = {"MKL_VML_DEBUG_CPU_TYPE": "9"}
ERROR = """
import os, torch, {module}
os.environ.update({halfway})
x = torch.linspace(-5, 2, 10_000)
print(float(((x.exp() - x.double().exp()) / x.double().exp()).abs().max()))
"""


@pytest.mark.parametrize("module", ["murmur.clients.engine", "murmur.aggregation.optimizers"])
def test_what_computes_by_torch_knows_the_processor_before_its_first_step(module: str) -> None:
    code = ERROR.format(module=module, halfway=HALFWAY)
    assert "MKL_VML_DEBUG_CPU_TYPE" not in os.environ
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 2e-7
