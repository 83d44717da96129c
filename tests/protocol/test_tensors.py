import itertools
import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from murmur.protocol.errors import BadUpdate, OperatorError
from murmur.protocol.tensors import (
    DTYPES,
    Layout,
    TensorSpec,
    check_file,
    map_file,
    masked_layout,
    read_layout,
    write_chunks,
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


# Written by safetensors, read by us, and the other way round


@pytest.mark.parametrize("seed", range(20))
def test_what_safetensors_writes_is_canonical(tmp_path, seed):
    print("seed", seed)
    rng = random.Random(seed)
    letters = 'abcXYZ019._-/ü"\\\n\t\x7f€𝄞'
    names = {"".join(rng.choices(letters, k=rng.randint(1, 12))) for _ in range(rng.randint(1, 30))}
    dtypes = {name: rng.choice(list(TORCH)) for name in names}
    shapes = {name: tuple(rng.randint(0, 3) for _ in range(rng.randint(0, 4))) for name in names}
    tensors = {name: torch.zeros(shapes[name], dtype=TORCH[dtypes[name]]) for name in names}
    buffers = frozenset(name for name in names if rng.random() < 0.3)
    save_file(tensors, tmp_path / "theirs", {"buffers": ",".join(sorted(buffers))} if buffers else None)
    layout = Layout(tuple(TensorSpec(name, dtypes[name], shapes[name]) for name in names), buffers)
    assert (tmp_path / "theirs").read_bytes()[: len(layout.header())] == layout.header()
    assert read_layout(tmp_path / "theirs") == layout
    check_file(tmp_path / "theirs", layout)


def test_a_file_of_ours_is_byte_for_byte_the_one_of_safetensors(tmp_path):
    torch.manual_seed(1)
    tensors = {
        "body.weight": torch.randn(4, 3),
        "body.bias": torch.randn(4, dtype=torch.float64),
        "half": torch.randn(5, dtype=torch.float16),
        "brain": torch.randn(3, dtype=torch.bfloat16),
        "count": torch.tensor(7),
        "mask": torch.tensor([True, False]),
        "none": torch.zeros(0, 4),
    }
    save_file(tensors, tmp_path / "theirs")
    layout = read_layout(tmp_path / "theirs")
    arrays = {k: (v.view(torch.uint16) if v.dtype is torch.bfloat16 else v).numpy() for k, v in tensors.items()}
    write_file(tmp_path / "ours", arrays, layout)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    for name, tensor in load_file(tmp_path / "ours").items():
        assert torch.equal(tensor, tensors[name])
    mapped = map_file(tmp_path / "ours", layout)
    assert {name: (a.shape, a.dtype) for name, a in mapped.items()} == {
        k: (a.shape, a.dtype) for k, a in arrays.items()
    }
    assert all(np.array_equal(mapped[name], arrays[name]) for name in arrays)


def test_mapped_tensors_are_aligned_and_cannot_be_written(tmp_path):
    layout = Layout(tuple(TensorSpec(f"{i}{dtype}", dtype, (i,)) for i, dtype in itertools.product(range(4), DTYPES)))
    arrays = {t.name: np.zeros(t.shape, DTYPES[t.dtype]) for t in layout.tensors}
    write_file(tmp_path / "f", arrays, layout)
    for array in map_file(tmp_path / "f", layout).values():
        assert array.flags.aligned and not array.flags.writeable


def test_a_file_without_tensors_is_its_header(tmp_path):
    write_file(tmp_path / "f", {}, Layout(()))
    assert (tmp_path / "f").read_bytes() == b"\x08" + bytes(7) + b"{}      "
    assert read_layout(tmp_path / "f") == Layout(()) and map_file(tmp_path / "f", Layout(())) == {}


# The layout


def test_a_layout_lies_widest_first_then_by_name():
    layout = Layout((TensorSpec("b", "F16", (1,)), TensorSpec("z", "F32", (1,)), TensorSpec("a", "F32", (1,))))
    assert [t.name for t in layout.tensors] == ["a", "z", "b"]
    assert layout == Layout(tuple(reversed(layout.tensors)))


def test_sizes_can_be_checked_by_hand():
    assert (SMALL.nbytes, SMALL.float_numel, SMALL.integer_numel) == (2 * 3 * 4 + 8, 6, 1)
    assert SMALL.file_bytes == len(SMALL.header()) + 32
    assert len(SMALL.header()) % 8 == 0


def test_an_update_is_wide_and_leaves_booleans_at_home():
    kinds = {
        "F64": "F64",
        "F32": "F32",
        "F16": "F32",
        "BF16": "F32",
        "I64": "I64",
        "I32": "I64",
        "U8": "I64",
        "I8": "I64",
    }
    model = Layout(tuple(TensorSpec(k, k, (2,)) for k in [*kinds, "BOOL"]), frozenset({"I64"}))
    assert {t.name: t.dtype for t in model.update().tensors} == kinds
    assert model.update().buffers == frozenset()
    assert (model.float_numel, model.integer_numel) == (8, 8)
    assert (model.update().float_numel, model.update().integer_numel) == (8, 8)


def test_a_model_of_unsigned_words_is_refused():
    with pytest.raises(OperatorError, match="'u' is U32: make it I64"):
        Layout((TensorSpec("u", "U32", (2,)),)).update()


def test_a_masked_upload_is_the_block_then_the_ring():
    layout = masked_layout(5, 3)
    assert [(t.name, t.dtype, t.shape) for t in layout.tensors] == [("aux", "U64", (3,)), ("ring", "U32", (5,))]


@pytest.mark.parametrize(
    "other",
    [
        Layout((TensorSpec("w", "F32", (3, 2)), TensorSpec("n", "I64", ()))),
        Layout((TensorSpec("w", "F16", (2, 3)), TensorSpec("n", "I64", ()))),
        Layout((TensorSpec("v", "F32", (2, 3)), TensorSpec("n", "I64", ()))),
        Layout((TensorSpec("w", "F32", (2, 3)),)),
        Layout(SMALL.tensors, frozenset({"n"})),
    ],
)
def test_whatever_differs_is_in_the_digest(other):
    assert other.digest() != SMALL.digest()


def test_a_layout_that_no_file_can_have_is_refused():
    with pytest.raises(ValueError, match="stands twice"):
        Layout((TensorSpec("w", "F32", (1,)), TensorSpec("w", "F16", (1,))))
    with pytest.raises(ValueError, match="comma"):
        Layout((TensorSpec("a,b", "F32", (1,)),), frozenset({"a,b"}))


# What differs is said


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((TensorSpec("w", "F32", (2, 3)),), "1 tensors are missing, the first is 'n'"),
        ((*SMALL.tensors, TensorSpec("x", "F32", (1,))), "1 tensors too many, the first is 'x'"),
        ((TensorSpec("w", "F16", (2, 3)), TensorSpec("n", "I64", ())), "'w' has dtype F16, F32 was asked for"),
        (
            (TensorSpec("w", "F32", (3, 2)), TensorSpec("n", "I64", ())),
            r"'w' has shape \[3, 2\], \[2, 3\] was asked for",
        ),
    ],
)
def test_what_differs_is_said(tmp_path, given, words):
    layout = Layout(given)
    write_file(tmp_path / "f", {t.name: np.zeros(t.shape, DTYPES[t.dtype]) for t in layout.tensors}, layout)
    with pytest.raises(BadUpdate, match=words):
        check_file(tmp_path / "f", SMALL)


