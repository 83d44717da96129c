"""An update is checked where it is made, and what is wrong with it is told with the tensor's name."""

import numpy as np
import pytest

from murmur.clients.updates import check_update
from murmur.protocol.errors import BadUpdate
from murmur.protocol.tensors import Layout, TensorSpec, write_file


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("name", "at", "element"), [("c", 0, 0), ("c", 3, 3), ("a", 0, 4), ("a", 5, 9)])
def test_a_value_that_is_not_finite_is_told_with_its_tensor(tmp_path, value, name, at, element):
    """A file has its widest tensors first; b is of integers, so it has no place in the count of elements."""
    specs = (TensorSpec("a", "F32", (2, 3)), TensorSpec("b", "I64", (4,)), TensorSpec("c", "F64", (4,)))
    layout = Layout(specs)
    arrays = {"a": np.zeros((2, 3), np.float32), "b": np.zeros(4, np.int64), "c": np.zeros(4)}
    arrays[name].reshape(-1)[at] = value
    write_file(tmp_path / "update", arrays, layout.update())
    with pytest.raises(BadUpdate, match=rf"element {element} of the update is {value}, in the tensor {name}:"):
        check_update(tmp_path / "update", layout)
    arrays[name].reshape(-1)[at] = 1.0
    write_file(tmp_path / "update", arrays, layout.update())
    check_update(tmp_path / "update", layout)
