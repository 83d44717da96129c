"""How the replicas of a client keep together: what they exchange, and after how many steps.

Three of the ways are DDP's: gradients are summed in the backward pass, as they are or in half precision (`hook`). The
others are classes here. They all take the same steps through the same examples; world is the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...protocol.errors import OperatorError
from ..job import Job
from .optimization import resolve_precision
from .randomness import derive_seed
from .ranks import Ranks

RANK = 4  # of PowerSGD's matrices: 2 was enough for images and 4 for text in the paper, tables 3, 4 and 7
NARROW = {"bf16": torch.bfloat16, "fp16": torch.float16}

Hook = Callable[[Any], "torch.futures.Future[Tensor]"]  # of a dist.GradBucket


def exchange(job: Job, ranks: Ranks, parameters: Sequence[nn.Parameter]) -> Exchange:
    """The job's way; raises OperatorError for one that cannot be had together with its other settings.

    parameters: those that train.
    """
    reduce = job.parallel.reduce
    if ranks.world == 1 or reduce == "allreduce":
        return Exchange(ranks)
    if job.dp.mode == "local":
        raise OperatorError(
            f'parallel.reduce = "{reduce}" with dp.mode = "local": DP-SGD sums bounded gradients itself, and only '
            'exactly: set parallel.reduce = "allreduce"'
        )
    match reduce:
        case "powersgd":
            if resolve_precision(job.train.precision, ranks.device) == "fp16":
                raise OperatorError(
                    'parallel.reduce = "powersgd" hands on what a step left out, and with it an overflow of fp16, for '
                    'good: set train.precision = "bf16" or "fp32"'
                )
            return PowerSgd(ranks, parameters, derive_seed("powersgd", job.seed, job.round, job.client))
        case "local-sgd":
            return LocalSgd(ranks, parameters, job.parallel.sync_every)
        case "gossip":
            return Gossip(ranks, parameters, job.parallel.sync_every)
        case "gossip-pairs":
            seed = derive_seed("gossip", job.seed, job.round, job.client)
            return Gossip(ranks, parameters, job.parallel.sync_every, pairs=seed)
        case _:
            return Exchange(ranks)


def hook(reduce: str) -> Hook | None:
    """What DDP does with a bucket of gradients in place of an all-reduce; None where it shall do just that.

    torch has such hooks too, but its bf16 one asks for NCCL.
    """
    return partial(_narrowed, NARROW[reduce]) if reduce in NARROW else None


def _narrowed(dtype: torch.dtype, bucket: Any) -> torch.futures.Future[Tensor]:
    whole = bucket.buffer()
    narrow = whole.to(dtype).div_(dist.get_world_size())
    future: Any = dist.all_reduce(narrow, async_op=True)
    return future.get_future().then(lambda done: whole.copy_(done.value()[0]))


class Exchange:
    """Nothing beside what DDP does in the backward pass. The methods are collectives, called by all ranks alike."""

    by_ddp = True  # the backward pass exchanges the gradients
    apart = False  # ranks have different weights between two steps

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.state: dict[str, Tensor] = {}  # of this rank, by name: what decides its further steps, changed in place

    def gradients(self) -> None:
        """After the backward pass of a step's last piece: what each parameter's grad is replaced by."""

    def weights(self, step: int) -> None:
        """After optimizer step `step`, which counts from 1."""

    def finish(self, step: int) -> None:
        """After the last step: every rank has the same weights, bit for bit."""


class PowerSgd(Exchange):
    """Gradients as products of two thin matrices; what that leaves out of one step is added to the next.

    Each matrix M (n, m) becomes P Q^T with P (n, r) and Q (m, r), by one step of power iteration from the last Q; two
    exchanges a step, whatever the model. Tensors that would not get smaller travel exactly, with P.
    Source: Vogels, Karimireddy and Jaggi 2019, "PowerSGD", algorithms 1 and 2, arXiv:1905.13727. It stands here and not
    in one of torch's DDP hooks, because those keep their memory by bucket: it cannot be put back after a kill, and more
    than one bucket ends the process on gloo.
    """

    by_ddp = False

    def __init__(self, ranks: Ranks, parameters: Sequence[nn.Parameter], seed: int) -> None:
        super().__init__(ranks)
        self.parameters = parameters
        self.thin: dict[int, tuple[Tensor, Tensor]] = {}  # by parameter: Q, and what the last step left out
        generator = torch.Generator().manual_seed(seed)
        for index, p in enumerate(parameters):
            n, m = (len(p), p[0].numel()) if p.ndim > 1 and p.numel() else (0, 0)
            r = min(RANK, n, m)
            if (n + m) * r < n * m:
                q = torch.randn(m, r, generator=generator).to(p.device)
                self.thin[index] = q, torch.zeros(n, m, device=p.device)
                self.state |= {f"powersgd.{index}.q": q, f"powersgd.{index}.error": self.thin[index][1]}

    @torch.no_grad()
    def gradients(self) -> None:
        used = [torch.full((1,), float(p.grad is not None), device=p.device) for p in self.parameters]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        for index, (_, error) in self.thin.items():
            error += grads[index].reshape(error.shape)  # from here on M
        exact = [g.float() for index, g in enumerate(grads) if index not in self.thin]
        *means, users = self._mean([*(error @ q for q, error in self.thin.values()), *exact, torch.cat(used)])
        lefts = [torch.linalg.qr(p).Q for p in means[: len(self.thin)]]
        rest = iter(means[len(self.thin) :])
        rights = iter(self._mean([error.T @ p for p, (_, error) in zip(lefts, self.thin.values(), strict=True)]))
        for (q, error), p in zip(self.thin.values(), lefts, strict=True):
            q.copy_(next(rights))
            error -= p @ q.T
        products = iter([p @ q.T for p, (q, _) in zip(lefts, self.thin.values(), strict=True)])
        for index, (p, user) in enumerate(zip(self.parameters, users.tolist(), strict=True)):
            mean = next(products if index in self.thin else rest)
            p.grad = mean.view_as(p).to(p.dtype) if user else None  # nobody used it: no step may be taken with it

    def _mean(self, tensors: list[Tensor]) -> list[Tensor]:
        """Their means over the ranks, by one exchange."""
        if not tensors:
            return []
        flat = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(flat)
        parts = flat.div_(self.ranks.world).split([t.numel() for t in tensors])
        return [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]


class LocalSgd(Exchange):
    """Each rank trains by itself; every `every` steps, and at the end, all take the mean of their weights.

    The optimizer's state (momentum, Adam's moments) and the scale of fp16 stay each rank's own.
    Source: Stich 2019, "Local SGD Converges Fast and Communicates Little", arXiv:1805.09767.
    """

    by_ddp, apart = False, True

    def __init__(self, ranks: Ranks, parameters: Sequence[nn.Parameter], every: int) -> None:
        super().__init__(ranks)
        self.every = every
        self.groups = [[p for p in parameters if p.dtype == dtype] for dtype in {p.dtype: None for p in parameters}]

    def weights(self, step: int) -> None:
        if step % self.every == 0:
            self._each(self._mix, step)

    def finish(self, step: int) -> None:
        if step % self.every:
            self._each(self._average, step)

    @torch.no_grad()
    def _each(self, mix: Callable[[Tensor, int], None], step: int) -> None:
        """The weights as one vector of each dtype, through `mix`, which changes it in place."""
        for group in self.groups:
            flat = torch.cat([p.reshape(-1) for p in group])
            mix(flat, step)
            for p, part in zip(group, flat.split([p.numel() for p in group]), strict=True):
                p.copy_(part.view_as(p))

    def _mix(self, flat: Tensor, step: int) -> None:
        self._average(flat, step)

    def _average(self, flat: Tensor, step: int) -> None:
        dist.all_reduce(flat)
        flat /= self.ranks.world


class Gossip(LocalSgd):
    """The same without a meeting of all: each takes the mean with its neighbours, and all meet once, at the end.

    In a ring the neighbours are the two beside a rank; in pairs it is one, drawn anew each time, and of an odd number
    one rank goes without. Either way the mean over all ranks stays what it was.
    Source of the ring: Lian et al. 2017, "Can Decentralized Algorithms Outperform Centralized Algorithms?",
    arXiv:1705.09056; of the pairs: Boyd et al. 2006, "Randomized Gossip Algorithms", doi:10.1109/TIT.2006.874516.
    """

    def __init__(
        self, ranks: Ranks, parameters: Sequence[nn.Parameter], every: int, *, pairs: int | None = None
    ) -> None:
        """pairs: the seed that they are drawn with; None for a ring."""
        super().__init__(ranks, parameters, every)
        self.pairs = pairs

    def finish(self, step: int) -> None:
        self._each(self._average, step)

    def neighbours(self, step: int) -> list[int]:
        """The ranks that this one averages with after a step, in ascending order."""
        rank, world = self.ranks.rank, self.ranks.world
        if self.pairs is None:
            return sorted({(rank - 1) % world, (rank + 1) % world} - {rank})
        order = torch.randperm(world, generator=torch.Generator().manual_seed(derive_seed(self.pairs, step))).tolist()
        place = order.index(rank) ^ 1
        return [order[place]] if place < world else []

    def _mix(self, flat: Tensor, step: int) -> None:
        others = {peer: torch.empty_like(flat) for peer in self.neighbours(step)}
        if not others:
            return
        sends = [dist.P2POp(dist.isend, flat, peer) for peer in others]
        receives = [dist.P2POp(dist.irecv, other, peer) for peer, other in others.items()]
        for work in dist.batch_isend_irecv(sends + receives):
            work.wait()
        for other in others.values():
            flat += other
        flat /= 1 + len(others)
