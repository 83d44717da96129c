"""What a coordinator process is told, read once at its start.

Flags go before MURMUR_… variables, those before the table [coordinator] of murmur.toml (in the current folder, or where
MURMUR_CONFIG says), that before these defaults.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from ..protocol.errors import OperatorError
from ..protocol.joining import is_loopback
from ..protocol.mistakes import mistakes
from .sinks.settings import SinkSettings

FILE, TABLE = "murmur.toml", "coordinator"


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="MURMUR_", extra="forbid", frozen=True)

    data: Path = Field(default=Path("murmur-data"), description="folder of the database, the blobs and the TLS keys")
    database: str = Field(default="", description="SQLAlchemy URL; empty: SQLite in the data folder")
    blobs: str = Field(default="", description="folder or s3://bucket/prefix of the models; empty: in the data folder")
    host: str = Field(default="127.0.0.1", description="address to listen on")
    port: int = Field(default=8443, ge=0, le=65_535, description="0 takes a free one")
    public_host: str = Field(default="", description="name that agents reach this machine by, when it is not `host`")
    tls_cert: Path | None = Field(default=None, description="PEM chain; with none, an own small CA makes one")
    tls_key: Path | None = Field(default=None, description="key of tls_cert")
    insecure_http: bool = Field(default=False, description="no TLS; taken on loopback only")
    invitation_s: float = Field(default=7 * 86_400, gt=0, description="life of an invitation")
    token_s: float = Field(default=600, gt=0, description="life of an agent's token")
    session_s: float = Field(default=12 * 3600, gt=0, description="life of a login")
    sinks: tuple[SinkSettings, ...] = Field(default=(), description="where runs are told on: files, MLflow, …")

    @classmethod
    def read(cls, **flags: Any) -> Settings:
        """The settings with these flags; None is a flag that was not given. Raises OperatorError for what is wrong."""
        try:
            return cls.model_validate({name: value for name, value in flags.items() if value is not None})
        except ValidationError as error:
            raise OperatorError("settings: " + "; ".join(map(str, mistakes(error, cls)))) from None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, InitSettingsSource(settings_cls, _file())

    def checked(self) -> Settings:
        """Themselves; raises OperatorError for a combination that would be unsafe or cannot work."""
        if self.insecure_http and not is_loopback(self.host):
            raise OperatorError(
                f"--insecure-http is for loopback only, not for {self.host}: it would show every request"
            )
        if bool(self.tls_cert) != bool(self.tls_key):
            raise OperatorError("a certificate needs its key: give both --tls-cert and --tls-key, or neither")
        return self

    @property
    def blobs_location(self) -> str:
        return self.blobs or str(self.data / "blobs")

    @property
    def database_url(self) -> str:
        return self.database or f"sqlite:///{self.data / 'murmur.db'}"


def _file() -> dict[str, Any]:
    """What murmur.toml says of the coordinator; nothing where there is none."""
    asked = os.environ.get("MURMUR_CONFIG")
    path = Path(asked or FILE)
    try:
        values = tomllib.loads(path.read_text())
    except FileNotFoundError:
        if asked:
            raise OperatorError(f"there is no {path}, which MURMUR_CONFIG names") from None
        return {}
    except OSError as error:
        raise OperatorError(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise OperatorError(f"{path} is not TOML: {error}") from None
    table = values.get(TABLE, {})
    if not isinstance(table, dict):
        raise OperatorError(f"{path}: {TABLE} is a table, [{TABLE}]")
    return table
