"""`murmur run export`: a run told on to a file or a tracking server, by the coordinator's own sinks."""

from __future__ import annotations

from contextlib import closing

from pydantic import TypeAdapter, ValidationError

from murmur.client import Client
from murmur.coordinator.sinks import SinkSettings, open_sink, tell
from murmur.protocol.errors import OperatorError


def export(client: Client, run: str, to: str, where: str, *, follow: bool) -> None:
    """Tell all of a run's events to a sink. to: its kind; where: its file, folder or address. Twice does no harm."""
    given = {"kind": to, "url" if to in ("mlflow", "webhook") else "path": where}
    try:
        settings: SinkSettings = TypeAdapter(SinkSettings).validate_python(given)
    except ValidationError as error:
        found = error.errors()[0]
        kinds = found["type"] == "union_tag_invalid"
        said = "give csv, jsonl, tensorboard or mlflow" if kinds else f"{found['loc'][-1]}: {found['msg']}"
        raise OperatorError(f"--to {to} --out {where}: {said}") from None
    client.run(run)  # says so when there is none
    with closing(open_sink(settings)) as sink:
        for event in client.watch(run) if follow else client.history(run):
            tell(sink, client, client.pull, [event])
