"""Models and updates, named by their SHA-256: what has its name is whole and durable.

The files: `contract` says what callers rely on; `folder` keeps blobs in a folder, `s3` in a bucket.
"""

from __future__ import annotations

from pathlib import Path

from ...protocol.errors import OperatorError
from .cache import LIMIT_BYTES
from .contract import Blobs, Swept, hash_file
from .folder import FolderBlobs

__all__ = ["Blobs", "FolderBlobs", "Swept", "hash_file", "open_blobs"]


def open_blobs(location: str | Path, cache: Path, cache_bytes: int = LIMIT_BYTES) -> Blobs:
    """The blobs in a folder, or in `s3://bucket/prefix` with local copies of those in use in the folder `cache`.

    The copies take `cache_bytes` at most, but what was handed out in the last minutes is never deleted.

    For S3, credentials, region and endpoint come from the usual AWS_… environment variables. Raises OperatorError
    for a location of another kind, and where the library for S3 is missing.
    """
    kind, separator, _ = str(location).partition("://")
    if not separator:
        return FolderBlobs(Path(location))
    if kind != "s3":
        raise OperatorError(f"blobs lie in a folder or in s3://bucket/prefix, not in {kind}://…")
    try:
        from .s3 import S3Blobs
    except ModuleNotFoundError as error:
        if error.name != "obstore":
            raise
        raise OperatorError(
            "blobs in S3 need the library obstore, which is not installed: pip install 'murmur[s3]'"
        ) from None
    return S3Blobs(str(location), cache, cache_bytes)
