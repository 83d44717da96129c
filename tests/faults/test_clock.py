"""Somebody sets the coordinator's clock: a day ahead, a day back, while it runs and between two starts."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn

from murmur.coordinator.app import create_app
from murmur.coordinator.serve import _introduce
from murmur.coordinator.settings import Settings

from .conftest import free_port
from .federation import Coordinator, Federation, Launcher, check_exact, finish, recipe, wait_until

DAY_S = 86_400.0


class Inside(Coordinator):
    """A coordinator in this process, whose wall clock is `ahead_s` ahead of ours."""

    def __init__(self, launcher: Launcher, data: Path) -> None:
        super().__init__(launcher, data, port=free_port())
        self.ahead_s = 0.0

    def start(self) -> "Inside":
        settings = Settings(data=self.data, port=self.port, insecure_http=True)
        app = create_app(settings, wall_clock=lambda: time.time() + self.ahead_s)
        config = uvicorn.Config(app, port=self.port, log_config=None, ws="none", timeout_graceful_shutdown=2)
        self.parts = app.state.parts
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        wait_until(lambda: self._server.started or not self.running, 60, "start")
        _introduce(self.parts, settings, f"http://127.0.0.1:{self.port}", "")
        return self

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def end(self) -> int:
        self.parts.hub.stop()
        self._server.should_exit = True
        self._thread.join(60)
        return int(self.running)


@pytest.fixture
def inside(launcher: Launcher, federation: Federation, tmp_path: Path) -> Iterator[Inside]:
    one = Inside(launcher, tmp_path / "data")
    federation.know(one.url)
    yield one
    federation.rest()
    assert one.end() == 0


@pytest.mark.slow
@pytest.mark.parametrize("jump_s", [DAY_S, -DAY_S], ids=["ahead", "back"])
def test_a_clock_that_jumps_while_a_run_goes_on_loses_nothing(inside: Inside, federation: Federation, jump_s: float):
    """Signatures are refused meanwhile, for they are dated; nobody is dropped, no token and no deadline runs out."""
    inside.start()
    federation.open_doors(inside)
    rounds = 5
    run = federation.start_run(inside, recipe(rounds, patience_s=30.0))
    wait_until(lambda: inside.run(run).round >= 1, 60, "a round")
    inside.ahead_s = jump_s
    time.sleep(1.5)
    reached = inside.run(run).round
    assert all(view.online for view in inside.ask(lambda c: c.clients()))
    inside.ahead_s = 0.0
    finish(inside, run)
    assert reached < rounds
    assert {r.attempt for r in inside.ask(lambda c: c.run(run)).rounds} == {1}
    check_exact(inside, run, rounds)


@pytest.mark.slow
@pytest.mark.parametrize("wrong_s", [DAY_S, -DAY_S], ids=["ahead", "back"])
def test_a_clock_that_is_set_right_between_two_starts_loses_nothing(
    inside: Inside, federation: Federation, wrong_s: float
):
    rounds = 3
    inside.ahead_s = wrong_s
    inside.start()  # what it writes now is dated a day off
    run = federation.start_run(inside, recipe(rounds, patience_s=30.0), online=False)
    assert inside.end() == 0
    inside.ahead_s = 0.0
    inside.start()
    federation.open_doors(inside)
    finish(inside, run)
    assert {r.attempt for r in inside.ask(lambda c: c.run(run)).rounds} == {1}
    check_exact(inside, run, rounds)
