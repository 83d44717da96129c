"""Runs pytest with the arguments given, then what failed once more, alone: `make test` and `make test-all` do so.

A test with processes of its own may fail because of its neighbours on a loaded machine; one that fails without them
fails. More than MOST failures, a file that cannot be collected, a worker that died and a run that was interrupted are
never tried again. Exits as pytest does.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import pytest

MOST = 5
ALONE = ("-n", "0", "--last-failed", "--last-failed-no-failures", "none")


class Failures:
    """The names of the tests that failed, in this process or in a worker; `broken` when something else did."""

    def __init__(self) -> None:
        self.names: dict[str, None] = {}  # a set in order
        self.broken = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.names[report.nodeid] = None

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self.broken |= report.failed

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self.broken |= bool(session.shouldfail or session.shouldstop)  # by -x, without workers

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, error: object) -> None:
        self.broken |= error is not None


def main(arguments: Sequence[str]) -> int:
    found = Failures()
    code = pytest.main([*arguments], plugins=[found])
    if code != pytest.ExitCode.TESTS_FAILED or found.broken or len(found.names) > MOST:
        return code
    say("failed beside others; once more, alone", found.names)
    code = subprocess.call([sys.executable, "-P", "-m", "pytest", *arguments, *ALONE])
    say("failed beside others, " + ("AND ALONE (see above)" if code else "PASSED ALONE"), found.names)
    return code


def say(what: str, names: Sequence[str] | dict[str, None]) -> None:
    print(f"\n== {len(names)} {what}:", *names, sep="\n   ", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
