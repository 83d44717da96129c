import itertools
import json
import os
import random
import time

import numpy as np
import pytest
import torch

from murmur.protocol.errors import BadUpdate
from murmur.protocol.tensors import (
    DTYPES,
    MAX_HEADER_BYTES,
    Layout,
    TensorSpec,
    check_file,
    read_layout,
    write_file,
)

TORCH = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
SMALL = Layout((TensorSpec("w", "F32", (2, 3)), TensorSpec("n", "I64", ())))


def file_of(tmp_path, header, body=b""):
    """A file with this JSON (padded) as its header."""
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path = tmp_path / "file"
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    return path


def entry(dtype="F32", shape=(2,), at=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(at)}


@pytest.mark.parametrize(
    ("header", "body"),
    [
        (b"", b""),
        (b"null", b""),
        (b"[]", b""),
        (b"5", b""),
        (b'"a"', b""),
        (b"{", b""),
        (b"\xff\xfe\xfd", b""),
        (b"[" * 50_000, b""),
        (b'{"a":' * 50_000, b""),
        ({"a": None}, b""),
        ({"a": []}, b""),
        ({"a": {}}, b""),
        ({"a": entry(dtype="F8")}, bytes(8)),
        ({"a": entry(dtype=["F32"])}, bytes(8)),
        ({"a": entry(dtype={})}, bytes(8)),
        ({"a": entry(dtype=None)}, bytes(8)),
        ({"a": {**entry(), "shape": None}}, bytes(8)),
        ({"a": {**entry(), "shape": "2"}}, bytes(8)),
        ({"a": {**entry(), "shape": 2}}, bytes(8)),
        ({"a": {**entry(), "shape": [2.0]}}, bytes(8)),
        ({"a": {**entry(), "shape": [True, 2]}}, bytes(8)),
        (b'{"a":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,8]}}', bytes(8)),
        (b'{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,8]}}', bytes(8)),
        (b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', bytes(8)),
        (b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}', bytes(8)),
        ({"a": entry(shape=(1 << 63,))}, bytes(8)),
        ({"a": entry(shape=(1 << 62, 1 << 62, 0), at=(0, 0))}, bytes(8)),
        ({"a": entry(shape=(-2,), at=(0, -8))}, b""),
        ({"a": entry(shape=(-1, -2))}, bytes(8)),
        ({"a": entry(shape=(1,) * 65, at=(0, 4))}, bytes(4)),
        ({"a": entry(at=(0, 4))}, bytes(8)),
        ({"a": entry(at=(8, 16))}, bytes(16)),
        ({"a": entry(at=(0, 8)), "b": entry(at=(0, 8))}, bytes(8)),
        ({"a": entry(at=(0, 8)), "b": entry(at=(12, 20))}, bytes(20)),
        ({"b": entry(at=(0, 8)), "a": entry(at=(8, 16))}, bytes(16)),
        ({"a": entry("F32", at=(0, 8)), "b": entry("F64", at=(8, 24))}, bytes(24)),
        (
            b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
            bytes(8),
        ),
        ({"a": {**entry(), "more": 1}}, bytes(8)),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', bytes(8)),
        (b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
        (b'{"\\u0061":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
        ({"__metadata__": None, "a": entry()}, bytes(8)),
        ({"__metadata__": {"buffers": 5}, "a": entry()}, bytes(8)),
        ({"__metadata__": {"buffers": "b,a"}, "a": entry()}, bytes(8)),
        ({"__metadata__": {"format": "pt"}, "a": entry()}, bytes(8)),
        ({"__metadata__": {"buffers": "", "x": "y"}, "a": entry()}, bytes(8)),
        ({"a": entry()}, bytes(7)),
        ({"a": entry()}, bytes(9)),
        ({"a": entry()}, b""),
    ],
    ids=itertools.count(),
)
def test_a_header_that_we_could_not_have_written_is_refused(tmp_path, header, body):
    path = file_of(tmp_path, header, body)
    with pytest.raises(BadUpdate):
        read_layout(path)
    with pytest.raises(BadUpdate):
        check_file(path, SMALL)


@pytest.mark.parametrize(
    "data",
    [b"", b"\x08", bytes(7), bytes(8), b"\xff" * 8, b"\xff" * 16, (MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}"],
    ids=itertools.count(),
)
def test_a_file_too_short_for_its_header_is_refused(tmp_path, data):
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(BadUpdate):
        read_layout(tmp_path / "file")
    with pytest.raises(BadUpdate):
        check_file(tmp_path / "file", SMALL)


def test_a_header_beyond_the_limit_is_not_read(tmp_path):
    with (tmp_path / "file").open("wb") as file:
        file.write((MAX_HEADER_BYTES + 8).to_bytes(8, "little"))
        file.truncate(MAX_HEADER_BYTES + 16)
    with pytest.raises(BadUpdate, match="not a safetensors file"):
        read_layout(tmp_path / "file")


def test_shapes_of_thousands_of_digits_cost_nothing(tmp_path):
    digits = "9" * 4000
    shape = ",".join([digits] * 3000)
    text = f'{{"a":{{"dtype":"F32","shape":[{shape}],"data_offsets":[0,8]}}}}'.encode()
    path = file_of(tmp_path, text, bytes(8))
    began = time.process_time()
    with pytest.raises(BadUpdate, match="at most 64 sizes"):
        read_layout(path)
    assert time.process_time() - began < 5  # to multiply them out takes hours


def test_an_upload_with_many_small_tensors_is_refused_before_it_is_read(tmp_path):
    count = 150_000
    header = "{" + ",".join(f'"{i:06}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(count)) + "}"
    path = file_of(tmp_path, header.encode())
    began = time.process_time()
    with pytest.raises(BadUpdate, match=r"a header of \d+ bytes, 112 were asked for"):
        check_file(path, SMALL)
    assert time.process_time() - began < 0.5


def test_the_words_of_a_refusal_stay_short(tmp_path):
    name = "x" * 3000
    for header in ({name: entry()}, {"a": entry(dtype=name)}):
        path = file_of(tmp_path, header, bytes(8))
        with pytest.raises(BadUpdate) as refused:
            check_file(path, Layout((TensorSpec("a", "F32", (2,)), *SMALL.tensors)))
        assert len(refused.value.detail) < 400


def test_a_thousand_mutated_headers_raise_nothing_but_bad_update(tmp_path):
    seed = int(os.environ.get("MURMUR_TEST_SEED", random.randrange(1 << 32)))
    print("seed", seed)
    rng = random.Random(seed)
    model = Layout(
        (TensorSpec("a.weight", "F32", (4, 3)), TensorSpec("a.bias", "F32", (4,)), TensorSpec("count", "I64", ())),
        frozenset({"count"}),
    )
    write_file(tmp_path / "good", {t.name: np.zeros(t.shape, DTYPES[t.dtype]) for t in model.tensors}, model)
    good, header = (tmp_path / "good").read_bytes(), len(model.header())
    pieces = [
        b"0",
        b"9" * 30,
        b"-",
        b"1e999",
        b"null",
        b"[]",
        b"{}",
        b'"',
        b",",
        b":",
        b"\xff",
        b"\\ud800",
        b"NaN",
        b" ",
    ]
    refused = 0
    for i in range(1000):
        text = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(max(1, min(header, len(text))))
            match rng.randrange(5):
                case 0:
                    text[at : at + 1] = bytes([rng.randrange(256)])
                case 1:
                    text[at : at + 1] = rng.choice(pieces)
                case 2:
                    del text[at : at + rng.randint(1, 9)]
                case 3:
                    text[at:at] = text[at : at + rng.randint(1, 40)]
                case _:
                    del text[rng.randrange(len(text) + 1) :]
        if bytes(text[:header]) == good[:header]:
            continue
        path = tmp_path / "mutated"
        path.write_bytes(text)
        for check in (lambda: check_file(path, model), lambda: read_layout(path)):  # noqa: B023  called at once
            try:
                found = check()
            except BadUpdate:
                refused += 1
            else:
                # Read, then it is the canonical file of some other layout; as an update to this model it never passes.
                assert found is not None and found.header() == bytes(text[: len(found.header())]) and found != model, i
    assert refused > 1500
