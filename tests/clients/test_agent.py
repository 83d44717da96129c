import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from murmur.clients import agent as agent_module
from murmur.clients import conversation as conversation_module
from murmur.clients.agent import Agent
from murmur.clients.identity import create_identity, load_identity
from murmur.clients.logs import FieldFormatter
from murmur.clients.settings import parse_settings, write_settings
from murmur.clients.switch import Switch
from murmur.protocol.errors import OperatorError, ProtocolMismatch
from murmur.protocol.messages import AnswerKind

from ..waiting import wait_until
from .conftest import FakeTrainer
from .coordinator_double import CoordinatorDouble, Wire
from .servers import serve

NAMES = ("alpha", "beta", "delta", "gamma")


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(conversation_module, "PACE_S", 0.02)
    monkeypatch.setattr(agent_module, "APPROVAL_S", 0.02)
    monkeypatch.setattr(agent_module, "REFUSED_S", 0.02)


class Running:
    """Agents in threads of this process, each from a directory of its own."""

    def __init__(self, folder, names=NAMES, policy=None, tasks=None):
        self.folder, self.agents, self.threads, self.errors = folder, {}, {}, []
        self.trainers = {name: FakeTrainer() for name in names}
        self.homes, identities = {}, {}
        for name in names:
            home = folder / name
            home.mkdir()
            values = {
                "name": name,
                "coordinator": "http://127.0.0.1:1",
                "policy": policy or {},
                "tasks": {"digits": {"reference": "digits:Digits"}} if tasks is None else tasks,
            }
            self.homes[name] = parse_settings(values, home)
            identities[name] = create_identity(home / "identity.pem")
        self.identities = identities

    def start(self, coordinator, *names):
        for name in names or self.homes:
            agent = Agent(
                self.homes[name], link=coordinator.link(name), make_trainer=lambda n, e, name=name: self.trainers[name]
            )
            self.agents[name] = agent
            self.threads[name] = threading.Thread(target=self._run, args=(agent,), daemon=True)
            self.threads[name].start()

    def _run(self, agent):
        try:
            agent.run()
        except Exception as error:
            self.errors.append(error)

    def stop(self):
        for agent in self.agents.values():
            agent.stop()
        for thread in self.threads.values():
            thread.join(60)
            assert not thread.is_alive()


def until(condition, what, seconds=20):
    wait_until(condition, seconds, what, every_s=0.01)


@pytest.fixture
def running(tmp_path):
    made = Running(tmp_path)
    yield made
    made.stop()


@pytest.fixture
def coordinator(tmp_path, running):
    return CoordinatorDouble(tmp_path / "coordinator", running.identities)


def test_agents_take_part_in_a_round_from_poll_to_sum(running, coordinator):
    running.start(coordinator)
    until(lambda: len(coordinator.said(AnswerKind.REVEAL)) == 4, "four reveals")
    assert coordinator.totals()[1].clients == 4
    assert all(trainer.warmed for trainer in running.trainers.values())
    until(lambda: not any(agent._conversations for agent in running.agents.values()), "the ends of the conversations")
    running.stop()
    assert running.errors == [] and all(trainer.closed for trainer in running.trainers.values())


def test_agents_come_through_a_bad_network(running, coordinator):
    coordinator.faults = 0.3
    running.start(coordinator)
    until(lambda: len(coordinator.said(AnswerKind.REVEAL)) == 4, "four reveals", 40)
    coordinator.faults = 0
    assert coordinator.totals()[1].clients == 4


def test_an_agent_waits_for_its_approval_and_says_so_once(running, coordinator, caplog):
    caplog.set_level("INFO", logger="murmur.clients.agent")
    coordinator.approved = False
    running.start(coordinator, "alpha")
    until(lambda: sum("token" in r for r in coordinator.requests) > 3, "some questions")
    waiting = [r for r in caplog.records if r.message == "waiting for an admin to approve this client"]
    assert [r.fingerprint for r in waiting] == [running.identities["alpha"].fingerprint]
    coordinator.approved = True
    until(lambda: any(r.message == "this client was approved" for r in caplog.records), "a word about it")
    until(lambda: "alpha" in coordinator.handed, "work")


