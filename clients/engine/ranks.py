"""The processes that train together, as one of them sees it: its number, its device, and what it asks the others."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import torch
import torch.distributed as dist
from torch import Tensor

from ...protocol.errors import OperatorError
from ..places import Place

Store = dist.Store  # pyright: ignore[reportPrivateImportUsage]: documented
AGREE_EVERY_S = 0.25  # how soon a stop takes effect, against one small collective each time


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """Rank `rank` of `world`. Methods are collectives: every rank calls them, in the same order.

    local: its number among those on its machine.
    """

    rank: int
    world: int
    device: torch.device
    local: int = 0

    @staticmethod
    def alone(device: str | None = None) -> Ranks:
        """One process by itself, on a GPU where there is one; torch.distributed is not touched."""
        found = device or ("cuda:0" if torch.cuda.is_available() else "cpu")
        return Ranks(rank=0, world=1, device=torch.device(found))

    @staticmethod
    def join(rank: int, world: int, rendezvous: Path) -> Ranks:
        """Meet the other ranks through a file that all see; gloo between CPUs, NCCL between GPUs, one rank on each.

        Raises OperatorError when there are GPUs but fewer than ranks.
        """
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if gpus and world > gpus:
            raise OperatorError(f"{world} processes on {gpus} GPUs: one GPU serves one process, set processes = {gpus}")
        device = _device(rank)
        if world > 1:
            store = dist.FileStore(str(rendezvous), world)  # pyright: ignore[reportPrivateImportUsage]: documented
            _meet(store, rank, world, device, one_machine=True)
        return Ranks(rank=rank, world=world, device=device, local=rank)

    @staticmethod
    def gather(place: Place, store: Store) -> Ranks:
        """Meet ranks that a launcher has started, on several machines perhaps.

        Raises OperatorError where a machine has fewer GPUs than ranks.
        """
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if 1 < gpus < place.here:  # one may be what the launcher lets this rank see
            raise OperatorError(f"{place.here} processes on {gpus} GPUs of a machine: one GPU serves one process")
        device = _device(place.local if gpus > 1 else 0)
        _meet(store, place.rank, place.world, device, one_machine=place.host in ("localhost", "127.0.0.1", "::1"))
        return Ranks(rank=place.rank, world=place.world, device=device, local=place.local)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Element-wise float64 sums over the ranks."""
        if self.world == 1 or not values:
            return [float(v) for v in values]
        total = torch.tensor([float(v) for v in values], dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def least(self, value: float) -> float:
        """The smallest of the ranks' values."""
        if self.world == 1:
            return value
        smallest = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
        return float(smallest)

    def secret(self) -> bytes:
        """32 random bytes from the operating system, the same on every rank; no seed of a run tells them."""
        key = os.urandom(32)
        if self.world == 1:
            return key
        shared = torch.frombuffer(bytearray(key), dtype=torch.uint8)
        dist.broadcast(shared, src=0)
        return shared.numpy().tobytes()

    def sum_to_first(self, tensor: Tensor) -> None:
        """Make rank 0's tensor the sum of the ranks', in place; those of the others are worth nothing afterwards."""
        if self.world > 1:
            dist.reduce(tensor, dst=0)

    def tell(self, tensor: Tensor) -> None:
        """Make every rank's tensor that of rank 0, bit for bit, in place."""
        if self.world > 1:
            dist.broadcast(tensor, src=0)

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace floating-point tensors by their mean over the ranks, in place."""
        if self.world == 1:
            return
        for tensor in tensors:
            dist.all_reduce(tensor)
            tensor.div_(self.world)


def _device(number: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    return device


def _meet(store: Store, rank: int, world: int, device: torch.device, *, one_machine: bool) -> None:
    if one_machine and Path("/sys/class/net/lo").exists():
        # gloo's own guess asks the host's name, which need not resolve.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)


class Wish:
    """Lets rank 0's wish take effect on every rank at the same step: to stop, so that none waits for one that left.

    Rank 0 asks at a pace of AGREE_EVERY_S and tells the others at which step it asks next. done: steps that were done
    before, by processes that are gone.
    """

    def __init__(self, ranks: Ranks, wished: Callable[[], bool], done: int = 0) -> None:
        self.ranks, self.wished = ranks, wished
        self.next, self.asked_at, self.asked_step = done + 1, monotonic(), done

    def agreed(self, step: int) -> bool:
        """Whether all do it before `step`; called with the same steps on every rank."""
        if self.ranks.world == 1:
            return self.wished()
        if step < self.next:
            return False
        now = monotonic()
        step_s = (now - self.asked_at) / max(1, step - self.asked_step)
        # At most twice the last distance: the first steps of a job are slow and would put the next question far off.
        ahead = max(1, min(int(AGREE_EVERY_S / max(step_s, 1e-6)), 2 * (step - self.asked_step)))
        word = torch.tensor([int(self.wished()), step + ahead])
        dist.broadcast(word, src=0)
        granted, self.next = (int(x) for x in word)
        self.asked_at, self.asked_step = now, step
        return bool(granted)


def out_of_memory(error: BaseException) -> bool:
    """torch has a class for GPUs only; of the machine's memory it speaks in words."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
