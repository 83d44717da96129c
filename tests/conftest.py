"""What all tests share."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine


@pytest.fixture(scope="session", autouse=True)
def migrated_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A new SQLite file begins as a copy of one that the migrations made; a thousand tests would run them again."""
    from murmur.coordinator import store

    migrate, template = store.migrate, tmp_path_factory.mktemp("migrated") / "murmur.db"

    def copy(engine: Engine) -> None:
        file = Path(engine.url.database or "") if engine.dialect.name == "sqlite" else template
        if file != template and not file.exists():
            if not template.exists():
                store.Store(f"sqlite:///{template}", clock=lambda: 0.0).close()
            shutil.copyfile(template, file)
        migrate(engine)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "migrate", copy)
        yield
