"""An audit: one simulated run with canaries in it, and how well its final model tells which of them took part.

Canaries are examples or clients. An example is one of a client's own, its input's elements shuffled and its target
another's: nothing but memory makes its loss small. A client is an additional one whose update is a random direction of
its own, as in Andrew et al. 2023, "One-shot Empirical Privacy Estimation for Federated Learning", arXiv:2302.03098.

    M = canaries, D = parameters that train
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset, default_collate

from ..clients.engine.randomness import derive_seed
from ..clients.task import Task, at_home, optional
from ..privacy.audit import Array, Finding, audit
from ..protocol.errors import OperatorError
from ..protocol.recipe import Recipe, parse_recipe
from .federation import Federation, as_federation, find_federation
from .history import History, Round
from .running import simulate

Unit = Literal["example", "client"]
Pair = tuple[Any, Any]
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Audit:
    """What an audit found: `finding` has the bound, `included` is how many of the canaries took part."""

    unit: Unit
    included: int
    finding: Finding
    history: History


def audit_run(
    federation: Any,
    recipe: Recipe | None = None,
    *,
    unit: Unit = "example",
    canaries: int = 200,
    examples: int = 50,
    clients: int | None = None,
    rounds: int | None = None,
    seed: int = 0,
    delta: float = 1e-5,
    confidence: float = 0.95,
    secure: bool = False,
    options: Mapping[str, Any] | None = None,
    on_round: Callable[[Round], None] | None = None,
) -> Audit:
    """Run the recipe once over the federation with canaries in it, everybody taking part in every round.

    federation, recipe, clients, options: as `simulate` takes them. examples: of its own that each client trains on, at
    most; few make an audit quick, and memorizing easy. seed: of coins and canaries; the run itself has the recipe's.
    With unit "client" all clients weigh the same, for a direction of one example would have no weight beside them.
    Raises OperatorError for what cannot be audited.
    """
    if isinstance(federation, str | Path):
        made, found = find_federation(str(federation), clients, options)
    else:
        made, found = as_federation(federation, clients, options), None
    settled = recipe or found or parse_recipe({"name": "audit", "task": "audit"})
    rng = np.random.default_rng(seed)
    included_M = rng.random(canaries) < 0.5
    if unit == "example":
        plan: _Examples | _Clients = _Examples(made, included_M, rng, examples)
    else:
        settled = settled.model_copy(update={"strategy": settled.strategy.model_copy(update={"weighting": "uniform"})})
        plan = _Clients(made, included_M, seed, examples, settled)
    with TemporaryDirectory(prefix="murmur-audit-") as folder:
        history = simulate(
            plan.clients, settled, rounds=rounds, cohort=0, secure=secure, on_round=on_round, folder=folder
        )
        scores_M = plan.scores(load_file(Path(folder) / "version-0.safetensors"), history.state_dict())
    if not np.isfinite(scores_M).all():
        raise OperatorError("the run diverged, its final model scores nothing: lower train.lr")
    finding = audit(scores_M, included_M, delta=delta, confidence=confidence)
    return Audit(unit=unit, included=int(included_M.sum()), finding=finding, history=history)


class _Examples:
    """Canaries that are examples, as many at each client; those that the coins leave out train nowhere."""

    def __init__(self, federation: Federation, included_M: Array, rng: np.random.Generator, examples: int) -> None:
        self._task = federation.task(federation.ids[0])
        self._canaries: dict[int, Pair] = {}
        self.clients: dict[str, Task] = {}
        for k, client in enumerate(federation.ids):
            task, mine = federation.task(client), range(k, len(included_M), len(federation))
            train = _train_data(task, client)
            if len(train) <= len(mine):
                raise OperatorError(
                    f"{client} has {len(train)} examples, which leaves none beside {len(mine)} canaries"
                )
            order = rng.permutation(len(train)).tolist()
            taken = [train[i] for i in order[: len(mine)]]
            targets = _dealt_anew([y for _, y in taken])
            for m, (x, _), target in zip(mine, taken, targets, strict=True):
                self._canaries[m] = (_shuffled(x, rng), target)
            own = [train[i] for i in order[len(mine) : len(mine) + examples]]
            self.clients[client] = _With(task, own + [self._canaries[m] for m in mine if included_M[m]])

    @torch.no_grad()
    def scores(self, first: Tensors, last: Tensors) -> Array:
        """(M,): less loss in the final model, likelier in."""
        model = self._task.model()
        model.load_state_dict(last)
        model.eval()
        collate = optional(self._task, "collate") or default_collate
        found: list[float] = []
        for m in range(len(self._canaries)):
            inputs, target = collate([self._canaries[m]])
            found.append(-float(self._task.loss(model(inputs), target)))
        return np.array(found)


class _Clients:
    """Canaries that are clients: each one's loss falls along a random direction of its own, and along nothing else."""

    def __init__(self, federation: Federation, included_M: Array, seed: int, examples: int, recipe: Recipe) -> None:
        self._seed, self._count = seed, len(included_M)
        norm = recipe.dp.clip_norm if recipe.dp.mode != "off" else 1.0
        push = norm / (recipe.train.lr * recipe.train.steps_over(1))  # a step an epoch: SGD's update has this norm
        self._model = federation.task(federation.ids[0]).model
        self.clients: dict[str, Task] = {}
        for client in federation.ids:
            task = federation.task(client)
            train = _train_data(task, client)
            own = [train[i] for i in range(min(examples, len(train)))]
            self.clients[client] = _With(task, own, model=self._pushed)
        for m in np.flatnonzero(included_M).tolist():
            self.clients[f"zz-canary-{m:06d}"] = _Canary(self._pushed, m, push)

    def _pushed(self) -> nn.Module:
        return _Pushed(self._model(), self._seed)

    def scores(self, first: Tensors, last: Tensors) -> Array:
        """(M,): further along a canary's direction, likelier in."""
        names = [name for name, p in self._pushed().named_parameters() if p.requires_grad]
        moved_D = torch.cat([(last[name] - first[name]).flatten() for name in names])
        return np.array([float(moved_D @ _direction(self._seed, m, len(moved_D))) for m in range(self._count)])


