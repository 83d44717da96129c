"""Versions in other formats: a model hub's folder whose weights load back equal, and ONNX that computes the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from murmur.aggregation.local import with_controls
from murmur.clients.engine.state import initial_model, map_tensors, write_tensors
from murmur.clients.task import load_task
from murmur.hub import write_folder
from murmur.protocol.errors import OperatorError
from murmur.protocol.tensors import read_layout

from ..command import murmur
from ..web.fakes import demo

TASKS = Path(__file__).parents[1] / "clients" / "engine" / "sample_tasks.py"
ROWS = f"{TASKS}:Rows"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    initial_model(load_task(ROWS, {"norm": True}), 1, path)
    return path


def test_a_hubs_folder_loads_back_equal_and_has_a_card_and_a_config(model: Path, tmp_path: Path):
    console = demo()
    lineage = console.lineage("heart-disease", 17)
    folder = write_folder(model, lineage, console.card("heart-disease", 17), tmp_path / "hub")
    found = load_file(folder / "model.safetensors")
    given = map_tensors(model, read_layout(model))
    assert found.keys() == given.keys() and all(torch.equal(found[n], t) for n, t in given.items())
    load_task(ROWS, {"norm": True}).model().load_state_dict(found)
    config = json.loads((folder / "config.json").read_text())
    assert (config["murmur"]["sha256"], config["murmur"]["version"]) == (lineage.version.sha256, 17)
    assert (folder / "README.md").read_text().startswith("---\nlicense: unknown\n")
    with pytest.raises(OperatorError, match="not empty"):
        write_folder(model, lineage, "", folder)


def test_control_variates_stay_out_of_a_hubs_folder(model: Path, tmp_path: Path):
    layout = read_layout(model)
    wide = with_controls(layout)
    beside = {t.name: torch.ones(t.shape) for t in wide.tensors if t.name.startswith("control/")}
    write_tensors(map_tensors(model, layout) | beside, tmp_path / "scaffold", wide.buffers)
    folder = write_folder(tmp_path / "scaffold", demo().lineage("heart-disease", 17), "card", tmp_path / "hub")
    assert load_file(folder / "model.safetensors").keys() == {t.name for t in layout.tensors}


def test_what_a_frozen_base_leaves_out_needs_the_task_and_is_then_whole(tmp_path: Path):
    task = load_task(f"{TASKS}:Adapted", {})
    initial_model(task, 1, tmp_path / "model")
    lineage = demo().lineage("heart-disease", 17)
    with pytest.raises(OperatorError, match="give --task"):
        write_folder(tmp_path / "model", lineage, "card", tmp_path / "hub")
    folder = write_folder(tmp_path / "model", lineage, "card", tmp_path / "hub", task=task)
    assert load_file(folder / "model.safetensors").keys() == task.model().state_dict().keys()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--onnx", "--out", "x.onnx"), "needs --task"),
        (("--onnx", "--int8", "--out", "x", "--task", ROWS), "say how, one of"),
        (("--hf", "x", "--out", "y"), "names its folder itself"),
        (("--bf16",), "say where to"),
    ],
)
def test_an_export_says_what_it_needs(arguments: tuple[str, ...], said: str, model: Path):
    done = murmur("model", "export", model, *arguments)
    assert done.code == 2 and said in done.err


@pytest.mark.slow
def test_an_onnx_file_computes_what_the_model_does_for_batches_of_any_size(model: Path, tmp_path: Path):
    import onnxruntime

    file = tmp_path / "model.onnx"
    done = murmur("model", "export", model, "--onnx", "--out", file, "--task", ROWS, "-o", "norm=true", "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert told["bytes"] == file.stat().st_size and told["difference"] < 1e-5
    module = load_task(ROWS, {"norm": True}).model().eval()
    module.load_state_dict(load_file(model))
    session = onnxruntime.InferenceSession(str(file))
    (name,) = [i.name for i in session.get_inputs()]
    inputs = np.random.default_rng(0).standard_normal((17, 8)).astype(np.float32)
    with torch.no_grad():
        wanted = module(torch.from_numpy(inputs)).numpy()
    np.testing.assert_allclose(session.run(None, {name: inputs})[0], wanted, atol=1e-5)
    assert session.get_modelmeta().custom_metadata_map["murmur.version"] == str(model)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "model.safetensors"]


@pytest.mark.slow
def test_a_model_that_cannot_be_onnx_says_so_and_leaves_nothing(tmp_path: Path):
    (tmp_path / "task.py").write_text(
        "import torch\n"
        "class Fixed(torch.nn.Linear):\n"
        "    def forward(self, x): return super().forward(x).view(4, 3)\n"
        "class Odd:\n"
        "    def model(self): return Fixed(8, 3)\n"
        "    def data(self, split): return [(torch.ones(8), torch.tensor(0))] * 4\n"
        "    def loss(self, output, target): return output.sum()\n"
    )
    task, model, to = f"{tmp_path / 'task.py'}:Odd", tmp_path / "m.safetensors", tmp_path / "x.onnx"
    initial_model(load_task(task, {}), 1, model)
    done = murmur("model", "export", model, "--onnx", "--out", to, "--task", task)
    assert done.code == 1 and "batch" in done.err
    assert not to.exists() and not list(tmp_path.glob(".x.onnx*"))
