"""What a coordinator process is told, read once at its start: flags, then MURMUR_… variables, then these defaults."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from ..protocol.errors import OperatorError
from ..protocol.joining import is_loopback


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="MURMUR_", extra="ignore", frozen=True)

    data: Path = Field(default=Path("murmur-data"), description="folder of the database, the blobs and the TLS keys")
    database: str = Field(default="", description="SQLAlchemy URL; empty: SQLite in the data folder")
    blobs: str = Field(default="", description="folder or s3://bucket/prefix of the models; empty: in the data folder")
    host: str = "127.0.0.1"
    port: int = Field(default=8443, ge=0, le=65_535, description="0 takes a free one")
    public_host: str = Field(default="", description="name that agents reach this machine by, when it is not `host`")
    tls_cert: Path | None = Field(default=None, description="PEM chain; with none, an own small CA makes one")
    tls_key: Path | None = None
    insecure_http: bool = Field(default=False, description="no TLS; taken on loopback only")
    invitation_s: float = Field(default=7 * 86_400, gt=0)
    token_s: float = Field(default=600, gt=0, description="life of an agent's token")
    session_s: float = Field(default=12 * 3600, gt=0, description="life of a login")

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