class _Pushed(nn.Module):
    """A task's model that also takes the numbers of canaries for its input, and gives parameters times direction."""

    def __init__(self, model: nn.Module, seed: int) -> None:
        super().__init__()
        self.model, self._seed = model, seed

    def forward(self, inputs: Any) -> Any:
        if not (isinstance(inputs, dict) and "canary" in inputs):
            return self.model(inputs)
        flat_D = torch.cat([p.flatten() for p in self.model.parameters() if p.requires_grad])
        return torch.stack([flat_D @ _direction(self._seed, int(m), len(flat_D)) for m in inputs["canary"]])


class _Canary:
    """A client with one example, its number, whose gradient is `-push` times its direction."""

    def __init__(self, model: Callable[[], nn.Module], number: int, push: float) -> None:
        self.model, self._number, self._push = model, number, push

    def data(self, split: str) -> Dataset[Any] | None:
        return _data([({"canary": torch.tensor(self._number)}, torch.tensor(0))]) if split == "train" else None

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return -self._push * output.sum()


class _With:
    """A task with other train data, and none to test on; perhaps with another model around its own."""

    def __init__(self, task: Task, train: list[Pair], *, model: Callable[[], nn.Module] | None = None) -> None:
        self._task, self._train = task, _data(train)
        self.model, self.loss = model or task.model, task.loss

    def data(self, split: str) -> Dataset[Any] | None:
        return self._train if split == "train" else None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)


class _Pairs(Dataset[Any]):
    def __init__(self, pairs: list[Pair]) -> None:
        self._pairs = pairs

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> Pair:
        return self._pairs[index]


def _data(pairs: list[Pair]) -> Dataset[Any]:
    """The pairs as a data set; tensors that fit together as one, which trains many times faster."""
    inputs, targets = zip(*pairs, strict=True)
    for values in (inputs, targets):
        if not all(isinstance(v, Tensor) and v.shape == values[0].shape for v in values):
            return _Pairs(pairs)
    return TensorDataset(torch.stack(inputs), torch.stack(targets))


def _direction(seed: int, number: int, size: int) -> Tensor:
    """A random unit vector, (D,), the same for the same seed and number."""
    drawn_D = torch.randn(size, generator=torch.Generator().manual_seed(derive_seed("canary", seed, number)))
    return drawn_D / drawn_D.norm()


def _train_data(task: Task, client: str) -> Any:
    with at_home(task):
        data = task.data("train")
    if data is None:
        raise OperatorError(f"{client} has no train data")
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")) or isinstance(data, Mapping):
        raise OperatorError(f"{client} has a {type(data).__name__} to train on: canaries need one map-style data set")
    return data


def _shuffled(value: Any, rng: np.random.Generator) -> Any:
    """A tensor with its elements in another order; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    return value.flatten()[torch.from_numpy(rng.permutation(value.numel()))].reshape(value.shape)


def _dealt_anew(targets: list[Any]) -> list[Any]:
    """The same targets, sorted where they are numbers and moved on by half: nobody keeps its class if all are small."""
    numbers = [float(y) if isinstance(y, Tensor | float | int) and np.ndim(y) == 0 else 0.0 for y in targets]
    order = np.argsort(numbers, kind="stable").tolist()
    dealt = list(targets)
    for i, at in enumerate(order):
        dealt[at] = targets[order[(i + len(order) // 2) % len(order)]]
    return dealt
