"""The example notebook runs from its first cell to its last, and shows what it says."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def run_cells(path: Path) -> list[Any]:
    """What each code cell's last expression is, all cells in one namespace, as a notebook runs them."""
    namespace: dict[str, Any] = {}
    values: list[Any] = []
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            *body, last = ast.parse("".join(cell["source"])).body
            assert isinstance(last, ast.Expr)
            shown = ast.fix_missing_locations(ast.Assign([ast.Name("_", ast.Store())], last.value))
            exec(compile(ast.Module(body=[*body, shown], type_ignores=[]), "cell", "exec"), namespace)
            values.append(namespace["_"])
    return values


@pytest.mark.slow
def test_the_notebook_runs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    history, difference, found = run_cells(ROOT / "examples" / "notebook" / "hospitals.ipynb")
    assert "<svg" in history._repr_html_() and 0 < difference < 1e-4
    assert list(found) == ["mu = 0", "mu = 0.1", "mu = 1.0"] and min(found.values()) > 0.6
