from __future__ import annotations

import torch

from murmur.clients.engine import optimization
from murmur.clients.engine.optimization import resolve_precision


def test_auto_precision_is_fp32_on_a_cpu_without_bf16_instructions(monkeypatch):
    cpu = torch.device("cpu")
    for has, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(optimization, "_cpu_has_bf16", lambda has=has: has)
        assert resolve_precision("auto", cpu) == expected
        assert resolve_precision("fp16", cpu) == "fp16"


def test_auto_precision_on_a_gpu_is_bf16_where_the_hardware_has_it(monkeypatch):
    for has, expected in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True, has=has: has)
        assert resolve_precision("auto", torch.device("cuda", 0)) == expected
