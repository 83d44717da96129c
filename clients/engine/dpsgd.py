"""DP-SGD: what one example adds to a step is bounded, and noise covers it.

A step's gradient is (sum over the batch of g * min(1, C / |g|) + N(0, (zC)^2)) / expected batch, where g is an
example's gradient over all parameters, C is dp.clip_norm and z is dp.noise_multiplier. Opacus' hooks compute the g;
norms, sum and noise are taken here, where ranks, pieces of a batch and an empty batch are exact.
Source: Abadi et al. 2016, "Deep Learning with Differential Privacy", arXiv:1607.00133, algorithm 1.

B = examples of a piece, D = elements of all parameters that train
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ...protocol.errors import OperatorError
from ..job import Job
from .batches import move
from .optimization import resolve_precision
from .parts import still
from .randomness import Keystream, derive_seed, seeded
from .session import Session

log = logging.getLogger(__name__)

CHUNK = 1 << 18  # elements that get their noise at a time
SLACK = 1e-6  # of clip_norm: a norm in float32 is not exact, and no example may weigh more than is accounted for
AGREE = 1e-3  # of the largest value: two ways to the same gradient


@contextmanager
def dpsgd(session: Session, job: Job, dataset: Dataset[Any]) -> Generator[DpSgd | None]:
    """DP-SGD for the length of a training, None in other modes; the model is as it was when the block ends.

    Raises OperatorError for a model that DP-SGD cannot train, with the layer's name, and where Opacus is missing.
    """
    if job.dp.mode != "local":
        yield None
        return
    if resolve_precision(job.train.precision, session.ranks.device) == "fp16":
        raise OperatorError(
            'local differential privacy computes in fp32 or bf16: set train.precision = "fp32". With fp16, a single '
            "example decides whether a step is left out"
        )
    before = {name: buffer.clone() for name, buffer in _persistent(session.module)}
    hooks = _hooks(session.module, {*still(session.module, session.parts)})
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Full backward hook is firing")  # a first layer's input has no gradient
            if not session.independent:
                _check_examples(session, dataset)
                _check_buffers(session.module, before)
                session.independent = True
            yield DpSgd(session, job)
        _check_buffers(session.module, before)
    finally:
        hooks.cleanup()
        session.module.zero_grad()


class DpSgd:
    """A training's gradients on one rank: `take` after each piece of a batch, `finish` before the optimizer's step.

    The noise comes from a cryptographic generator with a key of its own for each start of a job; it is drawn and added
    in float64, on rank 0 alone, and the other ranks get what came out.
    """

    def __init__(self, session: Session, job: Job) -> None:
        self.ranks = session.ranks
        self.bound, self.std = job.dp.clip_norm * (1 - SLACK), job.dp.noise_multiplier * job.dp.clip_norm
        self.expected = job.train.batch_size
        self.named = [(name, p) for name, p in session.module.named_parameters() if p.requires_grad]
        sizes = [p.numel() for _, p in self.named]
        self.sum_D = torch.zeros(sum(sizes), device=session.ranks.device)
        spans = zip(accumulate(sizes, initial=0), sizes, strict=False)
        self._parts = [self.sum_D[first : first + size] for first, size in spans]
        self._noise = Keystream(os.urandom(32))

    @torch.no_grad()
    def take(self, examples: int) -> None:
        """Add a piece's examples, each clipped, from the gradients that a backward pass has left with the parameters.

        An example whose gradient is not finite counts as zero: it must not decide how the training ends.
        """
        found = [
            (part, g.reshape(examples, -1))
            for (name, p), part in zip(self.named, self._parts, strict=True)
            if (g := samples(name, p, examples)) is not None
        ]
        squares_B = torch.zeros(examples, device=self.sum_D.device)
        for _, g in found:
            squares_B += torch.linalg.vector_norm(g, dim=1, dtype=torch.float32).square()
        norm_B = squares_B.sqrt()
        finite_B = norm_B.isfinite()
        factor_B = torch.where(finite_B, self.bound / norm_B.clamp(min=self.bound), 0.0)
        broken = not bool(finite_B.all())
        if broken:
            log.warning("gradients that are not finite were left out", extra={"examples": int((~finite_B).sum())})
        for part, g in found:
            part += factor_B @ (g.float().nan_to_num(0.0, 0.0, 0.0) if broken else g.float())
        for _, p in self.named:
            p.grad = p.grad_sample = None  # pyright: ignore[reportAttributeAccessIssue]: Opacus keeps it there

    @torch.no_grad()
    def finish(self) -> None:
        """Leave the step's gradient with the parameters: the sum over ranks, with noise, over the expected batch."""
        self.ranks.sum_to_first(self.sum_D)
        if self.ranks.rank == 0 and self.std:
            for chunk_D in self.sum_D.split(CHUNK):
                noise_D = self._noise.normals(len(chunk_D)).mul_(self.std)
                chunk_D.copy_(chunk_D.double() + noise_D.to(chunk_D.device))
        self.ranks.tell(self.sum_D)
        for (_, p), part in zip(self.named, self._parts, strict=True):
            p.grad = (part / self.expected).to(p.dtype).view_as(p)
        self.sum_D.zero_()


