"""Imports point down only, and nothing heavy is imported before it is needed."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BELOW = {
    "murmur": {"simulation", "coordinator", "clients", "aggregation", "privacy", "web", "protocol"},
    "simulation": {"coordinator", "clients", "aggregation", "privacy", "web", "protocol"},
    "coordinator": {"aggregation", "privacy", "web", "protocol"},
    "clients": {"aggregation", "privacy", "web", "protocol"},
    "aggregation": {"protocol"},
    "privacy": {"protocol"},
    "web": {"protocol"},
    "protocol": set[str](),
}


def imports(path: Path) -> set[str]:
    """The folders of ours that a file imports, wherever in the file it does."""
    folder, found = path.relative_to(ROOT).parts[0], set[str]()
    depth = len(path.relative_to(ROOT).parts) - 1
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.level:
            if node.level > depth:  # `from ..protocol` in coordinator/x.py leaves its folder
                names = [f"murmur.{node.module}"] if node.module else [f"murmur.{a.name}" for a in node.names]
            else:
                names = [f"murmur.{folder}"]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        bare = {name for name in names if name.split(".")[0] in BELOW and name.split(".")[0] != "murmur"}
        assert not bare, f"{path} imports {bare} bare: that would load the module twice"
        found |= {name.split(".")[1] for name in names if name.startswith("murmur.")}
    return (found & set(BELOW)) - {folder}


@pytest.mark.parametrize("folder", BELOW)
def test_imports_point_down_only(folder: str):
    files = [p for p in (ROOT / folder).rglob("*.py") if "migrations" not in p.parts]
    assert files
    wrong = {str(p.relative_to(ROOT)): up for p in files if (up := imports(p) - BELOW[folder])}
    assert not wrong


def loaded(statement: str) -> set[str]:
    """The top-level modules that are loaded after a statement in a fresh interpreter."""
    code = f"{statement}\nimport sys; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import murmur.cli",
        "import murmur.clients.agent",
        "import murmur.coordinator.app",
        "import murmur.coordinator.serve",
        "import murmur.client",
    ],
)
def test_torch_and_flwr_stay_out_of_what_must_start_fast(statement: str):
    assert not loaded(statement) & {"torch", "flwr", "ray"}


def test_the_help_needs_neither_the_server_nor_the_database():
    assert not loaded("import murmur.cli") & {"fastapi", "sqlalchemy", "httpx", "numpy", "cryptography", "uvicorn"}


def test_an_agent_loads_nothing_of_its_page_before_somebody_looks():
    assert not loaded("import murmur.clients.agent") & {"uvicorn", "starlette", "fastapi", "jinja2"}


@pytest.mark.slow
def test_the_help_answers_within_half_a_second():
    took: list[float] = []
    for _ in range(5):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "murmur", "--help"], capture_output=True, check=True)
        took.append(time.perf_counter() - began)
    assert min(took) < 0.5, took
