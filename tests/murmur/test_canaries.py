"""`murmur audit privacy`, as somebody would type it."""

import json
import warnings
from pathlib import Path

import pytest

from murmur.protocol.errors import OperatorError

from ..command import Done, murmur

TASK = """
import torch

class Wide:
    def __init__(self, number):
        generator = torch.Generator().manual_seed(number)
        self.x = torch.randn(60, 400, generator=generator)
        self.y = (self.x[:, 0] > 0).long()
    def model(self): return torch.nn.Linear(400, 2)
    def data(self, split): return torch.utils.data.TensorDataset(self.x, self.y)
    def loss(self, output, target): return torch.nn.functional.cross_entropy(output, target, reduction="sum")

def federation(clients=3): return [Wide(k) for k in range(clients)]
"""
MEMORIZING = ("--set", "train.lr=0.5", "--set", "train.epochs=5", "--set", "train.batch_size=10", "--rounds", "4")


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("task") / "task.py"
    path.write_text(TASK)
    return f"{path}:federation"


def audit_privacy(*arguments: str) -> Done:
    return murmur("audit", "privacy", *arguments)


@pytest.mark.parametrize(("accounted", "code"), [(0.5, 1), pytest.param(50.0, 0, marks=pytest.mark.slow)])
def test_the_exit_code_says_whether_the_accounted_epsilon_holds(target: str, tmp_path: Path, accounted, code):
    claim = tmp_path / "claim.json"
    claim.write_text(json.dumps({"epsilon": accounted, "delta": 1e-6}))
    got, out, err = audit_privacy(target, "--canaries", "120", "--accounted", str(claim), "--json", *MEMORIZING)
    assert got == code, err
    found = json.loads(out)
    assert (found["epsilon_accounted"], found["holds"]) == (accounted, code == 0)
    assert found["delta"] == 1e-6 and found["unit"].startswith("one example")
    assert 1 < found["epsilon_at_least"] < 50 and found["confidence"] == 0.95 and len(found["assumptions"]) == 3


def test_unit_delta_confidence_and_what_it_rests_on_are_printed(target: str):
    code, out, err = audit_privacy(target, "--unit", "client", "--canaries", "16", "--rounds", "1")
    assert code == 0, err
    for said in ("none given", "1e-05", "0.95", "one client's whole participation", "in the run by fair coins"):
        assert said in out
    assert "none holds" in out and "arXiv:2305.08846" in out


def test_wrong_use_is_told(target: str):
    code, _, err = audit_privacy(target, "--unit", "patient")
    assert code == 2 and "example or client" in err


def test_an_accounted_epsilon_is_a_number_or_a_file(tmp_path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of click's own names, when typer is imported
        from murmur.canaries import read_claim
    (tmp_path / "good.json").write_text('{"epsilon": 3.2, "delta": 1e-5, "unit": "x"}')
    assert read_claim("3.2") == (3.2, None)
    assert read_claim(str(tmp_path / "good.json")) == (3.2, 1e-5)
    (tmp_path / "bad.json").write_text('{"epsilon": 3.2}')
    for wrong in (str(tmp_path / "bad.json"), str(tmp_path / "none.json"), "three"):
        with pytest.raises(OperatorError, match="neither a number nor a JSON file"):
            read_claim(wrong)
    for wrong in ("nan", "-1", "inf"):
        with pytest.raises(OperatorError, match="a finite number"):
            read_claim(wrong)
