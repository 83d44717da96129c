"""What sinks are told of a run, what they make of it, and that one that fails harms nothing."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import socket
import subprocess
import time
import venv
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from murmur.coordinator.sinks import Follower, tell
from murmur.coordinator.sinks.files import CsvSink, JsonlSink
from murmur.coordinator.sinks.mlflow import MlflowSink
from murmur.coordinator.sinks.settings import MlflowSettings, WebhookSettings
from murmur.coordinator.sinks.tensorboard import TensorboardSink
from murmur.coordinator.sinks.webhook import WebhookSink
from murmur.protocol.errors import Unavailable
from murmur.protocol.recipe import Recipe
from murmur.protocol.views import EventView, MetricPoint, RoundView, RunDetail, RunView, VersionView

from ..waiting import slowness

AT = datetime(2026, 3, 2, 9, tzinfo=UTC)
PRIVACY = {"value": 4.0, "delta": 1e-5, "unit": "client", "accountant": "rdp", "budget": 5.0}


def event(id: int, kind: str, **data: Any) -> EventView:
    return EventView(id=id, at=AT + timedelta(seconds=id), run="r", kind=kind, data=data)


EVENTS = [
    event(1, "run", state="running", by="ada", name="heart"),
    event(2, "phase", round=1, attempt=1, state="selecting"),
    event(3, "client", client="va", state="dropped", round=1, attempt=1, reason="not heard for 60 s"),
    event(4, "phase", round=1, attempt=1, state="committed"),
    event(5, "model", version=1, sha256="ab" * 32, contributors=3, clipped=0.0, rounding=1e-7),
    event(6, "phase", round=2, attempt=1, state="committed"),  # the evaluation of version 1
    event(7, "run", state="finished"),
]


class Coordinator:
    """A run of one round and its evaluation, as `Service` and `Client` show it."""

    def events(self, after: int, run: str | None = None) -> list[EventView]:
        return [e for e in EVENTS if e.id > after]

    def run(self, id: str, /) -> RunDetail:
        view = RunView.model_validate(
            {"id": "r", "name": "heart", "state": "finished", "recipe": Recipe(name="heart", task="t"), "round": 1}
            | {"rounds": 1, "version": 1, "created_at": AT, "finished_at": AT, "privacy": PRIVACY}
        )

        def closed(n: int, kind: str) -> RoundView:
            asked = [{"client": c, "state": "counted"} for c in "abcd"]
            return RoundView.model_validate(
                {"n": n, "kind": kind, "attempt": 1, "state": "committed", "opened_at": AT, "assignments": asked}
                | {"closed_at": AT + timedelta(seconds=7)}
            )

        points = [(0, "accuracy", 0.5), (1, "train_loss", 0.7), (1, "accuracy", 0.75)]
        metrics = tuple(MetricPoint(version=v, name=n, value=x, count=10) for v, n, x in points)
        return RunDetail(run=view, current=None, rounds=(closed(1, "train"), closed(2, "evaluate")), metrics=metrics)

    def versions(self, run: str | None = None) -> list[VersionView]:
        given = {"run": "r", "run_name": "heart", "n": 1, "sha256": "ab" * 32, "bytes": 5, "parent": None}
        return [VersionView.model_validate(given | {"contributors": 3, "created_at": AT})]


def pull(sha256: str, to: Path) -> None:
    to.write_bytes(sha256[:5].encode())


# What round 1 of the run above comes to, and then its evaluation.
NUMBERS = {
    ("0", "accuracy"): 0.5,
    ("1", "train_loss"): 0.7,
    ("1", "round_s"): 7.0,
    ("1", "asked"): 4.0,
    ("1", "epsilon"): 4.0,
    ("1", "contributors"): 3.0,
    ("1", "clipped"): 0.0,
    ("1", "rounding"): 1e-7,
    ("1", "accuracy"): 0.75,
}


def test_a_csv_file_has_each_number_once_however_often_it_is_told(tmp_path: Path):
    path = tmp_path / "a" / "runs.csv"
    for _ in range(2):
        sink = CsvSink(path)
        tell(sink, Coordinator(), pull, EVENTS)
        sink.close()
    rows = [*csv.DictReader(path.read_text().splitlines())]
    assert {(r["version"], r["metric"]): float(r["value"]) for r in rows} == NUMBERS and len(rows) == len(NUMBERS)
    assert {(r["run"], r["name"]) for r in rows} == {("r", "heart")}
    (at,) = [r["at"] for r in rows if r["metric"] == "round_s"]
    assert datetime.fromisoformat(at) == EVENTS[3].at


def test_a_line_that_was_cut_by_a_kill_is_written_whole(tmp_path: Path):
    path = tmp_path / "events.jsonl"
    sink = JsonlSink(path)
    tell(sink, Coordinator(), pull, EVENTS)
    sink.close()
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    sink = JsonlSink(path)
    tell(sink, Coordinator(), pull, EVENTS)
    sink.close()
    assert path.read_bytes() == whole
    assert [json.loads(line)["id"] for line in whole.splitlines()] == [1, 2, 3, 4, 5, 6, 7]
    assert EventView.model_validate_json(whole.splitlines()[2]) == EVENTS[2]


def test_tensorboards_own_reader_finds_the_numbers(tmp_path: Path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    sink = TensorboardSink(tmp_path)
    tell(sink, Coordinator(), pull, EVENTS)
    sink.close()
    read = accumulator.EventAccumulator(str(tmp_path / "r"))
    read.Reload()
    found = {(str(e.step), name): e.value for name in read.Tags()["scalars"] for e in read.Scalars(name)}
    assert found == pytest.approx(NUMBERS)
    (walltime,) = [e.wall_time for e in read.Scalars("round_s")]
    assert walltime == EVENTS[3].at.timestamp()
    (text,) = read.Tensors("recipe/text_summary")
    assert b'"task": "t"' in text.tensor_proto.string_val[0]


class Mlflow:
    """Answers as a tracking server does; what it was sent lies in `batches`, `files` and `models`."""

    def __init__(self) -> None:
        self.runs: list[dict[str, Any]] = []
        self.params: dict[str, str] = {}
        self.metrics: dict[tuple[str, str], float] = {}
        self.files: dict[str, bytes] = {}
        self.models: list[dict[str, Any]] = []
        self.status = ""

    def __call__(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path.removeprefix("/api/2.0/").removeprefix("mlflow/")
        if path.startswith("mlflow-artifacts/"):
            self.files[path] = request.read()
            return httpx.Response(200, json={})
        body = json.loads(request.read() or b"{}")
        if path == "experiments/get-by-name":
            return httpx.Response(404, json={"error_code": "RESOURCE_DOES_NOT_EXIST"})
        return httpx.Response(200, json=self.answer(path, body))

    def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        match path:
            case "experiments/create":
                found = {"experiment_id": "7"}
            case "runs/search":
                found = {"runs": self.runs}
            case "runs/create":
                self.runs = [{"info": {"run_id": "abc"}, "tags": body["tags"]}]
                found = {"run": self.runs[0]}
            case "runs/log-batch":
                self.params |= {p["key"]: p["value"] for p in body.get("params", ())}
                self.metrics |= {(str(m["step"]), m["key"]): m["value"] for m in body.get("metrics", ())}
            case "runs/update":
                self.status = body["status"]
            case "model-versions/search":
                found = {"model_versions": self.models}
            case "model-versions/create":
                self.models.append(body)
            case _:
                pass
        return found


def test_mlflow_has_one_run_with_settings_numbers_and_the_model_however_often_it_is_told():
    server = Mlflow()
    for _ in range(2):
        settings = MlflowSettings(kind="mlflow", url="http://mlflow")
        sink = MlflowSink(settings, transport=httpx.MockTransport(server))
        tell(sink, Coordinator(), pull, EVENTS)
        sink.close()
    assert server.runs[0]["tags"][0] == {"key": "murmur.run", "value": "r"}
    assert server.params["train.lr"] == "0.01" and server.params["strategy.name"] == "fedavg"
    assert server.metrics == NUMBERS and server.status == "FINISHED"
    assert server.files == {"mlflow-artifacts/artifacts/7/abc/artifacts/model/model.safetensors": b"ababa"}
    (model,) = server.models
    assert model["name"] == "heart" and model["source"] == "mlflow-artifacts:/7/abc/artifacts/model"


@pytest.fixture
def mlflow(tmp_path: Path) -> Iterator[str]:
    """The address of a real tracking server; MURMUR_TEST_MLFLOW names its command, or it is installed apart."""
    command = os.environ.get("MURMUR_TEST_MLFLOW") or shutil.which("mlflow")
    if command is None:
        venv.create(tmp_path / "venv", with_pip=True)
        install = [tmp_path / "venv/bin/pip", "install", "--quiet", "--disable-pip-version-check", "mlflow==3.17.2"]
        tried = subprocess.run(install, capture_output=True, text=True, timeout=1200)
        if tried.returncode:
            pytest.skip(f"mlflow is not installed, and pip cannot install it: {tried.stderr.strip()[-300:]}")
        command = str(tmp_path / "venv/bin/mlflow")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    stores = ("--backend-store-uri", f"sqlite:///{tmp_path}/ml.db", "--artifacts-destination", str(tmp_path / "art"))
    where = ("server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1", *stores)
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen([command, *where], stdout=log, stderr=log, env=clean, start_new_session=True)
    try:
        began = time.monotonic()
        while True:
            waited = time.monotonic() - began  # it needs most of a minute on a small machine
            assert server.poll() is None and waited < 150 * slowness(), (tmp_path / "log").read_text()
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health").is_success:
                    break
            except httpx.TransportError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@pytest.mark.slow
def test_a_real_mlflow_server_has_the_run_its_numbers_and_its_model(mlflow: str, tmp_path: Path):
    for _ in range(2):
        sink = MlflowSink(MlflowSettings(kind="mlflow", url=mlflow))
        tell(sink, Coordinator(), pull, EVENTS)
        sink.close()
    found = httpx.post(f"{mlflow}/api/2.0/mlflow/runs/search", json={"experiment_ids": ["1"]}).json()
    (run,) = found["runs"]
    assert run["info"]["status"] == "FINISHED"
    newest = {(str(m["step"]), m["key"]): m["value"] for m in run["data"]["metrics"]}
    assert newest == {key: value for key, value in NUMBERS.items() if key != ("0", "accuracy")}  # the last of each
    models = httpx.get(f"{mlflow}/api/2.0/mlflow/registered-models/search").json()["registered_models"]
    assert [(m["name"], len(m["latest_versions"])) for m in models] == [("heart", 1)]
    (file,) = (tmp_path / "art").rglob("model.safetensors")
    assert file.read_bytes() == b"ababa"


@pytest.mark.parametrize(("level", "told"), [("bad", 1), ("warn", 2), ("all", 8)])
def test_a_webhook_hears_what_needs_somebodys_eyes(level: Any, told: int):
    heard: list[dict[str, Any]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        heard.append(json.loads(request.read()))
        return httpx.Response(204)

    settings = WebhookSettings(kind="webhook", url="http://chat", level=level)
    sink = WebhookSink(settings, transport=httpx.MockTransport(answer))
    tell(sink, Coordinator(), pull, EVENTS)
    dropped = next(h for h in heard if h["level"] == "bad")
    assert dropped["text"] == "r: va dropped out of round 1: not heard for 60 s" and dropped["run"] == "r"
    if level != "bad":  # 4.0 of a budget of 5 is 80 %
        assert any("has used most of its privacy budget" in h["text"] for h in heard)
    assert len(heard) == told


@pytest.mark.parametrize(("spent", "told"), [(3.9, 0), (4.0, 1), (None, 1)])
def test_a_webhook_is_told_once_of_four_fifths_of_a_budget(spent: float | None, told: int):
    heard: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        heard.append(json.loads(request.read())["text"])
        return httpx.Response(204)

    settings = WebhookSettings(kind="webhook", url="http://chat", level="warn")
    sink = WebhookSink(settings, transport=httpx.MockTransport(answer))
    run = Coordinator().run("r").run
    privacy = run.privacy.model_copy(update={"value": spent}) if run.privacy else None
    for version in (1, 2):
        sink.measured(run.model_copy(update={"privacy": privacy}), version, AT, {})
    assert len(heard) == told


def test_a_webhook_that_hears_nothing_is_told_again():
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    for answer in (lambda _: httpx.Response(500), refuse):
        settings = WebhookSettings(kind="webhook", url="http://chat", level="all")
        sink = WebhookSink(settings, transport=httpx.MockTransport(answer))
        with pytest.raises(Unavailable, match=r"the webhook (answered 500|cannot be reached: refused)"):
            sink.event(EVENTS[2])


class Breaking:
    """A sink that refuses until it is mended."""

    def __init__(self) -> None:
        self.whole, self.heard = False, list[int]()

    def event(self, event: EventView) -> None:
        if event.id == 4 and not self.whole:
            raise Unavailable("the server is away")
        self.heard.append(event.id)

    def began(self, run: RunView) -> None: ...
    def measured(self, run: RunView, version: int, at: datetime, values: Mapping[str, float]) -> None: ...
    def ended(self, run: RunView, version: VersionView, model: Callable[[Path], None]) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


@pytest.fixture
def sink() -> Iterator[Breaking]:
    yield Breaking()


def test_a_sink_that_fails_is_told_again_and_ever_more_seldom(
    sink: Breaking, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    other = Breaking()
    other.whole = True
    follower = Follower(Coordinator(), pull, tmp_path, {"a": lambda: sink, "b": lambda: other})
    for now in (0.0, 1.0, 2.0, 3.0, 4.0, 6.0):  # tried at 0, 2 (= 2 s later) and 6 (= 4 s later)
        follower.look(now)
    assert sink.heard == [1, 2, 3] * 3 and other.heard == [1, 2, 3, 4, 5, 6, 7]
    assert [r.message for r in caplog.records] == ["a sink takes nothing; it is tried again"]
    sink.whole, sink.heard = True, []
    follower.look(100.0)
    follower.look(101.0)
    assert sink.heard == [1, 2, 3, 4, 5, 6, 7]


def test_a_follower_that_is_started_again_goes_on_where_it_was(sink: Breaking, tmp_path: Path):
    sink.whole = True
    Follower(Coordinator(), pull, tmp_path, {"a": lambda: sink}).look()
    again = Breaking()
    Follower(Coordinator(), pull, tmp_path, {"a": lambda: again}).look()
    assert sink.heard == [1, 2, 3, 4, 5, 6, 7] and again.heard == []


def test_a_coordinator_that_does_not_lead_tells_nothing(sink: Breaking, tmp_path: Path):
    follower = Follower(Coordinator(), pull, tmp_path, {"a": lambda: sink})
    follower.leads = lambda: False
    follower.look()
    assert sink.heard == []
