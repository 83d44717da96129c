"""Tensors on the wire and on disk: safetensors files whose header is known before the first byte is read.

The format alone protects nobody: a small file may declare a million tensors, names twice, or NaN. So the side that
receives knows the `Layout` it asked for, derives the one header that file may have, and compares bytes. Only numpy is
needed here; bfloat16, which numpy lacks, is held as uint16.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from .encoding import canonical_json, sha256_hex
from .errors import BadUpdate, OperatorError

MAX_HEADER_BYTES = 16 << 20  # 100,000 tensors with long names; safetensors itself allows 100 MB
DTYPES: dict[str, np.dtype[Any]] = {  # in the order in which safetensors itself writes them: widest first
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "BF16": np.dtype("<u2"),
    "F16": np.dtype("<f2"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
MAX_DIMENSIONS = 64
_SHA256 = re.compile(r"[0-9a-f]{64}")
_RANK = {name: rank for rank, name in enumerate(DTYPES)}
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
INTEGERS = frozenset({"I64", "I32", "I16", "I8", "U8"})


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor's name, safetensors dtype and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPES[self.dtype].itemsize


@dataclass(frozen=True, slots=True)
class Layout:
    """The tensors of a file in the order they lie in it; `buffers` names those that do not train.

    base: of a model whose frozen tensors do not travel, their SHA-256 in hex, which all its clients' must have.
    The order is the one that safetensors writes: by dtype, widest first, then by name. So every tensor is aligned, and
    a file written by safetensors itself (with the same metadata) is already canonical.
    """

    tensors: tuple[TensorSpec, ...]
    buffers: frozenset[str] = frozenset()
    base: str = ""

    def __post_init__(self) -> None:
        if len({t.name for t in self.tensors}) != len(self.tensors):
            raise ValueError("a tensor's name stands twice in the layout")
        if any("," in name for name in self.buffers):
            raise ValueError("a buffer's name has a comma in it, which separates names in the header")
        if self.base and not _SHA256.fullmatch(self.base):
            raise ValueError("the base is named by a SHA-256 in hex")
        object.__setattr__(self, "tensors", tuple(sorted(self.tensors, key=lambda t: (_RANK[t.dtype], t.name))))

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    @property
    def file_bytes(self) -> int:
        """Size of a file with this layout, header and all."""
        return len(self.header()) + self.nbytes

    def header(self) -> bytes:
        """The one header that a file of this layout may have: 8 bytes of length, JSON, padding to 8."""
        offset = 0
        entries: dict[str, Any] = {}
        if facts := self._facts():
            entries["__metadata__"] = facts
        for t in self.tensors:
            entries[t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [offset, offset + t.nbytes]}
            offset += t.nbytes
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def _facts(self) -> dict[str, str]:
        """What the header says beside the tensors; what is not there leaves no trace, as in files of release 0.1.0."""
        facts = {"base": self.base, "buffers": ",".join(sorted(self.buffers))}
        return {name: value for name, value in facts.items() if value}

    def digest(self) -> str:
        """SHA-256 that names this layout; both sides of secure aggregation put it into the key derivation."""
        rows = [[t.name, t.dtype, list(t.shape)] for t in self.tensors]
        base = {"base": self.base} if self.base else {}
        return sha256_hex(canonical_json({"tensors": rows, "buffers": sorted(self.buffers)} | base))

    def update(self, wire: Literal["fp32", "bf16"] = "fp32") -> Layout:
        """Layout of a plain update to a model of this layout.

        Floating point travels as F32, or as BF16 where `wire` says so (F64 stays F64), integers as I64, and BOOL
        tensors do not travel: they keep the value that the run started with. Raises OperatorError for a model with
        U16, U32 or U64 tensors, on which torch itself hardly computes.
        """
        if unsigned := next((t for t in self.tensors if t.dtype in {"U16", "U32", "U64"}), None):
            raise OperatorError(
                f"the model's tensor {unsigned.name!r} is {unsigned.dtype}: make it I64, or leave it out"
            )
        sent = {"F64": "F64"} | {name: "I64" for name in INTEGERS}
        narrow = "BF16" if wire == "bf16" else "F32"
        kept = (t for t in self.tensors if t.dtype != "BOOL")
        return Layout(tuple(TensorSpec(t.name, sent.get(t.dtype, narrow), t.shape) for t in kept))

    @property
    def float_numel(self) -> int:
        """Elements of all floating-point tensors: the dimension D of a masked update."""
        return sum(t.numel for t in self.tensors if t.dtype in FLOATS)

    @property
    def widest_float(self) -> str:
        """The numpy dtype that loses nothing of a mean update which the server's step would keep."""
        return "f8" if any(t.dtype == "F64" for t in self.tensors) else "f4"

    @property
    def integer_numel(self) -> int:
        """Elements of all integer tensors: they travel in a masked update's 64-bit block."""
        return sum(t.numel for t in self.tensors if t.dtype in INTEGERS)


