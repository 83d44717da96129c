from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from murmur.clients.engine.batches import Alike
from murmur.clients.engine.mesh import Mesh
from murmur.clients.engine.placement import piece
from murmur.clients.engine.ranks import Ranks
from murmur.clients.engine.splitting import balanced, blocks, rows, stages, tensor_plan
from murmur.clients.engine.state import built, layout_of
from murmur.clients.engine.unfilled import unfilled
from murmur.clients.task import load_task
from murmur.protocol.sections import Parallel

TASKS = Path(__file__).with_name("plan_tasks.py")


def made(model) -> object:
    class Made:
        def model(self):
            return model()

    return Made()


def test_a_chain_is_cut_where_the_costliest_part_is_cheapest():
    seed = random.randrange(1 << 32)
    print("seed", seed)
    draw = random.Random(seed)
    for _ in range(50):
        costs = [draw.choice([0.0, 1.0, 2.0, 5.0]) for _ in range(draw.randint(3, 8))]
        count = draw.randint(1, len(costs))
        cuts = balanced(costs, count)
        assert cuts[0] == 0 and cuts[-1] == len(costs) and all(a < b for a, b in itertools.pairwise(cuts))

        def worst(cuts, costs=costs):
            return max(sum(costs[a:b]) for a, b in itertools.pairwise(cuts))

        every = itertools.combinations(range(1, len(costs)), count - 1)
        assert worst(cuts) == pytest.approx(min(worst((0, *inner, len(costs))) for inner in every))


def test_a_layer_costs_its_share_of_weights_and_of_operations():
    # Weights alone: 4160, 4160, 160, 145 and 160, so the cut would be behind the first layer. Operations: 8192 in a
    # Linear layer, 18432 in a convolution; with them the first two cost 1.18 of 2 together.
    convolutions = [nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 1, 3, padding=1), nn.Conv2d(1, 16, 3, padding=1)]
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Unflatten(1, (1, 8, 8)), *convolutions)
    first, second = stages(made(lambda: model), model, 2, lambda: torch.randn(2, 64))
    assert [*first, *second] == [*model] and len(first) == 2


@pytest.mark.parametrize("size", [1, 2, 5, 7, 8])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_parts_are_those_of_torch_chunk(size, count):
    whole = torch.arange(size * 6).view(size, 6)
    for index in range(count):
        chunks = whole.chunk(count)
        expected = chunks[index] if index < len(chunks) else whole[:0]
        assert torch.equal(piece(whole, None, (index, count)), expected)
        columns = whole.T.chunk(count, dim=1)
        if index < len(columns):
            assert torch.equal(piece(whole.T, (1, index, count), None), columns[index])
    both = [piece(whole, (1, tensor, 2), (shard, count)) for tensor in range(2) for shard in range(count)]
    assert sum(part.numel() for part in both) == whole.numel()
    assert torch.equal(torch.cat([p.flatten() for p in both]).sort().values, whole.flatten())


@pytest.mark.parametrize("pipeline", [1, 2, 3])
@pytest.mark.parametrize("size", [0, 1, 3, 16])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_example_counts_once_and_every_rank_has_equally_many_pieces(world, size, pipeline):
    for length in (16, 15, 2, 1):
        batch = torch.randperm(100)[:length]
        parts = [Alike(pipeline, size).cut(batch, rank, world, 16) for rank in range(world)]
        assert len({len(part.pieces) for part in parts}) == 1
        counted = [int(i) for part in parts for p, real in zip(part.pieces, part.real, strict=True) for i in p[:real]]
        assert sorted(counted) == sorted(batch.tolist())
        assert all(len(p) for part in parts for p in part.pieces)
        if pipeline > 1:
            assert len({len(p) for part in parts for p in part.pieces}) == 1
            assert len(parts[0].pieces) % pipeline == 0
        if size:
            assert max(len(p) for part in parts for p in part.pieces) <= size


def test_an_unfilled_model_has_the_layout_buffers_and_ties_of_the_full_one():
    task = load_task(f"{TASKS}:Tokens", {})
    empty = unfilled(task)
    assert all(p.is_meta for p in empty.parameters())
    assert empty.head.weight is empty.embed.weight
    assert layout_of(empty) == layout_of(built(task))
    deep = load_task(f"{TASKS}:Deep", {})
    assert torch.equal(unfilled(deep)[3].table, built(deep)[3].table)


def test_a_drawn_buffer_that_does_not_travel_is_drawn_as_everywhere():
    noise = made(_noise)
    assert torch.equal(unfilled(noise).drawn, built(noise).drawn)
    assert unfilled(noise).weight.is_meta


def _noise() -> nn.Module:
    module = nn.Module()
    module.weight = nn.Parameter(torch.randn(3))
    module.register_buffer("drawn", torch.randn(3), persistent=False)
    return module


def test_a_model_that_looks_at_its_weights_is_built_in_full():
    def looks() -> nn.Module:
        layer = nn.Linear(2, 2)
        layer.scale = float(layer.weight.abs().max())
        return layer

    model = unfilled(made(looks))
    assert model.scale == built(made(looks)).scale > 0 and model.weight.is_meta


def test_pairs_of_linear_layers_are_cut_together_and_others_alone():
    pair = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.0), nn.Linear(8, 4))
    odd = nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 4))
    dropping = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 4))
    model = nn.ModuleList([pair, odd, dropping, nn.Linear(4, 4)])
    tied = nn.Linear(4, 4)
    tied.weight = model[3].weight
    model.append(tied)
    found = tensor_plan(made(lambda: model), model, 2)
    assert isinstance(found[pair[0]], ColwiseParallel) and isinstance(found[pair[3]], RowwiseParallel)
    assert found[pair[0]].output_layouts[0].is_shard()
    for layer in (odd[0], odd[2], dropping[0], dropping[2]):
        assert isinstance(found[layer], ColwiseParallel) and found[layer].output_layouts[0].is_replicate()
    assert model[3] not in found and tied not in found


def test_blocks_are_the_layers_of_the_longest_list():
    model = built(load_task(f"{TASKS}:Deep", {}))
    found = blocks(made(lambda: model), model)
    assert found == [model[0], model[1], model[2], model[4], model[5]]  # all that have weights


def test_rows_are_taken_in_every_tensor():
    batch = {"a": torch.arange(6).view(3, 2), "b": (torch.arange(3), "words")}
    cut = rows(batch, 1, 3)
    assert cut["a"].tolist() == [[2, 3], [4, 5]] and cut["b"][0].tolist() == [1, 2] and cut["b"][1] == "words"


def test_a_mesh_counts_each_rank_once_and_its_seats_are_the_data():
    plan = Parallel(shard=2, tensor=2, pipeline=2)
    meshes = [Mesh.of(plan, Ranks(rank=r, world=16, device=torch.device("cpu"))) for r in range(16)]
    places = {tuple(m.at(axis) for axis in ("pipeline", "data", "shard", "tensor")) for m in meshes}
    assert len(places) == 16 and meshes[0].size("data") == 2
    assert [m.rank_at(*(m.at(a) for a in ("pipeline", "data", "shard", "tensor"))) for m in meshes] == [*range(16)]
    assert {m.replica for m in meshes} == {0, 1, 2, 3} and sum(m.speaks for m in meshes) == 4
    assert not Mesh.of(plan, Ranks.alone("cpu")).splits_model
    assert not Mesh.of(Parallel(data=2), Ranks(rank=1, world=2, device=torch.device("cpu"))).splits_model