def test_metadata_that_differs_is_said(tmp_path):
    layout = Layout(SMALL.tensors, frozenset({"n"}))
    write_file(tmp_path / "f", {"w": np.zeros((2, 3), np.float32), "n": np.zeros((), np.int64)}, layout)
    with pytest.raises(BadUpdate, match="metadata differs"):
        check_file(tmp_path / "f", SMALL)


@pytest.mark.parametrize("size", [31, 33])
def test_a_file_of_another_size_is_refused(tmp_path, size):
    (tmp_path / "f").write_bytes(SMALL.header() + bytes(size))
    with pytest.raises(BadUpdate, match=f"a file of {120 + size} bytes, 152 were asked for"):
        check_file(tmp_path / "f", SMALL)


# Writing


def test_chunks_must_add_up(tmp_path):
    with (tmp_path / "f").open("wb") as file:
        write_chunks(file, SMALL, [bytes(20), memoryview(bytes(12))])
    check_file(tmp_path / "f", SMALL)
    with (
        (tmp_path / "f").open("wb") as file,
        pytest.raises(ValueError, match="31 bytes of tensors were given, the layout has 32"),
    ):
        write_chunks(file, SMALL, [bytes(31)])


@pytest.mark.parametrize(
    "arrays",
    [
        {"w": np.zeros((3, 2), np.float32), "n": np.zeros((), np.int64)},
        {"w": np.zeros((2, 3), np.complex64), "n": np.zeros((), np.int64)},
        {"w": np.zeros((2, 3), np.float32), "n": np.zeros((), np.float32)},
        {"w": np.zeros((2, 3), np.float32), "n": np.zeros(1, np.int64)},
    ],
)
def test_an_array_that_is_not_the_layouts_is_refused_and_leaves_no_file(tmp_path, arrays):
    with pytest.raises(ValueError, match="the layout has"):
        write_file(tmp_path / "f", arrays, SMALL)
    assert list(tmp_path.iterdir()) == []


def test_bfloat16_is_given_as_its_bits(tmp_path):
    layout = Layout((TensorSpec("b", "BF16", (1,)),))
    write_file(tmp_path / "f", {"b": np.array([0x3F80], np.uint16)}, layout)
    assert load_file(tmp_path / "f")["b"].item() == 1.0
    with pytest.raises(ValueError, match="BF16"):
        write_file(tmp_path / "f", {"b": np.array([1.0], np.float32)}, layout)


def test_a_file_is_replaced_in_one_step(tmp_path):
    layout = Layout((TensorSpec("w", "F32", (1,)),))
    write_file(tmp_path / "f", {"w": np.float32([1])}, layout)
    with pytest.raises(KeyError):
        write_file(tmp_path / "f", {}, layout)
    assert map_file(tmp_path / "f", layout)["w"][0] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
