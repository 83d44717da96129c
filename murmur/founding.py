"""`murmur coordinator init`: a place for a coordinator, its settings in a file with what they mean."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from murmur.protocol import toml
from murmur.protocol.errors import OperatorError
from murmur.recipes import explained

if TYPE_CHECKING:
    from murmur.coordinator.settings import Settings

HEAD = "# A coordinator's settings. A flag of `serve` and a MURMUR_ variable go before what stands here."


def found(folder: Path) -> tuple[Path, Path]:
    """Write murmur.toml and make the data folder, for this user alone; returns both.

    Raises OperatorError, and writes nothing, where either is there already.
    """
    from murmur.coordinator.settings import FILE, Settings

    path, data = folder / FILE, folder / Settings.model_fields["data"].default
    if data.exists() and (not data.is_dir() or any(data.iterdir())):
        raise OperatorError(f"{data} has something in it already: choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.touch(0o600, exist_ok=False)  # a database's URL may have a password in it
        path.write_text(template(Settings), encoding="utf-8")
        data.mkdir(mode=0o700, exist_ok=True)
    except FileExistsError as error:
        raise OperatorError(f"{error.filename} exists already, and is left as it is: choose another folder") from None
    except OSError as error:
        raise OperatorError(f"cannot write {error.filename}: {error.strerror}") from None
    return path, data


def template(settings: type[Settings]) -> str:
    """The file's text: where the data lie, and every other setting as a comment."""
    return "\n".join(_lines(settings)) + "\n"


def _lines(settings: type[Settings]) -> Iterator[str]:
    from murmur.coordinator.settings import TABLE

    yield from (HEAD, f"[{TABLE}]")
    for name, field in settings.model_fields.items():
        default = "…" if field.default is None else field.default
        shown = toml.value(os.fspath(default) if isinstance(default, Path) else default)
        yield from explained(f"{'' if name == 'data' else '# '}{name} = {shown}", field.description or "")
