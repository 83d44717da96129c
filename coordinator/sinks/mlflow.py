"""MLflow over its REST API: an experiment's run for each run, its parameters, metrics, and the model that came out.

No package of MLflow's is needed. What was told twice is there once: a run is found by its tag, parameters are the
same, and MLflow takes a metric's value at a step again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from ...protocol.errors import Unavailable
from ...protocol.views import EventView, RunView, VersionView
from .settings import MlflowSettings

TAG = "murmur.run"
STATES = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
MOST_PARAMS, MOST_CHARACTERS = 100, 500  # that MLflow takes in one request, and of one value


class MlflowSink:
    def __init__(self, settings: MlflowSettings, *, transport: httpx.BaseTransport | None = None) -> None:
        headers = {"Authorization": f"Bearer {settings.token}"} if settings.token else {}
        self._settings = settings
        self._http = httpx.Client(base_url=settings.url.rstrip("/"), headers=headers, timeout=60, transport=transport)
        self._experiment = ""
        self._runs: dict[str, str] = {}  # ours -> MLflow's

    def event(self, event: EventView) -> None: ...

    def began(self, run: RunView) -> None:
        params = [
            {"key": key, "value": value[:MOST_CHARACTERS]}
            for key, value in _flat(run.recipe.model_dump(mode="json"))
        ]  # fmt: skip
        for at in range(0, len(params), MOST_PARAMS):
            self._post("runs/log-batch", run_id=self._run(run), params=params[at : at + MOST_PARAMS])

    def measured(self, run: RunView, version: int, at: datetime, values: Mapping[str, float]) -> None:
        when = round(at.timestamp() * 1000)
        metrics = [{"key": k, "value": v, "timestamp": when, "step": version} for k, v in sorted(values.items())]
        if metrics:
            self._post("runs/log-batch", run_id=self._run(run), metrics=metrics)

    def ended(self, run: RunView, version: VersionView, model: Callable[[Path], None]) -> None:
        found = self._run(run)
        if self._settings.models and run.state == "finished":
            self._register(run, version, found, model)
        at = run.finished_at or run.created_at
        status = STATES.get(run.state, "FINISHED")
        self._post("runs/update", run_id=found, status=status, end_time=round(at.timestamp() * 1000))

    def flush(self) -> None: ...

    def close(self) -> None:
        self._http.close()

    def _run(self, run: RunView) -> str:
        """MLflow's id of a run of ours, which is made when there is none."""
        if run.id in self._runs:
            return self._runs[run.id]
        self._experiment = self._experiment or self._find_experiment()
        wanted = f"tags.`{TAG}` = '{run.id}'"
        there = self._post("runs/search", experiment_ids=[self._experiment], filter=wanted, max_results=1).get("runs")
        if not there:
            made = self._post(
                "runs/create",
                experiment_id=self._experiment,
                run_name=run.id,
                start_time=round(run.created_at.timestamp() * 1000),
                tags=[{"key": TAG, "value": run.id}, {"key": "murmur.by", "value": run.created_by}],
            )
            there = [made["run"]]
        return self._runs.setdefault(run.id, there[0]["info"]["run_id"])

    def _find_experiment(self) -> str:
        name = self._settings.experiment
        response = self._http_json("GET", "experiments/get-by-name", params={"experiment_name": name}, missing=True)
        if response:
            return response["experiment"]["experiment_id"]
        return self._post("experiments/create", name=name)["experiment_id"]

    def _register(self, run: RunView, version: VersionView, found: str, model: Callable[[Path], None]) -> None:
        """Upload the model beside the run, and make it a version of the registered model of the run's name."""
        at = f"{self._experiment}/{found}/artifacts/model/model.safetensors"
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.safetensors"
            model(path)
            with path.open("rb") as file:
                self._check(self._send("PUT", f"/api/2.0/mlflow-artifacts/artifacts/{quote(at)}", content=file))
        name = run.name
        self._http_json("POST", "registered-models/create", json={"name": name}, missing=True)  # or it is there
        wanted = f"name='{name}' and run_id='{found}'"
        known = self._http_json("GET", "model-versions/search", params={"filter": wanted})
        if not known.get("model_versions"):
            tags = [
                {"key": "murmur.sha256", "value": version.sha256},
                {"key": "murmur.version", "value": str(version.n)},
            ]
            source = f"mlflow-artifacts:/{self._experiment}/{found}/artifacts/model"
            self._post("model-versions/create", name=name, source=source, run_id=found, tags=tags)

    def _post(self, path: str, **body: Any) -> dict[str, Any]:
        return self._http_json("POST", path, json=body)

    def _http_json(self, method: str, path: str, *, missing: bool = False, **options: Any) -> dict[str, Any]:
        """The answer's JSON. missing: what is not there, or there already, gives {} and is no error."""
        response = self._send(method, f"/api/2.0/mlflow/{path}", **options)
        if missing and response.status_code in (400, 404) and "RESOURCE_" in response.text:
            return {}
        self._check(response)
        return response.json()

    def _send(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            return self._http.request(method, path, **options)
        except httpx.TransportError as error:
            raise Unavailable(f"MLflow at {self._settings.url} cannot be reached: {error}") from None

    def _check(self, response: httpx.Response) -> None:
        if not response.is_success:
            raise Unavailable(f"MLflow answered {response.status_code}: {response.text[:200]}")


def _flat(values: Mapping[str, Any], table: str = "") -> Iterator[tuple[str, str]]:
    """A recipe's settings by their dotted names."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{table}{name}.")
        else:
            yield f"{table}{name}", str(value)
