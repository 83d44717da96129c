from __future__ import annotations

import sys
from importlib.metadata import EntryPoint

import pytest

from murmur.clients import task as tasks
from murmur.clients.task import load_task
from murmur.protocol.errors import OperatorError

GOOD = """
from helpers import NAME

class Task:
    def __init__(self, path="here", *, rate=0.5):
        if path == "nowhere":
            raise FileNotFoundError("no such folder: nowhere")
        self.path, self.rate, self.name = path, rate, NAME
    def model(self): ...
    def data(self, split): ...
    def loss(self, output, target): ...

class Half:
    def model(self): ...

def make(**options):
    return Task(**options)

NUMBER = 3

class Outer:
    Inner = Task
"""


@pytest.fixture
def folder(tmp_path):
    def make(name="site", code=GOOD, helper="NAME = 'first'"):
        place = tmp_path / name
        place.mkdir()
        (place / "work.py").write_text(code)
        (place / "helpers.py").write_text(helper)
        return place / "work.py"

    yield make
    for name in [n for n in sys.modules if n.startswith("murmur_task_") or n == "helpers"]:
        del sys.modules[name]


def test_a_file_gives_its_task_with_options_and_what_lies_beside_it(folder):
    path = folder()
    before = [*sys.path]
    task = load_task(f"{path}:Task", {"path": "there", "rate": 0.1})
    assert (task.path, task.rate, task.name) == ("there", 0.1, "first")
    assert sys.path == before
    assert load_task(f"{path}:make", {}).path == "here"
    assert load_task(f"{path}:Outer.Inner", {}).path == "here"


def test_a_relative_path_is_taken_from_the_current_folder(folder, monkeypatch):
    monkeypatch.chdir(folder().parent)
    assert load_task("work.py:Task", {}).name == "first"


def test_two_files_of_one_name_do_not_mix_nor_do_their_helpers(folder):
    one, two = folder("one"), folder("two", helper="NAME = 'second'")
    names = [load_task(f"{path}:Task", {}).name for path in (one, two, one)]
    assert names == ["first", "second", "first"]


def test_a_module_that_is_installed_is_found_by_its_name(folder, monkeypatch):
    monkeypatch.syspath_prepend(folder().parent)
    monkeypatch.delitem(sys.modules, "work", raising=False)
    assert load_task("work:Task", {}).name == "first"
    del sys.modules["work"]


def test_an_entry_point_is_found_by_its_name(folder, monkeypatch):
    monkeypatch.syspath_prepend(folder().parent)
    points = [EntryPoint("tumours", "work:Task", tasks.GROUP), EntryPoint("broken", "absent_module:Task", tasks.GROUP)]
    monkeypatch.setattr(tasks, "entry_points", lambda group: points)
    assert load_task("tumours", {}).name == "first"
    with pytest.raises(OperatorError, match=r"no installed task is called 'tumors' \(installed: broken, tumours\)"):
        load_task("tumors", {})
    with pytest.raises(OperatorError, match="'broken' cannot be loaded: ModuleNotFoundError"):
        load_task("broken", {})
    del sys.modules["work"]


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("Tusk", {}, "there is no 'Tusk' in .*work.py; it has: Task, Half, make, Outer"),
        ("NUMBER", {}, "is a int: name a class or a function"),
        ("Task", {"paht": 1}, "unexpected keyword argument 'paht'. It takes: path, rate"),
        ("Half", {}, "gave a Half without data, loss"),
        ("Task", {"path": "nowhere"}, r"failed: FileNotFoundError: no such folder: nowhere \(work.py, line 7\)"),
        ("", {}, "is not a task: write package.module:Name or path/to/file.py:Name"),
    ],
)
def test_each_mistake_in_naming_a_task_is_explained(name, options, words, folder):
    with pytest.raises(OperatorError, match=words):
        load_task(f"{folder()}:{name}", options)


def test_a_missing_file_or_module_is_named(tmp_path):
    with pytest.raises(OperatorError, match=r"there is no file .*absent\.py"):
        load_task(f"{tmp_path}/absent.py:Task", {})
    with pytest.raises(OperatorError, match=r"no module .absent_module.: install it .* absent_module\.py:Name"):
        load_task("absent_module:Task", {})
    with pytest.raises(OperatorError, match=r"there is no module 'json\.absent'"):
        load_task("json.absent:Task", {})


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("def broken(:", "SyntaxError"),
        ("import no_such_package", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("x = 1\ny = x / 0", r"ZeroDivisionError: division by zero \(work.py, line 2\)"),
    ],
)
def test_a_file_that_cannot_be_imported_says_where_and_leaves_nothing(code, words, folder):
    path = folder(code=code)
    before = set(sys.modules)
    with pytest.raises(OperatorError, match=words):
        load_task(f"{path}:Task", {})
    assert set(sys.modules) == before


LATE = """
import torch
from torch.utils.data import Dataset

class Items(Dataset):
    def __len__(self):
        return 8
    def __getitem__(self, index):
        from helpers import row
        return row(index)

class Task:
    workers = 1
    def model(self):
        from helpers import net
        return net()
    def data(self, split):
        import helpers
        return Items() if split == "train" else None
    def loss(self, output, target):
        return (output[:, 0] - target).square().sum()
"""
HELPERS = """
import torch
from torch import nn
net = lambda: nn.Linear(1, 1)
row = lambda index: (torch.ones(1), torch.tensor(float(index)))
"""


def test_a_task_imports_what_lies_beside_it_whenever_it_runs(folder, tmp_path):
    """While data() and model() run, and in the processes that load data."""
    from murmur.clients.engine.loop import run_job
    from murmur.clients.engine.state import initial_model
    from murmur.clients.job import Job
    from murmur.protocol.sections import Train

    before = [*sys.path]
    one = load_task(f"{folder('one', LATE, HELPERS)}:Task", {})
    two = load_task(f"{folder('two', LATE, HELPERS.replace('Linear(1, 1)', 'Linear(1, 2)'))}:Task", {})
    bytes_of = {}
    for name, task in (("one", one), ("two", two), ("one again", one)):  # the other folder has helpers of its own
        model = tmp_path / f"{name}.model"
        initial_model(task, 0, model)
        bytes_of[name] = model.stat().st_size
        job = Job(
            id="a", kind="train", model=model, update=tmp_path / "update", train=Train(), mu=0.0, metrics=(), seed=0,
            round=1, client="north",
        )  # fmt: skip
        assert run_job(task, job).examples == 8
    assert bytes_of["one"] == bytes_of["one again"] < bytes_of["two"]
    assert sys.path == before
