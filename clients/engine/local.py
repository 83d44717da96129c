"""Local algorithms as hooks: what is done with gradients beside the optimizer's steps, and what is sent in the end.

A hook is made when the model holds the round's version. `before_step` is called once for each optimizer step, when
gradients are summed over ranks and pieces and are unscaled, and before they are clipped: on every rank alike, and on
what each rank holds of a parameter. `finish` is called once on every rank, with the steps that really happened: those
that fp16 left out are not among them, and those before a kill are.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...aggregation.local import CONTROL, controls
from ...protocol.errors import BadUpdate, OperatorError
from ...protocol.sections import Train
from ...protocol.tensors import Layout, check_file, read_layout
from ..job import Job
from .state import map_tensors

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a local algorithm adds to the update.

    tensors: by name, what tensors of the version that are not the model's have become. own: what the site keeps for
    its next round. scale: of the parameters' difference. effective_steps: as in `Result`.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    own: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    scale: float = 1.0
    effective_steps: float = 0.0


class Plain:
    """FedAvg's: the optimizer's steps and nothing else; the others begin here."""

    def __init__(self, named: Mapping[str, nn.Parameter]) -> None:
        """named: the parameters that train."""
        self.named = named
        self.weights = [shard(p.detach()) for p in named.values()]

    def before_step(self) -> None: ...

    def finish(self, steps: int) -> Outcome:
        """steps: optimizer steps taken."""
        return Outcome()


class Proximal(Plain):
    """FedProx's pull toward the round's version: adds the gradient of mu/2 * |w - anchor|^2 to the gradients.

    On the gradients, once a step, rather than in the loss: no graph, and with accumulation no repetition.
    Source: Li et al. 2020, "Federated Optimization in Heterogeneous Networks", arXiv:1812.06127.
    """

    def __init__(self, named: Mapping[str, nn.Parameter], mu: float) -> None:
        super().__init__(named)
        self.mu = mu
        self.anchors = [w.clone() for w in self.weights]

    @torch.no_grad()
    def before_step(self) -> None:
        trios = zip(self.named.values(), self.weights, self.anchors, strict=True)
        live = [(shard(p.grad), w, anchor) for p, w, anchor in trios if p.grad is not None]
        if live:
            grads, weights, anchors = (list(column) for column in zip(*live, strict=True))
            # torch's own optimizers are built on these; the public names have no multi-tensor form.
            torch._foreach_add_(grads, weights, alpha=self.mu)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]: see above
            torch._foreach_sub_(grads, anchors, alpha=self.mu)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]: see above


class Scaffold(Plain):
    """SCAFFOLD's control variates, option II: steps along g + c - c_i, where c_i is this client's mean gradient.

    x is the version and y what K steps of rate lr made of it, so (x - y) / (K lr) is the mean of g + c - c_i:

        what c is told       c_i' - c_i  =  (x - y) / (K lr) - c
        what the site keeps  c_i'        =  (x - y) / (K lr) - (c - c_i)

    Both hold for SGD without momentum and clipping only. The version brings c, the client's last round left c_i.
    Source: Karimireddy et al. 2020, "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", algorithm 1,
    arXiv:1910.06378.
    """

    def __init__(self, named: Mapping[str, nn.Parameter], job: Job, layout: Layout) -> None:
        """layout: of the version's file."""
        super().__init__(named)
        self.lr = job.train.lr
        self.version = map_tensors(job.model, layout)
        self.own = _own(job, layout)
        self.correction = {
            name: (self.version[CONTROL + name] - self.own[CONTROL + name]).to(p.device) for name, p in named.items()
        }

    @torch.no_grad()
    def before_step(self) -> None:
        for p in self.named.values():
            if p.grad is None:  # it was not used: its gradient is zero, and the others' gradients move it all the same
                p.grad = torch.zeros_like(p)
        grads = [shard(p.grad) for p in self.named.values() if p.grad is not None]
        torch._foreach_add_(grads, list(self.correction.values()))  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]: as in Proximal

    @torch.no_grad()
    def finish(self, steps: int) -> Outcome:
        after = {name: tensor for name, tensor in self.version.items() if name.startswith(CONTROL)}
        if not steps:  # fp16 left all of them out: nothing was learned of the gradient
            return Outcome(tensors=after, own=self.own)
        own = dict(self.own)
        for (name, correction), y in zip(self.correction.items(), self.weights, strict=True):
            x, control = self.version[name].to(y.device), CONTROL + name
            mean = (x.to(correction.dtype) - y.to(correction.dtype)) / (steps * self.lr)
            after[control] = mean  # what is sent is the difference to c
            own[control] = (mean - correction).cpu()
        return Outcome(tensors=after, own=own)


