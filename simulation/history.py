"""What a simulation gives back: its rounds, the metrics of every version, and the final model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..aggregation.local import CONTROL, first_version
from ..clients.ledger import ASSUMPTIONS
from ..privacy.dp.accounting import Accountant, Epsilon, Event, epsilon
from ..privacy.dp.plan import epsilon_of
from ..protocol.errors import OperatorError
from ..protocol.recipe import Recipe
from ..protocol.sections import Strategy
from ..protocol.tensors import read_layout

if TYPE_CHECKING:
    from torch import Tensor

    from .timeline import Timeline

Totals = dict[str, tuple[float, float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """A round that is done. Its clients measured version `n - 1` before they trained, and what they gave became n.

    measured: (sum, count) over the cohort's test data, of version n - 1; train_loss: mean over the training itself,
    which went over `trained` examples (or whatever the task counts).
    clipped: the part of all values that secure aggregation cut to its bound; 0 in plain rounds.
    clip_norm: the bound of its updates' L2 norm; None without differential privacy for clients.
    tested: (sum, count) over the test set that no client of a round holds, of version n; empty where it was not tested.
    """

    n: int
    cohort: tuple[str, ...]
    measured: Totals
    train_loss: float
    clipped: float
    seconds: float
    clip_norm: float | None = None
    trained: float = 0.0
    tested: Totals = field(default_factory=Totals)

    @property
    def metrics(self) -> dict[str, float]:
        """Means of what was measured, of version n - 1."""
        return means(self.measured)


def means(totals: Totals) -> dict[str, float]:
    return {name: total / count for name, (total, count) in totals.items() if count}


@dataclass(kw_only=True)
class History:
    """A finished simulation.

    versions: metrics of version 0, 1, … as means over the test examples of the clients that were asked; the last is
    from a pass that evaluates and trains no more. model: the final version's safetensors file; it is deleted with this
    object unless a folder was named, `save` keeps a copy. backend: what trained the clients at the end. ledger:
    what the rounds spent of the clients' privacy. spent: what each client's ledger would hold, where the recipe says
    dp.mode = "local"; the metrics are measured all the same, which no differential privacy covers. run: its id in a
    store, where the final version's file then lies. world: what happened in it, where there was one. start: the test of
    version 0, where versions are tested. ended: why the run ended before its last round; empty where it did not.
    """

    recipe: Recipe
    clients: int
    rounds: tuple[Round, ...]
    versions: tuple[dict[str, float], ...]
    model: Path
    backend: str = "sequential"
    ledger: tuple[Event, ...] = ()
    run: str = ""
    spent: Mapping[str, tuple[Event, ...]] = field(default_factory=dict[str, tuple[Event, ...]])
    world: Timeline | None = None
    start: Totals = field(default_factory=Totals)
    ended: str = ""

    @property
    def tests(self) -> dict[int, dict[str, float]]:
        """Means over the test set that no client of a round holds, of each version that was tested."""
        found = {0: self.start} | {r.n: r.tested for r in self.rounds}
        return {n: means(totals) for n, totals in found.items() if totals}

    def epsilons(self) -> dict[str, Epsilon]:
        """What each client's training examples have spent, at the recipe's delta, by the accountant RDP."""
        delta = self.recipe.dp.delta
        return {
            client: epsilon(events, delta, unit="example", assumptions=ASSUMPTIONS)
            for client, events in self.spent.items()
        }

    @property
    def final(self) -> dict[str, float]:
        """Metrics of the final version."""
        return self.versions[-1]

    def epsilon(self, accountant: Accountant = "pld") -> Epsilon:
        """What the ledger comes to, as a coordinator would report it; by "pld" it takes seconds.

        Raises OperatorError for a run without differential privacy, whose epsilon is no number.
        """
        if not self.ledger:
            raise OperatorError("the run was not differentially private: there is no epsilon")
        return epsilon_of(self.recipe, self.ledger, accountant)

    def save(self, path: Path | str) -> Path:
        """Copy the final model to a file, without control variates."""
        if not first_version(self.model, read_layout(self.model), Strategy(), Path(path)):
            shutil.copyfile(self.model, path)
        return Path(path)

    def state_dict(self) -> dict[str, Tensor]:
        """The final model's tensors, as `Module.load_state_dict` takes them."""
        from safetensors.torch import load_file

        return {name: tensor for name, tensor in load_file(self.model).items() if not name.startswith(CONTROL)}

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from ..web.notebook import shown

        names = sorted({name for metrics in self.versions for name in metrics})
        pairs = {n: [(float(v), m[n]) for v, m in enumerate(self.versions) if n in m] for n in names}
        kind = "masked" if self.recipe.secure.on else "plain"
        said = f"{self.recipe.strategy.name}, {kind}, {self.clients} clients, {len(self.rounds)} rounds, {self.backend}"
        return shown(self.recipe.name, said, pairs)

    def to_json(self) -> dict[str, Any]:
        """Everything but the model, in values that `json.dumps` takes."""
        rounds = [asdict(r) | {"metrics": r.metrics} for r in self.rounds]
        found: dict[str, Any] = {"recipe": self.recipe.model_dump(mode="json"), "clients": self.clients}
        found |= {"rounds": rounds, "backend": self.backend}
        if self.run:
            found["run"] = self.run
        if self.world or self.ended:
            found["ended"] = self.ended
        if self.world:
            found["world"] = self.world.to_json()
        if self.tests:
            found["tests"] = self.tests
        if self.ledger:
            found["privacy"] = self.epsilon().to_json()
        if self.spent:
            found["epsilon"] = {client: spent.to_json() for client, spent in self.epsilons().items()}
        return json.loads(json.dumps(found | {"versions": list(self.versions)}))
