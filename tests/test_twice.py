"""What `make test` does with a test that failed, in a toy folder of tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ONCE = """
    from pathlib import Path
    def test_once():
        seen = Path(__file__).with_name("seen")
        fine = seen.exists()
        seen.touch()
        assert fine
    def test_good():
        with Path(__file__).with_name("good").open("a") as file:
            file.write("x")
"""
ALWAYS = "def test_always(): assert False"


def twice(folder: Path, source: str, *options: str) -> tuple[int, str]:
    (folder / "test_toy.py").write_text("\n".join(line.removeprefix("    ") for line in source.splitlines()))
    command = [sys.executable, "-P", str(Path(__file__).with_name("twice.py")), "-p", "xdist", "-n", "0"]
    bare = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # the others take seconds to import
    done = subprocess.run([*command, *options], cwd=folder, env=bare, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout


def test_what_failed_beside_others_and_passes_alone_passes_and_is_named(tmp_path: Path):
    code, said = twice(tmp_path, ONCE, "-n", "1")
    assert code == 0
    assert "== 1 failed beside others, PASSED ALONE:\n   test_toy.py::test_once\n" in said
    assert (tmp_path / "good").read_text() == "x"  # what passed is not run again


def test_what_fails_twice_fails(tmp_path: Path):
    code, said = twice(tmp_path, ALWAYS)
    assert code == 1
    assert "== 1 failed beside others, AND ALONE (see above):\n   test_toy.py::test_always\n" in said


@pytest.mark.parametrize(
    ("source", "options", "expected"),
    [
        pytest.param("\n".join(f"def test_{n}(): assert False" for n in range(6)), (), 1, id="six failures"),
        pytest.param(ONCE + "    import nothing_of_this_name", ("-n", "1"), 1, id="a file that cannot be collected"),
        pytest.param(ONCE + "    def test_dies(): __import__('os')._exit(1)", ("-n", "1"), 1, id="a worker that dies"),
        pytest.param(ONCE, ("-n", "1", "--maxfail=1"), 2, id="an interrupted run"),
        pytest.param(ONCE, ("--maxfail=1",), 1, id="a run that was stopped"),
        pytest.param(ONCE, ("--no-such-option",), 4, id="wrong usage"),
        pytest.param("", (), 5, id="no tests"),
    ],
)
def test_what_is_more_than_a_failed_test_fails_at_once(
    tmp_path: Path, source: str, options: tuple[str, ...], expected: int
):
    code, said = twice(tmp_path, source, *options)
    assert code == expected
    assert "once more" not in said, said