def test_what_the_coordinator_calls_void_is_dropped(running, coordinator, monkeypatch):
    monkeypatch.setattr(coordinator, "step", lambda name, after: None)
    monkeypatch.setattr(conversation_module, "PACE_S", 60)  # so that no heartbeat hears it first
    running.trainers["alpha"].hold.clear()
    running.start(coordinator, "alpha")
    assert running.trainers["alpha"].started.wait(60)
    coordinator.end("alpha", "the run was stopped")
    until(lambda: not running.agents["alpha"]._conversations, "the end of the conversation")
    assert running.trainers["alpha"].cancelled.is_set() and coordinator.parts["alpha"].failure is None


def test_an_agent_that_is_stopped_reports_what_is_left_undone_and_is_gone_soon(running, coordinator):
    running.trainers["alpha"].hold.clear()
    running.start(coordinator, "alpha")
    assert running.trainers["alpha"].started.wait(60)
    began = time.monotonic()
    running.stop()
    assert time.monotonic() - began < 5
    assert coordinator.parts["alpha"].failure.code == "unavailable"
    assert running.trainers["alpha"].closed


def test_a_site_that_was_stopped_asks_for_nothing_until_it_is_resumed_over_a_restart_too(tmp_path, monkeypatch):
    monkeypatch.setattr(agent_module, "SWITCH_S", 0.02)
    alone = Running(tmp_path, ("alpha", "beta", "delta"))
    coordinator = CoordinatorDouble(tmp_path / "coordinator", alone.identities)
    switch = Switch(alone.homes["alpha"].directory)
    switch.stop("a test")
    alone.start(coordinator, "alpha")
    time.sleep(0.2)  # ten looks at the switch
    alone.stop()
    alone.start(coordinator, "alpha")
    time.sleep(0.2)
    assert coordinator.requests == [] and switch.stopped().by == "a test"
    switch.resume()
    until(lambda: "alpha" in coordinator.handed, "work")
    alone.stop()


def test_an_agent_is_stopped_while_its_coordinator_is_away(running, coordinator):
    coordinator.faults = 1.0
    coordinator.random.random = lambda: 0.1  # connection refused
    running.start(coordinator, "alpha")
    time.sleep(0.1)
    began = time.monotonic()
    running.stop()
    assert time.monotonic() - began < 2 and running.errors == []


def test_an_assignment_that_is_handed_out_again_takes_the_place_of_the_first(running, tmp_path):
    coordinator = CoordinatorDouble(tmp_path / "coordinator", running.identities, masked=False)
    home = running.homes["alpha"]
    running.homes["alpha"] = home.model_copy(
        update={"policy": home.policy.model_copy(update={"require_secure": False})}
    )
    running.trainers["alpha"].hold.clear()
    running.start(coordinator, "alpha")
    assert running.trainers["alpha"].started.wait(60)
    with coordinator.lock:
        coordinator.parts["alpha"].fence = 2
        coordinator.assignments["alpha"] = coordinator.assignments["alpha"].model_copy(update={"fence": 2})
        coordinator.handed.discard("alpha")
    until(lambda: len(running.trainers["alpha"].jobs) == 2, "a second job")
    running.trainers["alpha"].hold.set()
    until(lambda: coordinator.parts["alpha"].complete is not None, "the update")
    assert coordinator.parts["alpha"].complete.fence == 2 and coordinator.parts["alpha"].failure is None


