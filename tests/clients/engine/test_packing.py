from __future__ import annotations

import json

import pytest
import torch

from murmur.clients.engine.packing import packed, unpacked


def test_a_state_comes_back_as_it_was():
    state = {"at": 3, 7: (None, True, 0.5), "tensor": {"dict": [b"\x00\xff", "words"]}, "generator": torch.arange(4)}
    value, tensors = packed(state, "stream")
    assert {name: t.tolist() for name, t in tensors.items()} == {"stream.0": [0, 1, 2, 3]}
    back = unpacked(json.loads(json.dumps(value)), tensors)
    assert torch.equal(back.pop("generator"), state.pop("generator"))
    assert back == state


@pytest.mark.parametrize(("value", "kind"), [({1, 2}, "set"), (object(), "object"), ({(1, 2): 3}, "dict")])
def test_what_is_no_plain_value_is_refused(value, kind):
    with pytest.raises(TypeError, match=f"a {kind} is neither"):
        packed({"state": [value]}, "stream")
