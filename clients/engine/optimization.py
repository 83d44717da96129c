"""One optimizer step: which optimizer, in which precision, and where a local algorithm comes in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from ...aggregation.optimizers import build
from ...protocol.sections import Train
from .local import Plain

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_precision(asked: str, device: torch.device) -> Precision:
    """What is computed in. "auto" is bf16 where the hardware has it, fp16 on older GPUs, else fp32.

    On a CPU without bf16 instructions autocast is right but was measured 16 times slower than fp32.
    """
    if asked != "auto":
        return asked  # pyright: ignore[reportReturnType]: the recipe allows these three besides "auto"
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if _cpu_has_bf16() else "fp32"


def _cpu_has_bf16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
    except OSError:
        return False
    return bool({"avx512_bf16", "amx_bf16"} & set(flags))


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision != "fp32")


class Parts(Protocol):
    """Parameters that are parts of larger ones, the rest of which other ranks have: see `placement.Placement`."""

    def collect(self) -> None: ...
    def spread_overflow(self) -> None: ...
    def clip(self, limit: float) -> None: ...
    def zero_grad(self) -> None: ...


class Stepper:
    """Carries gradients into weights: unscale, local algorithm, clip, step, forget. `taken` counts what happened.

    kept: tensors of this rank, by name, that decide its further steps beside the optimizer's; a checkpoint has them,
    and is put back into them in place. parts: whose parameters these are, where each rank has a part of the model.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        train: Train,
        local: Plain,
        device: torch.device,
        parts: Parts | None = None,
    ) -> None:
        self.precision: Precision = resolve_precision(train.precision, device)
        self.parameters, self.clip_norm, self.taken = parameters, train.clip_norm, 0
        self.optimizer = build(train.optimizer, parameters, train.lr, train.optimizer_options, foreach=None)
        self.optimizer.register_step_post_hook(self._count)
        self.local = local
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == "fp16")
        self.kept: dict[str, Tensor] = {}
        self.scaler.scale(torch.zeros((), device=device))  # makes its own state, also where no loss is ever scaled
        self._parts = parts
        self._forget()  # a job that was cancelled may have left some

    def _count(self, *_: object) -> None:
        self.taken += 1

    def scaled(self, factor: float, loss: Tensor) -> Tensor:
        """The loss times the factor, and times what keeps half precision from running to zero."""
        return self.scaler.scale(loss * factor)

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def step(self) -> None:
        if self._parts:
            self._parts.collect()
            if self.scaler.is_enabled():
                self._parts.spread_overflow()
        self.scaler.unscale_(self.optimizer)
        self.local.before_step()
        if self.clip_norm:
            if self._parts:
                self._parts.clip(self.clip_norm)
            else:
                nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        self.scaler.step(self.optimizer)  # leaves the step out when fp16 overflowed, on every rank alike
        self.scaler.update()
        self._forget()

    def _forget(self) -> None:
        self.optimizer.zero_grad()
        if self._parts:
            self._parts.zero_grad()