def test_two_agents_never_run_from_one_directory(running, coordinator):
    running.start(coordinator, "alpha")
    with pytest.raises(OperatorError, match="another agent runs from"):
        Agent(running.homes["alpha"], link=coordinator.link("alpha"), make_trainer=lambda n, e: FakeTrainer())
    running.stop()
    again = Agent(running.homes["alpha"], link=coordinator.link("alpha"), make_trainer=lambda n, e: FakeTrainer())
    again.stop()
    again.run()


def test_an_agent_of_another_protocol_ends(running, coordinator):
    import httpx

    def other(request):
        return httpx.Response(200, content=b"{}", headers={"Murmur-Protocol": "2"})

    link = coordinator.link("alpha", transport=Wire(other))
    agent = Agent(running.homes["alpha"], link=link, make_trainer=lambda n, e: FakeTrainer())
    with pytest.raises(ProtocolMismatch, match="install the murmur release"):
        agent.run()


def test_a_revoked_agent_asks_on_without_hurry(running, coordinator, caplog):
    running.start(coordinator, "alpha")
    until(lambda: "alpha" in coordinator.handed, "work")
    coordinator.identities = {name: i for name, i in coordinator.identities.items() if name != "alpha"}
    coordinator.tokens.clear()
    until(lambda: any("does not accept this client" in r.message for r in caplog.records), "a word about it")
    assert running.threads["alpha"].is_alive()


def test_log_lines_carry_their_fields():
    record = logging.LogRecord("murmur", logging.INFO, "", 0, "round closed", (), None)
    record.round, record.why, record.empty = 7, "two words\x1b", ""
    line = FieldFormatter().format(record)
    assert line.endswith("INFO    round closed round=7 why='two words\\x1b' empty=''")


# The process


def home_of(tmp_path, url, tasks):
    home = tmp_path / "home"
    home.mkdir()
    create_identity(home / "identity.pem")
    write_settings(parse_settings({"name": "alpha", "coordinator": url, "tasks": tasks}, home))
    return home


def begin(home):
    command = [sys.executable, "-m", "murmur.clients.agent", "--dir", str(home)]
    return subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, cwd=home, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)], ids=["SIGTERM", "SIGINT"]
)
def test_a_signal_ends_the_process_and_those_that_train(tmp_path, number):
    (tmp_path / "task.py").write_text(
        "import torch\n"
        "class Task:\n"
        "    def model(self): return torch.nn.Linear(1, 1)\n"
        "    def data(self, split): return None\n"
        "    def loss(self, output, target): return output.sum()\n"
    )
    home = tmp_path / "home"
    coordinator = CoordinatorDouble(tmp_path / "coordinator", {})
    with serve(coordinator.handle) as url:
        home = home_of(tmp_path, url, {"digits": {"reference": str(tmp_path / "task.py") + ":Task"}})
        coordinator.identities = {"alpha": load_identity(home / "identity.pem")}
        process = begin(home)
        try:
            until(lambda: any("poll" in r for r in coordinator.requests), "a poll", 60)
            until(lambda: len(descendants(process.pid)) >= 2, "the processes that train", 60)
            children = descendants(process.pid)
            process.send_signal(number)
            _, text = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0, text
    assert "agent started client=alpha" in text and f"signal={number.name}" in text and "agent stopped" in text
    assert "Traceback" not in text
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children), "the end of its children", 10)


def descendants(pid):
    """Process ids below this one, from /proc."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it has ended meanwhile
    found, last = {pid}, set()
    while found != last:
        last, found = found, found | {child for child, parent in parents.items() if parent in found}
    return found - {pid}


def test_a_directory_that_is_not_enrolled_is_said_in_one_line(tmp_path):
    process = begin(tmp_path)
    _, text = process.communicate(timeout=60)
    assert process.returncode == 1
    assert text.strip() == f"error: there is no {tmp_path}/client.toml: enrol this client first"


def test_the_agents_own_process_loads_no_torch(tmp_path):
    code = "import sys, murmur.clients.agent, murmur.clients.enrolment; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, timeout=60).returncode == 0
