"""Which sinks there are, and what each is told; nothing heavy is imported before one is opened."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from .following import Sink


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CsvSettings(_Section):
    """One line for each number: time, run, version, name, value."""

    kind: Literal["csv"]
    path: Path = Field(description="file that grows")


class JsonlSettings(_Section):
    """Every event as it is in the log, one JSON object a line."""

    kind: Literal["jsonl"]
    path: Path = Field(description="file that grows")


class TensorboardSettings(_Section):
    """Scalars by version and the recipe as text, a folder for each run."""

    kind: Literal["tensorboard"]
    path: Path = Field(description="log folder; `tensorboard --logdir` shows it")


class MlflowSettings(_Section):
    """A run of an experiment for each run, with parameters, metrics and the final model, over MLflow's REST API."""

    kind: Literal["mlflow"]
    url: str = Field(pattern=r"^https?://", description="of the tracking server")
    experiment: str = Field(default="murmur", min_length=1)
    token: str = Field(default="", description="bearer token, where the server asks for one")
    models: bool = Field(default=True, description="upload the final model of a finished run, and register it")


class WebhookSettings(_Section):
    """What needs somebody's eyes, as a JSON object with `text`, which chat programs show."""

    kind: Literal["webhook"]
    url: str = Field(pattern=r"^https?://")
    level: Literal["bad", "warn", "all"] = Field(default="warn", description="failures; also warnings; every event")


SinkSettings = Annotated[
    CsvSettings | JsonlSettings | TensorboardSettings | MlflowSettings | WebhookSettings, Field(discriminator="kind")
]


def open_sink(settings: SinkSettings) -> Sink:
    """Raises OperatorError where a package is missing, or a file cannot be written."""
    match settings:
        case CsvSettings(path=path):
            from .files import CsvSink

            return CsvSink(path)
        case JsonlSettings(path=path):
            from .files import JsonlSink

            return JsonlSink(path)
        case TensorboardSettings(path=path):
            from .tensorboard import TensorboardSink

            return TensorboardSink(path)
        case MlflowSettings():
            from .mlflow import MlflowSink

            return MlflowSink(settings)
        case WebhookSettings():
            from .webhook import WebhookSink

            return WebhookSink(settings)
