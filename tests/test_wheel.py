"""The wheel holds every folder: one that pyproject.toml does not list works from a clone but not when installed."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("murmur", "simulation", "coordinator", "clients", "aggregation", "privacy", "web", "protocol")
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names of the files in a wheel that is built from a copy of the sources."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run([sys.executable, "-c", BUILD, str(out)], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(out.glob("*.whl"))) as wheel:
        return set(wheel.namelist())


def test_every_source_file_is_in_the_wheel(names: set[str]):
    kept = (".py", ".html", ".css", ".js", ".svg", ".mako", ".woff2", ".typed", ".po")
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in kept and "__pycache__" not in path.parts:
                inside = path.relative_to(ROOT).as_posix()
                assert (inside if folder == "murmur" else f"murmur/{inside}") in names


def test_nothing_is_installed_beside_the_package(names: set[str]):
    assert {name.partition("/")[0] for name in names} == {"murmur", "murmur-0.1.0.dist-info"}
