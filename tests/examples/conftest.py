from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

torch.set_num_threads(1)
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="session")
def examples() -> Path:
    return EXAMPLES


@pytest.fixture(scope="session")
def module() -> Callable[[str], ModuleType]:
    """An example's file as a module, by its path below examples/; for files that import no sibling."""

    def load(path: str) -> ModuleType:
        name = f"example_{path.replace('/', '_')[:-3]}"
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / path)
        assert spec is not None
        assert spec.loader is not None
        made = importlib.util.module_from_spec(spec)
        sys.modules[name] = made  # dataclasses look their module up there
        spec.loader.exec_module(made)
        return made

    return load
