"""Static graphs: a model's compiled forms, and its own form where there is none."""

from __future__ import annotations

import logging
from collections.abc import Callable
from time import monotonic
from typing import Any

import torch
from torch import nn

from .ranks import Ranks

log = logging.getLogger(__name__)


class Graphs:
    """A model's compiled forms, by backend, kept from job to job; one at most is on. No tensor changes its name."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._forms: dict[str, Any] = {}  # None: it could not be compiled

    def off(self) -> None:
        self._use(None)

    def on(self, asked: bool | str, ranks: Ranks, rehearse: Callable[[], None]) -> None:
        """Compile the model, the first time, or go on without on every rank, and say why, where that fails on one.

        asked: as train.compile has it. rehearse: one forward and backward pass, as training has them, without exchange.
        """
        backend = "inductor" if asked is True else asked
        if not backend:
            return
        if backend not in self._forms:
            self._forms[backend] = self._compiled(backend, ranks, rehearse)
        self._use(self._forms[backend])

    def _compiled(self, backend: str, ranks: Ranks, rehearse: Callable[[], None]) -> Any:
        began, why, module = monotonic(), "", self.module

        def call(*args: Any, **options: Any) -> Any:
            # A frame that is not torch's: module.compile() passes over a model whose forward is, as nn.Sequential's.
            return module._call_impl(*args, **options)  # pyright: ignore[reportPrivateUsage]: as module.compile() does

        form = torch.compile(call, backend=backend)
        self._use(form)
        try:
            rehearse()
        except Exception as error:  # a mistake of the model's own comes again without the compiler, and is told then
            cause = getattr(error, "inner_exception", error)  # what the compiler's backend met
            why = f"{type(cause).__name__}: {cause}".partition("\n")[0]
        if not ranks.least(float(not why)):
            said = {"backend": backend, "why": why or "another process could not"}
            log.warning("the model could not be compiled and trains as it is", extra=said)
            return None
        log.info("model compiled", extra={"backend": backend, "took_s": round(monotonic() - began, 2)})
        return form

    def _use(self, form: Any) -> None:
        self.module._compiled_call_impl = form  # pyright: ignore[reportPrivateUsage]: nor is there another way back
