"""A site's settings: `client.toml` in the client's directory, beside its key and the coordinator's CA certificate.

name = "hospital-a"
coordinator = "https://murmur.example.org:8443"
checkpoint_s = 60            # how much of a training is lost at most when this machine dies

[policy]                     # the site's own word, which no coordinator overrules: see `policy`
min_clients = 5
epsilon = 3.0                # what each data set may spend, over all runs: see `ledger`
resume = true                # a killed agent goes on inside its plain round; a masked one's keys die with it

[site]
port = 8470                  # of this site's own page on 127.0.0.1; 0 (any) without it, "off" for none

[tasks.xray]                 # what may run here: the coordinator names a task, it never sends code
reference = "xray.py:XRay"
options = {folder = "/data/xray"}

[tasks.cifar]                # a Flower app as it is: see `flower`
flower = "pytorchexample.client_app:app"
options = {node_config = {partition-id = 0, num-partitions = 10}}
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..protocol import toml
from ..protocol.encoding import fingerprint, unb64
from ..protocol.errors import BadRequest, OperatorError
from ..protocol.joining import is_loopback
from ..protocol.mistakes import mistakes
from ..protocol.sections import Name, Parallel
from .task import FLOWER

FILE = "client.toml"
_FINGERPRINT = re.compile(r"[0-9a-f]{4}( [0-9a-f]{4}){7}")


class Section(BaseModel):
    """A table of the file: frozen, and a key that it does not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _is_url(text: str) -> str:
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port, parts = None, None, urlsplit("")
    if (
        parts.scheme not in {"http", "https"}
        or not host
        or port == 0
        or parts.query
        or parts.fragment
        or parts.username
    ):
        raise ValueError("an address such as https://host:port is needed")
    if parts.scheme == "http" and not is_loopback(host):
        raise ValueError(f"plain HTTP to {host} would show every request to the network: use https")
    return text.rstrip("/")


def _is_key(text: str) -> str:
    if _FINGERPRINT.fullmatch(text):
        return text
    try:
        raw = unb64(text)
    except BadRequest:
        raw = b""
    if len(raw) != 32:
        raise ValueError("a fingerprint (8 groups of 4 hex digits) or the base64 of a 32-byte public key is needed")
    return text


class Policy(Section):
    """What this site takes part in; the coordinator cannot change it."""

    require_secure: bool = Field(
        default=True, description="take part only where the coordinator learns nothing but the sum"
    )
    min_clients: int = Field(default=3, ge=2, le=100_000, description="smallest cohort, and fewest updates in a sum")
    min_threshold: int = Field(default=2, ge=2, le=100_000, description="fewest clients that can unmask together")
    min_degree: int = Field(
        default=2, ge=2, le=10_000, description="fewest clients that each masks with, where it is not with all"
    )
    colluders: int = Field(
        default=0, ge=0, le=100_000, description="clients, of those that can unmask one, that the coordinator may own"
    )
    trusted: dict[Name, Annotated[str, AfterValidator(_is_key)]] = Field(
        default_factory=dict, description="other clients' keys, as they told us: a fingerprint or a public key"
    )
    ask: bool = Field(
        default=False, description="hold what a run asks for the first time until somebody here approves the run"
    )
    resume: bool = Field(
        default=True,
        description="keep on disk what a killed agent needs to go on inside its plain round; false starts it anew",
    )
    require_dp: bool = Field(default=False, description="take part only in runs with local differential privacy")
    epsilon: float = Field(
        default=0.0,
        ge=0,
        le=1000,
        description="most that a data set may spend on local differential privacy, over all runs, which are then the "
        "only ones; 0: no bound",
    )
    delta: float = Field(default=1e-5, gt=0, lt=1, description="at which that epsilon is counted")
    share_metrics: bool = Field(
        default=False,
        description="report metrics in runs with local differential privacy, which does not cover them",
    )
    accept_new: bool = Field(
        default=True, description="take the key of a client not met before as its own from then on"
    )
    share_errors: bool | Literal["place"] = Field(
        default=True,
        description="tell the coordinator the last lines of an error; 'place': its kind and the line of code, "
        "no words that may quote data; false: its kind alone",
    )

    def key_is_trusted(self, client: str, public_key: bytes) -> bool | None:
        """Whether the key is the one that this file gives for the client; None when the file gives none."""
        given = self.trusted.get(client)
        if given is None:
            return None
        return given == fingerprint(public_key) or (not _FINGERPRINT.fullmatch(given) and unb64(given) == public_key)