class Normalized(Plain):
    """FedNova's: the update is sent per effective step, so that clients with more steps pull no harder.

    K steps of SGD add up to lr * G a, with one weight in a for each gradient in G; the update is divided by the sum of
    a, which without momentum is K.
    Source: Wang et al. 2020, "Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization",
    section 4 and appendix C, arXiv:2007.07481.
    """

    def __init__(self, named: Mapping[str, nn.Parameter], train: Train) -> None:
        super().__init__(named)
        self.train = train

    def finish(self, steps: int) -> Outcome:
        effective = effective_steps(steps, self.train)
        return Outcome(scale=1 / effective if effective else 1.0, effective_steps=effective)


def effective_steps(steps: int, train: Train) -> float:
    """How far so many steps of SGD go along a gradient of one, at a rate of one: the sum of FedNova's a."""
    options = train.optimizer_options
    momentum, fresh = float(options.get("momentum", 0)), 1 - float(options.get("dampening", 0))
    nesterov = bool(options.get("nesterov", False))
    if not momentum:
        return float(steps)
    buffer = total = 0.0
    for step in range(steps):
        buffer = momentum * buffer + (fresh if step else 1)  # torch dampens no first gradient
        total += 1 + momentum * buffer if nesterov else buffer
    return total


def local_algorithm(job: Job, named: Mapping[str, nn.Parameter], *, personal: bool) -> Plain:
    """The job's local algorithm, on a model that holds the job's version.

    named: the parameters that travel, which are what it is about. personal: others stay at the site and train as well.
    """
    layout = read_layout(job.model)
    if bool(controls(layout)) != (job.algorithm == "scaffold"):
        has = "has" if controls(layout) else "lacks"
        raise OperatorError(f"the run's model {has} control variates, and its algorithm is {job.algorithm!r}")
    if job.algorithm == "scaffold":
        if job.parallel.local:
            raise OperatorError(
                f'parallel.reduce = "{job.parallel.reduce}" of this site lets processes go apart, and SCAFFOLD reads '
                'the mean gradient off the update: set it to "allreduce" in client.toml'
            )
        if personal:
            raise OperatorError("SCAFFOLD keeps control variates for all that trains: give the task no `local` parts")
        return Scaffold(named, job, layout)
    if job.algorithm == "fednova":
        return Normalized(named, job.train)
    return Proximal(named, job.mu) if job.mu else Plain(named)


def shard(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: all of it, or of a DTensor its own part, in the same memory."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]: a DTensor's


def _own(job: Job, version: Layout) -> dict[str, Tensor]:
    """The client's own control variates from its last round, zero before the first."""
    layout = own_layout(version)
    if job.own is None:
        return {t.name: torch.zeros(t.shape, dtype=torch.float64 if t.dtype == "F64" else None) for t in layout.tensors}
    try:
        check_file(job.own, layout)
    except BadUpdate as error:
        # Not taken for zero: the server's c keeps what this client once added to it, and would stay off by that.
        raise OperatorError(
            f"the control variates that this site keeps of the run cannot be used ({error.detail}). They lie in "
            f"{job.own.name}: bring it back from a copy, or delete it and start the run anew"
        ) from None
    return map_tensors(job.own, layout)


def own_layout(version: Layout) -> Layout:
    """Layout of what a site keeps for SCAFFOLD."""
    return Layout(controls(version))