def samples(name: str, parameter: nn.Parameter, examples: int) -> Tensor | None:
    """A parameter's gradients by example, (B, *its shape), as Opacus' hooks left them; None where it was not used."""
    found: Any = getattr(parameter, "grad_sample", None)
    if found is None and parameter.grad is None:
        return None
    if not isinstance(found, Tensor):
        raise OperatorError(
            f"{_layer(name)} of the model has no gradients by example, which local differential privacy needs: its "
            f"parameter {name!r} is used outside of its own layer's forward()"
        )
    if len(found) != examples:
        raise OperatorError(
            f"{_layer(name)} of the model saw {len(found)} rows for {examples} examples. Local differential privacy "
            "bounds what an example adds, so each layer's input must have one row per example, in its first dimension"
        )
    return found


def _hooks(module: nn.Module, frozen: set[nn.Module]) -> Any:
    """Opacus' hooks on a model that it can take; frozen: modules that do not train, nor move what they know."""
    try:
        from opacus.grad_sample import GradSampleHooks
        from opacus.validators import ModuleValidator
    except ImportError:
        raise OperatorError("local differential privacy needs Opacus: pip install 'murmur[dp]'") from None
    for name, layer in module.named_modules():
        if layer in frozen:
            continue
        where = f"the layer {name!r} ({type(layer).__name__})" if name else f"the model ({type(layer).__name__})"
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):  # pyright: ignore[reportPrivateUsage]: all its kinds
            raise OperatorError(
                f"{where} normalizes an example by the others of its batch, so no bound holds for what one example "
                "adds: use GroupNorm, at all clients and in the model that the run starts from"
            )
        check: Any = ModuleValidator.VALIDATORS.get(type(layer))
        if check is not None and (errors := check(layer)):
            raise OperatorError(f"{where} cannot be trained with local differential privacy. Opacus says: {errors[0]}")
        own = dict(layer.named_parameters(recurse=False))
        if any(p.requires_grad for p in own.values()) and (buffers := [n for n, _ in layer.named_buffers()]):
            raise OperatorError(
                f"{where} has parameters and the buffer {buffers[0]!r}: Opacus cannot give gradients by example for it"
            )
    return GradSampleHooks(module, loss_reduction="sum")


def _check_examples(session: Session, dataset: Dataset[Any]) -> None:
    """Raise OperatorError unless the model's gradients by example are right, and each depends on its example alone.

    The first example is trained on twice, in the company of another one each time.
    """
    size: int = len(dataset)  # pyright: ignore[reportArgumentType]: data() has checked it
    module, named = session.module, [(n, p) for n, p in session.module.named_parameters() if p.requires_grad]
    session.train()
    for layer in module.modules():
        if isinstance(layer, nn.modules.dropout._DropoutNd):  # pyright: ignore[reportPrivateUsage]: all its kinds
            layer.eval()
    first: list[dict[str, Tensor]] = []
    for other in range(1, min(3, size)) if size > 1 else [0]:
        with seeded(derive_seed("probe"), session.ranks.device):
            piece = torch.tensor([0, other] if other else [0])
            inputs, target = next(session.batches(dataset, iter([piece]), 0))
            output = module(move(inputs, session.ranks.device))
            loss = session.loss(output, move(target, session.ranks.device))
            try:
                loss.backward()
            except (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError) as error:
                raise OperatorError(f"Opacus cannot compute this model's gradients by example: {error}") from error
        first.append({})
        for name, p in named:
            if (found := samples(name, p, len(piece))) is not None:
                first[-1][name] = found[0].detach().clone()
                grad = p.grad if p.grad is not None else torch.zeros_like(p)
                if not _agree(found.sum(0), grad, grad):
                    raise OperatorError(f"{_layer(name)} of the model: Opacus' gradients by example are not its own")
            p.grad = p.grad_sample = None  # pyright: ignore[reportAttributeAccessIssue]: Opacus keeps it there
    if len(first) == 2:
        one, two = first
        largest = torch.stack([g.abs().max() for g in one.values() if g.numel()]).max()
        for name in one:
            if name not in two or not _agree(one[name], two[name], largest):
                raise OperatorError(
                    f"{_layer(name)} of the model: an example's gradient changes with the others of its batch, so no "
                    "bound holds for what one example adds. Look for a layer, or a loss, that mixes examples"
                )
    session.train()


def _agree(one: Tensor, other: Tensor, scale: Tensor) -> bool:
    largest = float(scale.abs().max()) if scale.numel() else 0.0
    return not one.numel() or not math.isfinite(largest) or float((one - other).abs().max()) <= AGREE * largest + 1e-6


def _persistent(module: nn.Module) -> list[tuple[str, Tensor]]:
    """The model's persistent buffers: what goes with the update has no noise, and what is frozen does not change."""
    state = module.state_dict(keep_vars=True)
    return [(name, buffer) for name, buffer in module.named_buffers() if name in state]


def _check_buffers(module: nn.Module, before: Mapping[str, Tensor]) -> None:
    for name, buffer in _persistent(module):
        if not torch.equal(buffer, before[name]):
            raise OperatorError(
                f"the buffer {name!r} of the model changes in training and would leave without noise: register it with "
                "persistent=False, or do without it"
            )


def _layer(parameter: str) -> str:
    layer = parameter.rpartition(".")[0]
    return f"the layer {layer!r}" if layer else "the top level"
