"""How a group's clients are trained in one computation: with which copies of the model, found by trying it once.

K = clients of a group, A = those that still train, B = rows of one step, R = A · B
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..clients.engine.randomness import derive_seed, seeded
from ..protocol.recipe import Recipe
from .cohorts import Unsuited
from .copies import Stacked, Sums
from .groups import Buffers, Group, Member, Step
from .layers import Copies, after, by_layers, by_vmap, first_linear
from .lowrank import FirstLayer, LowRank, Sgd

# One group's memory, the same on every machine: a run's sums must not depend on what else a machine does. More brings
# nothing on a CPU: what the clients of a group train with should stay in its cache from step to step.
STACKED_BYTES = 16 << 20  # of stacked copies of the parameters
GROUP_BYTES = 1 << 30  # of everything
SMALL = 1 << 15  # numbers; torch divides additions of more
ON_A_GPU = 16  # times as much there
NEAR = 1e-4  # largest difference of an output among other clients' to that alone, of the largest output


class Route:
    """A model with the copies that a group's clients have of it.

    Linear layers take the low-rank form where training is plain enough (see `Sgd`) and a client's rows are fewer than
    either side of the layer: beyond, its coefficients would cost more than its weights. The layer that takes the
    examples themselves takes it while these are fewer than its inputs: their products are then fewer than they.
    """

    def __init__(self, module: nn.Module, recipe: Recipe, buffers: Buffers, device: torch.device) -> None:
        self._module, self._recipe, self._buffers, self._device = module, recipe, buffers, device
        self._copies = Copies(grouped=device.type == "cuda")
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._draws = any(isinstance(layer, nn.Dropout) and layer.p for layer in module.modules())
        self._low: dict[str, LowRank] = {}
        self._first: FirstLayer | None = None
        self._activations = 0.0  # numbers that a pass makes for each example
        self._made: Callable[[Tensor], Tensor] = module
        self._rest = nn.Sequential()  # what follows the first layer

    def find(self, sample: Sequence[Member]) -> Route:
        """Itself, having found how by a step of these clients; raises Unsuited where each alone gives another one."""
        if any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in self._module.modules()):  # pyright: ignore[reportPrivateUsage]: its public kinds are many
            raise Unsuited("BatchNorm's statistics belong to one client's batches (GroupNorm has none)")
        if self._draws and self._recipe.train.micro_batch:
            raise Unsuited("dropout draws for one piece after the other (train.micro_batch)")
        reasons: list[str] = []
        for make in (by_layers, by_vmap):
            try:
                self._made = make(self._module, self._copies)
                self._try(sample)
            except Unsuited as error:
                reasons.append(str(error))
            except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
                reasons.append(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
            else:
                self._find_low()
                return self
        raise Unsuited("the model cannot be run for several clients at once: " + "; ".join(reasons))

    def fits(self, m: Member) -> int:
        """How many clients with as many examples as this one make a group."""
        steps, width = Group.shape(len(m), self._recipe.train)
        low = self._lean(steps * width, len(m))
        stacked = sum(p.nbytes for p in self._stacked_of(low).values())
        each = 4 * stacked + 2 * m.nbytes + 12 * width * self._activations
        for name in low & self._low.keys():
            layer = self._low[name].layer
            rows = steps * width * self._copies.rows[name]
            each += 4 * rows * (layer.in_features + 2 * layer.out_features)
        more = ON_A_GPU if self._device.type == "cuda" else 1
        return max(1, int(min(more * STACKED_BYTES // max(stacked, 1), more * GROUP_BYTES // max(each, 1))))

    def small(self, group: Group) -> bool:
        """Whether one layer is all of the model, and its outputs in a step are so few that torch divides nothing."""
        if self._first is None or len(self._rest):
            return False
        _, width = Group.shape(max(group.sizes), self._recipe.train)
        return len(group.members) * width * self._first.layer.out_features <= SMALL

    def begin(self, group: Group) -> None:
        """Every client of the group at the version's weights."""
        k, largest = len(group.members), max(group.sizes)
        steps, width = Group.shape(largest, self._recipe.train)
        low = self._lean(steps * width, largest)
        self._group = group
        self._stacked = Stacked(self._stacked_of(low), k, self._recipe.train, self._recipe.strategy.mu)
        self._copies.values = self._stacked.values
        self._copies.low = {name: layer for name, layer in self._low.items() if name in low}
        for name, layer in self._copies.low.items():
            layer.begin(k, round(steps * width * self._copies.rows[name]))
        self._begun: list[LowRank | FirstLayer] = [*self._copies.low.values()]
        self._takes_examples = self._first is not None and self._first.name in low
        if self._takes_examples and self._first is not None:
            self._first.begin(group)
            self._begun.append(self._first)
        seeds = (derive_seed("job", self._recipe.seed, group.round, m.name, 0) for m in group.members)
        drawn = seeds if self._draws else ()
        self._copies.generators = tuple(torch.Generator().manual_seed(seed) for seed in drawn)

    def forward(self, step: Step) -> Tensor:
        """(R, ...), the model's output for the step's examples."""
        self._copies.at(step)
        if self._takes_examples and self._first is not None:
            return self._rest(self._first(step)) if len(self._rest) else self._first.outputs(step).flatten(0, 1)
        return self._made(self._group.inputs_KN.flatten(0, 1)[step.at_R])

    def backward(self, output_R: Tensor, gradient_R: Tensor) -> None:
        """Let every layer have its gradient; without autograd where one layer is the whole model."""
        if self._takes_examples and self._first is not None and not len(self._rest):
            self._first.gradient_ABO = gradient_R.unflatten(0, (self._copies.active, -1))
        else:
            output_R.backward(gradient_R)

    def narrow(self, active: int, weights: Sequence[float], sums: Sums) -> None:
        """Go on with the first `active` clients; see `Stacked.narrow`."""
        self._stacked.narrow(active, weights, sums)

    def step(self) -> None:
        """Move every client by the gradients that a backward pass left."""
        self._stacked.step()
        with torch.no_grad():
            for layer in self._begun:
                layer.step()

    def finish(self, weights: Sequence[float], sums: Sums) -> None:
        """Add what the clients moved by, weighted, to the sums."""
        self._stacked.finish(weights, sums)
        for layer in self._begun:
            layer.finish(weights, sums)

    def _stacked_of(self, low: set[str]) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self._parameters.items() if name.rpartition(".")[0] not in low}

    def _lean(self, rows: int, examples: int) -> set[str]:
        """The layers that take the low-rank form where a client trains on so many rows, of so many examples."""
        found = {
            name
            for name, low in self._low.items()
            if rows * self._copies.rows[name] <= min(low.layer.in_features, low.layer.out_features)
        }
        if self._first is not None and examples <= self._first.layer.in_features:
            found.add(self._first.name)
        return found

    def _find_low(self) -> None:
        """Which layers may: all that are used once in a pass; and whether the first takes the examples themselves."""
        sgd = Sgd.of(self._recipe.train, self._recipe.strategy.mu)
        if sgd is None or not isinstance(self._made, nn.Module):
            return
        for name in self._copies.rows:
            layer = self._module.get_submodule(name)
            if self._copies.uses[name] == 1 and isinstance(layer, nn.Linear):
                self._low[name] = LowRank(name, layer, sgd, self._buffers)
        name = first_linear(self._module)
        if name in self._low and self._copies.rows[name] == 1:
            self._first = FirstLayer(name, self._low.pop(name).layer, sgd, self._buffers)
            self._rest = after(self._made, name)

    def _try(self, sample: Sequence[Member]) -> None:
        """Compare the outputs of these clients together with those of each alone."""
        recipe = self._recipe
        group = Group(sample, recipe.train, seed=recipe.seed, round=0, buffers=self._buffers, device=self._device)
        self._module.train()
        self._copies.rows.clear()
        self._copies.uses.clear()
        self.begin(group)
        step = next(iter(group))
        together_AB = self.forward(step).detach().unflatten(0, (step.active, -1))
        given_AB = group.inputs_KN.flatten(0, 1)[step.at_R].unflatten(0, (step.active, -1))
        before = {name: b.clone() for name, b in self._module.named_buffers()}
        for m, size, given, found in zip(group.members, step.sizes, given_AB, together_AB, strict=False):
            alone = self._alone(m, given[:size])
            if alone.shape != found[:size].shape:
                raise Unsuited("its output has no row for each example")
            if not isinstance(self._made, nn.Module) and not self._near(self._alone(m, given[:1]), alone[:1]):
                raise Unsuited("its output for an example changes with the others of the batch")
            if not self._near(found[:size], alone):
                raise Unsuited("its output for a client changes with the others'")
        for name, b in self._module.named_buffers():
            if not torch.equal(b, before[name]):
                b.copy_(before[name])
                raise Unsuited(f"its buffer {name!r} changes in training")

    def _near(self, found: Tensor, alone: Tensor) -> bool:
        return torch.allclose(found, alone, rtol=NEAR, atol=NEAR * float(alone.abs().max()))

    def _alone(self, m: Member, given: Tensor) -> Tensor:
        """What the model gives the client by itself; what it takes for that is noted."""
        made: list[int] = []
        leaves = [layer for layer in self._module.modules() if not [*layer.children()]]
        hooks = [x.register_forward_hook(lambda *a: made.append(getattr(a[2], "nbytes", 0) // 4)) for x in leaves]
        try:
            with torch.no_grad(), seeded(derive_seed("job", self._recipe.seed, 0, m.name, 0), self._device):
                return self._module(given)
        finally:
            for hook in hooks:
                hook.remove()
            self._activations = sum(made) / len(given)