def read_layout(path: Path) -> Layout:
    """The layout that a file's header declares, checked against the file's size.

    Raises BadUpdate for anything that `Layout.header` could not have written: unknown dtypes, holes, overlaps,
    repeated or unsorted names, a size that does not fit. The tensors themselves are not read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise BadUpdate(f"not a safetensors file: a header of {length} bytes in a file of {size}")
        text = file.read(length)
    try:
        entries: dict[str, Any] = json.loads(text)
        facts = entries.pop("__metadata__", {})
        specs = [TensorSpec(name, e["dtype"], _shape(e["shape"])) for name, e in entries.items()]
        buffers = frozenset[str](filter(None, facts.get("buffers", "").split(",")))
        layout = Layout(tuple(specs), buffers, facts.get("base", ""))
        matches = layout.header() == head + text
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadUpdate(f"not a safetensors header: {_short(error)}") from None
    if not matches or size != layout.file_bytes:
        raise BadUpdate(
            "the header is not the canonical one for its tensors: by dtype and name, without holes, padded to 8"
        )
    return layout


def _shape(value: Any) -> tuple[int, ...]:
    # Bounds before any arithmetic: the product of a few thousand numbers of 4,000 digits takes hours.
    if len(value) > MAX_DIMENSIONS or not all(type(d) is int and 0 <= d < 1 << 63 for d in value):
        raise ValueError(f"a shape is a list of at most {MAX_DIMENSIONS} sizes")
    return tuple(value)


def _short(value: object) -> str:
    text = repr(value)  # it may quote a name as long as the header
    return text if len(text) <= 200 else text[:200] + "…"


def check_file(path: Path, layout: Layout) -> None:
    """Raise BadUpdate, saying what differs, unless the file has exactly this layout, byte for byte in its header."""
    expected, size = layout.header(), path.stat().st_size
    with path.open("rb") as file:
        head = file.read(len(expected))
    if head == expected:
        if size != layout.file_bytes:
            raise BadUpdate(f"a file of {size} bytes, {layout.file_bytes} were asked for")
        return
    length = int.from_bytes(head[:8], "little")
    if length > 2 * len(expected) + 4096:  # reading it would cost seconds, and nobody here writes such a header
        raise BadUpdate(f"a header of {length} bytes, {len(expected) - 8} were asked for")
    raise BadUpdate(_difference(read_layout(path), layout))


def _difference(got: Layout, want: Layout) -> str:
    got_by, want_by = {t.name: t for t in got.tensors}, {t.name: t for t in want.tensors}
    if missing := sorted(want_by.keys() - got_by.keys()):
        return f"{len(missing)} tensors are missing, the first is {_short(missing[0])}"
    if extra := sorted(got_by.keys() - want_by.keys()):
        return f"{len(extra)} tensors too many, the first is {_short(extra[0])}"
    for name, w in want_by.items():
        g = got_by[name]
        if g.dtype != w.dtype:
            return f"{name!r} has dtype {g.dtype}, {w.dtype} was asked for"
        if g.shape != w.shape:
            return f"{name!r} has shape {list(g.shape)}, {list(w.shape)} was asked for"
    return "the header's metadata differs"


def map_file(path: Path, layout: Layout) -> dict[str, np.ndarray[Any, Any]]:
    """The tensors of a checked file as read-only arrays over the mapped file; nothing is copied."""
    offset = len(layout.header())
    found: dict[str, np.ndarray[Any, Any]] = {}
    raw = np.memmap(path, dtype=np.uint8, mode="r") if layout.nbytes else np.empty(offset, np.uint8)
    for t in layout.tensors:
        found[t.name] = raw[offset : offset + t.nbytes].view(DTYPES[t.dtype]).reshape(t.shape)
        offset += t.nbytes
    return found


def write_chunks(file: BinaryIO, layout: Layout, chunks: Iterable[memoryview | bytes]) -> None:
    """Write a file of this layout from the tensors' bytes as they come, in order; the count of bytes is checked."""
    file.write(layout.header())
    written = sum(file.write(chunk) for chunk in chunks)
    if written != layout.nbytes:
        raise ValueError(f"{written} bytes of tensors were given, the layout has {layout.nbytes}")


def write_file(path: Path, arrays: Mapping[str, np.ndarray[Any, Any]], layout: Layout) -> None:
    """Write arrays as a file of this layout, under a temporary name first, so that a half file never has the name.

    Raises ValueError for an array of another shape, or of a dtype that does not become the layout's without loss of
    kind: bfloat16 is given as its bits, in uint16.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write_chunks(file, layout, (_bytes_of(arrays[t.name], t) for t in layout.tensors))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _bytes_of(array: np.ndarray[Any, Any], spec: TensorSpec) -> memoryview:
    wanted = DTYPES[spec.dtype]
    casting = "equiv" if spec.dtype == "BF16" else "same_kind"
    if array.shape != spec.shape or not np.can_cast(array.dtype, wanted, casting):
        raise ValueError(
            f"{spec.name!r} is {array.dtype} {list(array.shape)}, the layout has {spec.dtype} {list(spec.shape)}"
        )
    return np.ascontiguousarray(array, wanted).reshape(-1).view(np.uint8).data


def masked_layout(dim: int, aux: int, ring_bits: int = 32) -> Layout:
    """Layout of a masked upload: `dim` ring elements of 16, 24 or 32 bits and an auxiliary block of `aux` of 64.

    Elements of 24 bits are three bytes each, the lowest first.
    """
    dtype, numel = {16: ("U16", dim), 24: ("U8", 3 * dim), 32: ("U32", dim)}[ring_bits]
    return Layout((TensorSpec("aux", "U64", (aux,)), TensorSpec("ring", dtype, (numel,))))
