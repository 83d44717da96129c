"""What `murmur client check` says of tasks that are broken in one way each; the fault is found, and no value shown."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from murmur.clients import check as checking
from murmur.clients.check import Report, Site, inspect, train, world
from murmur.clients.engine.footprint import footprint
from murmur.clients.engine.inspection import Inspection
from murmur.clients.engine.ranks import Ranks
from murmur.clients.engine.session import Session
from murmur.clients.engine.state import initial_model
from murmur.clients.finding import Finding
from murmur.clients.job import Job
from murmur.clients.settings import TaskEntry, parse_settings
from murmur.clients.task import load_task
from murmur.protocol.recipe import Recipe, parse_recipe

from .broken_tasks import NAME, SECRET

TASKS = Path(__file__).with_name("broken_tasks.py")
WARD = f"{TASKS}:Ward"


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def recipe(**tables: Any) -> Recipe:
    return parse_recipe({"name": "ward", "task": "ward", "train": {"batch_size": 8}} | tables)


def inspected(folder: Path, fault: str = "", *, contract: Any = None, show: bool = False, **tables: Any) -> Inspection:
    """The task looked at in this process."""
    options = {"fault": fault} | ({"contract": contract} if contract is not None else {})
    asked = {"reference": WARD, "options": options, "recipe": recipe(**tables).model_dump(mode="json"),
             "model": str(folder / "model"), "limit": 1000, "show": show, "world": 1}  # fmt: skip
    found = Inspection(asked)
    found.run()
    text = json.dumps([f.to_json() for f in found.findings])
    assert show or (NAME not in text and str(SECRET) not in text), text
    return found


def bad(found: Inspection, level: str = "red") -> list[tuple[str, str]]:
    assert all(bool(f.todo) == (f.level != "green") for f in found.findings)
    return [(f.subject, f.said) for f in found.findings if f.level == level]


def line_of(text: str) -> int:
    return next(n for n, line in enumerate(TASKS.read_text().splitlines(), 1) if text in line)


def test_a_task_that_is_right_is_green_throughout(tmp_path: Path):
    found = inspected(tmp_path)
    assert {f.level for f in found.findings} == {"green"}
    assert [f.subject for f in found.findings] == ["task", "model", "data train", "data test", "loss", "metrics"]
    said = {f.subject: f.said for f in found.findings}
    assert said["data train"] == "40 examples; input float32[3], target int64[]; labels 0, 1"
    assert said["model"].startswith("26 parameters;")  # 3 * 4 + 4 + 4 * 2 + 2
    assert (found.facts["train_examples"], found.facts["test_examples"]) == (40, 40)


@pytest.mark.parametrize(
    ("fault", "subject", "said"),
    [
        ("made", "task", f"RuntimeError: (its words may quote data: --show-values shows them) at broken_tasks.py, line "
         f"{line_of('# in __init__')}, in __init__: `raise RuntimeError(NAME)  # in __init__`"),
        ("model", "model", f"line {line_of('return net[7]')}, in model: `return net[7]`"),
        ("frozen", "model", "nothing of the task's model would travel: all of it is frozen, or stays at the site"),
        ("data", "data train", f"ValueError: (its words may quote data: --show-values shows them) at broken_tasks.py, "
         f"line {line_of('could not convert')}, in data:"),
        ("empty", "data train", "there is no example"),
        ("triples", "data train", "example 0 is a tuple of 3 where a pair (input, target) belongs"),
        ("not a number", "data train", "NaN or infinity in the input of 2 examples (number 5, 9)"),
        ("listed not a number", "data train", "NaN or infinity in the input of 1 example (number 5)"),
        ("ragged", "data train", "examples differ in shape"),
        ("label", "loss", "it cannot take 2 examples (number 11, 30): IndexError: Target 2 is out of bounds at"),
        ("raises", "loss", f"KeyError: (its words may quote data: --show-values shows them) at broken_tasks.py, line "
         f"{line_of('raise KeyError(NAME)')}, in loss: `raise KeyError(NAME)`"),
        ("log", "loss", "it is not finite for"),
        ("mean", "loss", "the task's loss looks like a mean"),
        ("vector", "loss", "must be the sum over the batch, a scalar"),
        ("no pairs", "metrics", "it gave a dict that is no dict of pairs"),
    ],
)  # fmt: skip
def test_each_fault_of_a_task_is_one_red_line_that_names_it(tmp_path: Path, fault: str, subject: str, said: str):
    found = bad(inspected(tmp_path, fault))
    assert any(at == subject and said in text for at, text in found), found


@pytest.mark.parametrize(
    ("fault", "subject", "said"),
    [
        ("no test", "data test", "this site reports no metrics"),
        ("mean metric", "metrics", "accuracy does not add up over two halves of a batch"),
        ("other metric", "metrics", "the recipe asks for accuracy as well"),
        ("new label", "data test", "1 of its labels do not occur in the training data"),
    ],
)
def test_what_may_be_meant_so_is_yellow(tmp_path: Path, fault: str, subject: str, said: str):
    found = inspected(tmp_path, fault)
    assert (subject, said) in [(at, text[-len(said) :]) for at, text in bad(found, "yellow")], found.findings


def test_words_that_may_quote_data_are_shown_on_demand_only(tmp_path: Path):
    (_, said), *_ = bad(inspected(tmp_path, "data", show=True))
    assert f"could not convert {NAME}" in said
    hidden = {f.subject: f.said for f in inspected(tmp_path, "words").findings}
    assert hidden["data train"].endswith("; 2 labels in words (--show-values shows them)")
    shown = {f.subject: f.said for f in inspected(tmp_path, "words", show=True).findings}
    assert shown["data train"].endswith("; labels Jane Doe, John Roe")


def test_whole_numbers_that_may_be_what_a_person_has_are_counted_and_not_shown(tmp_path: Path):
    said = {f.subject: f.said for f in inspected(tmp_path, "ages").findings}
    assert said["data train"] == "40 examples; input float32[3], target int64[]; 40 different whole numbers"


@pytest.mark.parametrize(
    ("contract", "fault", "said"),
    [
        ({"input_shape": [4]}, "", "train: input: shape [3], the contract says [4]: 40 examples"),
        ({"input_dtype": "float64"}, "", "train: input: float32, the contract says float64: 40 examples"),
        ({"target_dtype": "float32"}, "", "train: target: int64, the contract says float32"),
        ({"labels": [0, 1]}, "label", "train: target: not one of the contract's labels: 2 examples (number 11, 30)"),
        ({"labels": [NAME]}, "words", "train: target: not one of the contract's labels"),
        ({"columns": ["age", "bp"]}, "", "train: input: not the contract's 2 columns"),
        ({"columns": ["age", "bp", "sex"]}, "columns", "train: the data's columns are in another order"),
        ({"columns": ["age", "bp", "sex"], "ranges": {"bp": [None, 300]}}, "",
         "train: bp: outside [None, 300]: 1 example (number 3)"),
        ({"ranges": {"input": [-10, 10]}}, "", "train: input: outside [-10, 10]: 1 example (number 3)"),
        ({"ranges": {"weight": [0, 1]}}, "", "the contract has a range for 'weight'"),
        ({"shape": [3]}, "", "the task's contract has 'shape'; a contract has columns"),
    ],
)  # fmt: skip
def test_data_that_break_the_contract_are_named_by_number(tmp_path: Path, contract: Any, fault: str, said: str):
    found = bad(inspected(tmp_path, fault, contract=contract))
    assert any(at == "contract" and said in text for at, text in found), found


def test_data_that_keep_the_contract_are_green(tmp_path: Path):
    contract = {"columns": ["age", "bp", "sex"], "input_shape": [3], "input_dtype": "float32", "target_shape": [],
                "labels": [0, 1], "ranges": {"age": [-5, 5], "target": [0, 1]}}  # fmt: skip
    found = inspected(tmp_path, contract=contract)
    said = [f for f in found.findings if f.subject == "contract"]
    assert [f.level for f in said] == ["green", "green"]


def test_a_task_that_kills_its_process_leaves_the_lines_before_it(tmp_path: Path):
    report = Report()
    inspect(Site(entry=TaskEntry(reference=WARD, options={"fault": "killed"}), recipe=recipe()), report, tmp_path)
    assert [(f.subject, f.level) for f in report.findings] == [("task", "green"), ("task", "red")]
    assert "ended by signal 9" in report.findings[-1].said


def trained(folder: Path, fault: str = "", **tables: Any) -> Report:
    site, report = Site(entry=TaskEntry(reference=WARD, options={"fault": fault}), recipe=recipe(**tables)), Report()
    report.facts |= {"train_examples": 40, "test_examples": 40}
    initial_model(load_task(WARD, {}), 0, folder / "model.safetensors")
    train(site, report, folder)
    return report


def test_a_few_steps_are_trained_in_the_real_processes(tmp_path: Path):
    report = trained(tmp_path, train={"batch_size": 8, "optimizer": "Adam", "lr": 0.01})
    assert [f.level for f in report.findings] == ["green"]
    assert report.findings[0].said.startswith("3 steps in 1 process, ")
    assert report.facts["examples_per_s"] > 0 and report.facts["peak_rss_bytes"][0] > 50 << 20


def test_what_goes_wrong_only_in_training_names_the_line_and_not_the_value(tmp_path: Path):
    (found,) = trained(tmp_path, "in training").findings
    line = line_of("torch.is_grad_enabled():") + 1
    assert (found.subject, found.level) == ("training", "red") and NAME not in found.said
    assert f"KeyError at broken_tasks.py, line {line}, in loss: `raise KeyError(NAME)`" in found.said


def test_a_plan_that_the_site_cannot_have_is_red(tmp_path: Path):
    report = Report()
    assert not world(Site(entry=TaskEntry(reference=WARD), recipe=recipe(parallel={"data": 64})), report)
    assert report.findings[0].level == "red" and "parallel.data = 64 needs" in report.findings[0].said


@pytest.mark.parametrize(
    ("policy", "tables", "said"),
    [
        ({}, {"secure": {"on": False}}, "secure rounds only"),
        ({"min_clients": 5}, {"cohort": {"min": 4}}, "sums 4 clients, this site asks for 5"),
        ({"require_dp": True}, {}, "local differential privacy only"),
    ],
)
def test_a_recipe_that_the_policy_refuses_is_red(tmp_path: Path, policy: Any, tables: Any, said: str):
    values = {"name": "a", "coordinator": "https://x:1", "policy": policy}
    site = Site(entry=TaskEntry(reference=WARD), recipe=recipe(**tables), settings=parse_settings(values, tmp_path))
    report = Report()
    checking.terms(site, report)
    assert [f.level for f in report.findings] == ["red"] and said in report.findings[0].said
    right = Report()
    checking.terms(Site(entry=site.entry, recipe=recipe(), settings=parse_settings(values | {"policy": {}}, tmp_path)),
                   right)  # fmt: skip
    assert right.ok


@pytest.mark.parametrize(("free", "level"), [(1000, "red"), (20_000, "yellow"), (10**9, "green")])
def test_room_on_the_disk_is_reckoned_from_the_model(monkeypatch: pytest.MonkeyPatch, free: int, level: str):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": free}))
    report = Report()
    report.facts |= {"model_bytes": 1000, "update_bytes": 1000, "memory": {"optimizer": 2000}}
    checking.disk(Site(entry=TaskEntry(reference=WARD), recipe=recipe()), report)
    # 4 models, 2 updates, 2 checkpoints of model and optimizer: 4 + 2 + 2 * 3 thousand
    assert report.facts["disk_needed_bytes"] == 12_000
    assert [f.level for f in report.findings] == [level]


def test_a_round_is_predicted_from_what_was_measured():
    report = Report()
    report.facts |= {"examples_per_s": 10.0, "evaluated_per_s": 20.0, "train_examples": 100, "test_examples": 40,
                     "down_bytes_per_s": 100.0, "up_bytes_per_s": 50.0, "model_bytes": 300,
                     "update_bytes": 200}  # fmt: skip
    site = Site(entry=TaskEntry(reference=WARD), recipe=recipe(train={"epochs": 2}))
    checking.predict(site, report)
    assert report.facts["round_s"] == 20 + 2 + 3 + 4


def test_memory_is_counted_and_activations_measured(tmp_path: Path):
    task, made = load_task(WARD, {}), recipe(train={"optimizer": "Adam", "batch_size": 8})
    initial_model(task, 0, tmp_path / "model")
    session = Session(Ranks.alone("cpu"))
    job = {"id": "j", "kind": "train", "model": tmp_path / "model", "update": tmp_path / "u", "mu": 0.0, "metrics": (),
           "seed": 0, "round": 1, "client": "a", "train": made.train}  # fmt: skip
    session.load(task, Job(**job))
    batch = (torch.randn(8, 3), torch.zeros(8, dtype=torch.int64))
    found = footprint(session, made, batch)
    assert (found["precision"], found["device"]) == ("fp32", "cpu")
    assert found["parameters"] == found["gradients"] == 26 * 4
    assert found["optimizer"] == 2 * 26 * 4 + 4 * 4  # two moments, and a step counter for each of 4 tensors
    # Kept for the gradient: the input 8 x 3, ReLU's output 8 x 4, the log-probabilities 8 x 2 and a weight of the loss
    # in float32, the targets 8 in int64.
    assert found["activations"] - 4 * (8 * 3 + 8 * 4 + 8 * 2) - 8 * 8 in (0, 4)


def test_findings_travel_as_json():
    finding = Finding("disk", "yellow", "little", "make room")
    assert Finding.from_json(json.loads(json.dumps(finding.to_json()))) == finding
