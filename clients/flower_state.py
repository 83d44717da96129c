"""What a Flower app keeps in its Context from round to round, as a safetensors file: nothing of it is unpickled.

"0"           JSON: the records in order, [name, kind, rows]
"1", "2", …   the bytes of their arrays, as Flower has them
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..protocol.encoding import b64, unb64
from ..protocol.tensors import Layout, TensorSpec, map_file, read_layout, write_file

if TYPE_CHECKING:
    from flwr.app import RecordDict


def write_state(path: Path, state: RecordDict) -> None:
    """Write the records; the file has its name once it is on disk whole."""
    from flwr.app import ArrayRecord, MetricRecord

    records, blobs = list[Any](), [b""]
    for name, record in state.items():
        rows = list[Any]()
        if isinstance(record, ArrayRecord):
            for key, array in record.items():
                rows.append([key, len(blobs), array.dtype, [*array.shape], array.stype])
                blobs.append(array.data)
            records.append([name, "arrays", rows])
        else:
            kind = "metrics" if isinstance(record, MetricRecord) else "config"
            records.append([name, kind, [[key, _plain(value)] for key, value in record.items()]])
    blobs[0] = json.dumps(records).encode()
    arrays = {str(number): np.frombuffer(blob, np.uint8) for number, blob in enumerate(blobs)}
    write_file(path, arrays, Layout(tuple(TensorSpec(name, "U8", a.shape) for name, a in arrays.items())))


def read_state(path: Path) -> RecordDict:
    """The records of such a file, equal to those that were written."""
    from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

    blobs, state = map_file(path, read_layout(path)), RecordDict()
    for name, kind, rows in json.loads(blobs["0"].tobytes()):
        if kind == "arrays":
            record = ArrayRecord()
            for key, number, dtype, shape, stype in rows:
                record[key] = Array(dtype, tuple(shape), stype, blobs[str(number)].tobytes())
            state[name] = record
        else:
            values: dict[str, Any] = {key: _value(value) for key, value in rows}
            state[name] = MetricRecord(values) if kind == "metrics" else ConfigRecord(values)
    return state


def _plain(value: Any) -> Any:
    """A record's value as JSON has it: bytes, which it lacks, as an object."""
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return {"bytes": b64(value)} if isinstance(value, bytes) else value


def _value(value: Any) -> Any:
    if isinstance(value, list):
        return [_value(one) for one in value]
    return unb64(value["bytes"]) if isinstance(value, dict) else value