class SitePage(Section):
    """The page that this agent serves to its own people, on this machine only."""

    port: Annotated[int, Field(ge=0, le=65_535)] | Literal["off"] = Field(
        default=0, description="of the site's own page on 127.0.0.1; 0 takes a free one, off serves none"
    )


class TaskEntry(Section):
    """A task that is installed here, as `clients.task` finds it, and the options that it is made with."""

    reference: str = Field(min_length=1, max_length=4096)
    """A Flower ClientApp's begins with "flower:"; in the file `flower = "…"` says the same."""
    options: dict[str, Any] = {}
    dataset: Name = "all"
    """Whose budget of differential privacy its training spends. Tasks share one unless their data have no person in
    common: what one example has to bear is the sum over all of them."""

    @model_validator(mode="before")
    @classmethod
    def _flower_by_its_name(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or "flower" not in values:
            return values
        if "reference" in values:
            raise ValueError("either reference or flower names the task, not both")
        return {name: v for name, v in values.items() if name != "flower"} | {
            "reference": f"{FLOWER}{values['flower']}"
        }


class Settings(Section):
    """All of `client.toml`; paths are absolute once it was read."""

    name: Name
    coordinator: Annotated[str, AfterValidator(_is_url)]
    workdir: Path = Field(default=Path("work"), description="models, updates and what is remembered between rounds")
    processes: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"] = "auto"
    """Processes that train together; "auto" is one per GPU, or one where there is none."""
    nodes: int = Field(
        default=1,
        ge=1,
        le=1024,
        description="machines that train together; above 1, torchrun or srun starts `murmur client ranks` on them, and "
        "`processes` says nothing",
    )
    parallel: Parallel | None = Field(default=None, description="in place of what a run's recipe says of it")
    checkpoint_s: float = Field(
        default=60.0, ge=0, le=86_400, description="seconds between two checkpoints of a training; 0 writes none"
    )
    train_s: float = Field(
        default=0.0,
        ge=0,
        le=30 * 86_400,
        description="seconds of a round's training after which what there is is sent; 0: all is trained",
    )
    proxy: Annotated[str, Field(pattern=r"^(https?://\S+)?$", description="HTTP proxy on the way out")] = ""
    policy: Policy = Policy()
    site: SitePage = SitePage()
    tasks: dict[Name, TaskEntry] = {}
    directory: Path = Field(default=Path(), exclude=True, description="where the file lies; not a key of it")

    @property
    def ranks(self) -> int | Literal["auto"]:
        """Processes of a trainer: what `processes` says, or else as many as this site's own plan asks for."""
        asked = self.parallel.data * self.parallel.model if self.parallel else 0
        return asked or "auto" if self.processes == "auto" else self.processes

    @property
    def key_file(self) -> Path:
        return self.directory / "identity.pem"

    @property
    def ca_file(self) -> Path:
        """The coordinator's CA certificate; where there is none, the machine's own CAs are believed."""
        return self.directory / "ca.pem"


def load_settings(directory: Path) -> Settings:
    """Read a client's directory; raises OperatorError that names every wrong key, with the name it may have meant."""
    path = directory / FILE
    try:
        values = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise OperatorError(f"there is no {path}: enrol this client first") from None
    except OSError as error:
        raise OperatorError(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise OperatorError(f"{path} is not TOML: {error}") from None
    return parse_settings(values, directory, where=str(path))


def parse_settings(values: Mapping[str, Any], directory: Path, *, where: str = FILE) -> Settings:
    """Check settings and make their paths absolute, from the client's directory on."""
    if "directory" in values:
        raise OperatorError(f"{where}: directory is not a key of this file: it is where the file lies")
    directory = directory.absolute()
    try:
        settings = Settings.model_validate({**values, "directory": directory})
    except ValidationError as error:
        raise OperatorError(f"{where}: " + "; ".join(map(str, mistakes(error, Settings)))) from None
    tasks = {
        name: entry.model_copy(update={"reference": absolute_reference(entry.reference, directory)})
        for name, entry in settings.tasks.items()
    }
    return settings.model_copy(update={"workdir": directory / settings.workdir, "tasks": tasks})


def with_tasks(settings: Settings, tasks: Mapping[str, TaskEntry]) -> Settings:
    """The settings with more tasks, whose files are looked for from the current folder on."""
    if twice := sorted(settings.tasks.keys() & tasks.keys()):
        raise OperatorError(f"{FILE} has a task {twice[0]!r} already: change it there, or give this one another name")
    values = settings.model_dump() | {"tasks": {name: entry.model_dump() for name, entry in tasks.items()}}
    found = parse_settings(values, Path.cwd(), where="join").tasks
    return settings.model_copy(update={"tasks": {**settings.tasks, **found}})


def absolute_reference(reference: str, folder: Path) -> str:
    """The same reference to a task, where it names a file with the file's whole path; `folder`: where it is written."""
    if reference.startswith(FLOWER):
        app = reference.removeprefix(FLOWER)
        return FLOWER + (absolute_reference(app, folder) if ":" in app else str(folder / Path(app).expanduser()))
    source, _, name = reference.rpartition(":")
    return f"{folder / Path(source).expanduser()}:{name}" if source.endswith(".py") else reference


def write_settings(settings: Settings) -> Path:
    """Write `client.toml`, as enrolment does; an existing file raises OperatorError, a hand may have edited it."""
    path = settings.directory / FILE
    home = settings.directory  # paths inside it are written as they lie in it, so that it can be moved
    workdir = settings.workdir.relative_to(home) if settings.workdir.is_relative_to(home) else settings.workdir
    settings = settings.model_copy(update={"workdir": workdir})
    values = settings.model_dump(mode="json", exclude_defaults=True)
    lines = [f"{key} = {toml.value(value)}" for key, value in values.items() if not isinstance(value, dict)]
    if "checkpoint_s" not in values:
        field = Settings.model_fields["checkpoint_s"]
        lines.append(f"# checkpoint_s = {toml.value(field.default)}    # {field.description}")
    tables = {"policy": settings.policy.model_dump(mode="json", exclude={"trusted"}) if "policy" in values else {}}
    if settings.parallel:
        tables["parallel"] = settings.parallel.model_dump(mode="json")
    tables["site"] = values.get("site", {})
    tables["policy.trusted"] = dict(settings.policy.trusted)
    for name, entry in settings.tasks.items():
        known = {"dataset"} if entry.dataset == "all" else set[str]()
        tables[f"tasks.{toml.key(name)}"] = entry.model_dump(mode="json", exclude=known)
    for table, rows in tables.items():
        if rows:
            lines += ["", f"[{table}]", *(f"{toml.key(key)} = {toml.value(value)}" for key, value in rows.items())]
    if "policy" not in values:
        lines += [
            "",
            "# What this site takes part in; the coordinator cannot change it. These are the defaults:",
            "# [policy]",
        ]
        for key, field in Policy.model_fields.items():
            if key != "trusted":
                lines.append(f"# {key} = {toml.value(field.default)}    # {field.description}")
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise OperatorError(f"{path} exists already: this client is enrolled") from None
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
    return path
