"""Where a rank stands among those that train together: its place on each axis of the plan.

Ranks are counted with `tensor` running fastest, for it talks most, then `shard`, `data` and `pipeline`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ...protocol.sections import Parallel
from .ranks import Ranks

AXES = ("pipeline", "data", "shard", "tensor")


@dataclass(frozen=True, kw_only=True, slots=True)
class Mesh:
    """A rank's place. sizes, place: by axis, in the order of AXES.

    replica, replicas: which part of the data is this rank's, of how many. Ranks of one replica take the same examples.
    """

    ranks: Ranks
    sizes: tuple[int, ...]

    @staticmethod
    def of(plan: Parallel, ranks: Ranks) -> Mesh:
        """The plan for these ranks; one process alone holds the whole model, whatever the plan says."""
        split = (plan.pipeline, 1, plan.shard, plan.tensor) if ranks.world > 1 else (1, 1, 1, 1)
        pipeline, _, shard, tensor = split
        return Mesh(ranks=ranks, sizes=(pipeline, ranks.world // (pipeline * shard * tensor), shard, tensor))

    def rank_at(self, pipeline: int, data: int, shard: int, tensor: int) -> int:
        _, datas, shards, tensors = self.sizes
        return ((pipeline * datas + data) * shards + shard) * tensors + tensor

    def size(self, axis: str) -> int:
        return self.sizes[AXES.index(axis)]

    def at(self, axis: str) -> int:
        rank = self.ranks.rank
        for name, size in zip(reversed(AXES), reversed(self.sizes), strict=True):
            if name == axis:
                return rank % size
            rank //= size
        raise KeyError(axis)

    @property
    def replicas(self) -> int:
        return self.size("data") * self.size("shard")

    @property
    def replica(self) -> int:
        return self.at("data") * self.size("shard") + self.at("shard")

    @property
    def seats(self) -> Ranks:
        """The replicas as if each were one rank, to share examples among."""
        return Ranks(rank=self.replica, world=self.replicas, device=self.ranks.device)

    @property
    def splits_model(self) -> bool:
        """Whether a rank holds a part of the model only; else DDP does."""
        return self.replicas < self.ranks.world or self.size("shard") > 1

    @property
    def speaks(self) -> bool:
        """Whether what this rank has summed up counts: one rank of a replica has its outputs and tells of them."""
        return self.at("tensor") == 0 and self.at("pipeline") == self.size("pipeline") - 1

    @property
    def seat(self) -> int:
        """Number for what is drawn in the model: the same for ranks that compute the same layers for the same data."""
        return self.at("pipeline") * self.replicas + self.replica

    @property
    def devices(self) -> DeviceMesh:
        """torch's mesh of these ranks; the first time it is a collective, and so are the groups of its axes."""
        return _device_mesh(self.ranks.device.type, self.sizes)

    def along(self, axis: str) -> dist.ProcessGroup:
        """The ranks that differ from this one on the axis alone."""
        return self.devices[axis].get_group()

    def total(self, tensor: Tensor, axis: str) -> Tensor:
        """The tensor, made the sum along an axis in place."""
        if self.size(axis) > 1:
            dist.all_reduce(tensor, group=self.along(axis))
        return tensor

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace floating-point tensors by their mean over the replicas, in place."""
        for tensor in tensors if self.replicas > 1 else ():
            self.total(self.total(tensor, "data"), "shard").div_(self.replicas)


@functools.cache
def _device_mesh(kind: str, sizes: tuple[int, ...]) -> DeviceMesh:
    """Made once: its groups of ranks live as long as the process."""
    mesh: Any = init_device_mesh(kind, sizes, mesh_dim_names=AXES)
    return mesh
