"""A Flower `Strategy` as it is: it combines updates, moves the server, and keeps its state from round to round.

    version, updates ── Lazy arrays ── aggregate_train ── new arrays minus the version's ── server_step

Only strategies that are installed beside the coordinator can be named: flwr's own by their class in small letters
("fedyogi"), and what packages register as entry points of the group "murmur.strategies". flwr is imported when one is
first built, with its telemetry off.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..protocol.errors import BadUpdate, MurmurError, OperatorError
from ..protocol.flower import be_somebody, telemetry_off
from ..protocol.messages import TRAIN_LOSS
from ..protocol.recipe import Recipe
from ..protocol.sections import Strategy
from ..protocol.tensors import FLOATS, Layout, TensorSpec, check_file, map_file
from ..protocol.wire import from_bf16
from .metrics import Sums

if TYPE_CHECKING:
    from flwr.serverapp.strategy import Strategy as FlowerStrategy

Array = np.ndarray[Any, Any]
GROUP = "murmur.strategies"
_NOT_BY_NAME = ("DifferentialPrivacy", "FedXgb")  # they wrap a strategy, which no option can be; they have no tensors
_here: dict[str, Callable[..., Any]] = {}


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a strategy is told of one client, or of all together.

    update: gives trained minus the version by the name of a tensor. weight: Flower's num-examples.
    """

    client: str
    weight: float
    metrics: Sums
    update: Callable[[str], Array]


def of_file(client: str, path: Path, wire: Layout, weight: float, metrics: Sums) -> Reply:
    """A plain update of layout `wire` that lies in a file; raises BadUpdate for another layout."""
    check_file(path, wire)
    mapped, narrow = map_file(path, wire), {t.name for t in wire.tensors if t.dtype == "BF16"}

    def update(name: str) -> Array:
        return from_bf16(mapped[name]) if name in narrow else mapped[name]

    return Reply(client=client, weight=weight, metrics=metrics, update=update)


def of_all(mean: Mapping[str, Array], metrics: Sums) -> Reply:
    """A cohort's mean as one update, which weighs as many examples as were trained on where that is known."""
    weight = metrics.get(TRAIN_LOSS, (0.0, 0.0))[1] or 1.0
    return Reply(client="", weight=weight, metrics=metrics, update=lambda name: mean[name])


def looks_at_single(recipe: Recipe) -> bool:
    """Whether the recipe has a Flower strategy that needs each update, and not only their mean."""
    if not recipe.strategy.flower:
        return False
    from .flower_probe import find

    return not find(recipe).linear


def register(name: str, make: Callable[..., Any]) -> None:
    """Give a strategy a name in this process, to simulate with; a coordinator knows the installed ones only."""
    _here[name] = make


def names() -> tuple[str, ...]:
    """Every strategy that a recipe can name here."""
    return tuple(sorted(_known()))


def build(strategy: Strategy) -> FlowerStrategy:
    """The strategy that a recipe names, with its options.

    Raises OperatorError for a name that is not installed, options that it refuses, and what is no Strategy of
    `flwr.serverapp.strategy`.
    """
    known, name = _known(), strategy.flower
    from flwr.serverapp.strategy import Strategy as FlowerStrategy

    from .flower_messages import quiet

    if name not in known:
        raise OperatorError(
            f"no Flower strategy {name!r} is installed here; there are {', '.join(sorted(known))}. Others are entry "
            f'points of the group "{GROUP}"'
        )
    try:
        with quiet():
            made = known[name]()(**strategy.flower_options)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        raise OperatorError(f"the Flower strategy {name!r} cannot be made with these options: {said}") from error
    if not isinstance(made, FlowerStrategy):
        raise OperatorError(
            f"{name!r} gives a {type(made).__module__}.{type(made).__name__}, and not a flwr.serverapp.strategy."
            "Strategy, which has aggregate_train; Flower's old kind (aggregate_fit) cannot be taken"
        )
    return made


def flower_step(
    version: Path,
    layout: Layout,
    mean: Mapping[str, Array],
    replies: Sequence[Reply],
    strategy: Strategy,
    state: Path | None,
    out_version: Path,
    out_state: Path,
    *,
    round: int,
) -> bool:
    """As `server_step`: write the version that a Flower strategy makes of a round; true when a state was written too.

    mean: the cohort's mean update, for a strategy that needs no more (`of_all(mean, …)` is then the one reply): it is
    given the parameters, while buffers and integers move by the mean. Empty for one that looks at single updates: it is
    given every tensor of the replies. Arrays come as float32, float64 where the model has F64, and int64.
    What it makes is rounded to the version's own dtypes. Raises BadUpdate where it fails or gives no model.
    """
    from .flower_state import read_state, write_state
    from .server import server_step  # imports torch

    rule = build(strategy)
    if state is not None:
        read_state(state, rule, strategy)
    check_file(version, layout)
    mapped, travels = map_file(version, layout), layout.update().tensors
    dtypes = {t.name: t.dtype for t in layout.tensors}
    trained = (t for t in travels if t.dtype in FLOATS and t.name not in layout.buffers)
    given = list(trained) if mean else travels
    old = {t.name: widened(mapped[t.name], dtypes[t.name]) for t in given}
    new = ask(rule, round, old, replies)
    moved = {t.name: _moved(new, old[t.name], t, strategy.flower) for t in given}
    server_step(version, layout, {**mean, **moved}, Strategy(), None, out_version, None)
    return write_state(out_state, rule, strategy)


def ask(rule: FlowerStrategy, round: int, old: Mapping[str, Array], replies: Sequence[Reply]) -> dict[str, Array]:
    """What a strategy makes of a model's arrays and of what clients made of them; raises BadUpdate where it fails."""
    from .flower_messages import begin, combine

    try:
        begin(rule, round, old)
        return combine(rule, round, old, replies)
    except MurmurError:
        raise
    except Exception as error:
        raise BadUpdate(f"the Flower strategy failed in round {round}: {type(error).__name__}: {error}") from error


def widened(array: Array, dtype: str) -> Array:
    """A tensor as strategies compute with it: a copy in float32, float64 for F64, or int64."""
    if dtype == "BF16":
        return np.asarray(from_bf16(array))
    wide = {"F64": np.float64} | dict.fromkeys(("F32", "F16"), np.float32)
    return array.astype(wide.get(dtype, np.int64))


def _moved(new: Mapping[str, Array], old: Array, t: TensorSpec, name: str) -> Array:
    """How far the strategy has moved a tensor."""
    if t.name not in new or new[t.name].shape != t.shape:
        raise BadUpdate(f"the Flower strategy {name!r} gave no {t.name!r} of shape {[*t.shape]}")
    made = np.asarray(new[t.name], np.float64)
    if t.dtype in FLOATS:
        return (made - old).astype(old.dtype)
    if not np.isfinite(made).all():
        raise BadUpdate(f"the Flower strategy {name!r} makes {t.name!r} infinite or NaN")
    return np.rint(made).astype(np.int64) - old


def _known() -> dict[str, Callable[[], Callable[..., Any]]]:
    """What gives each strategy's class or function, by name; what is installed goes before what was registered here."""
    telemetry_off()
    be_somebody()
    import flwr.serverapp.strategy as own

    kinds = ((name, getattr(own, name)) for name in own.__all__ if not name.startswith(_NOT_BY_NAME))
    found: dict[str, Callable[[], Callable[..., Any]]] = {name: lambda make=make: make for name, make in _here.items()}
    found |= {point.name: point.load for point in entry_points(group=GROUP)}
    for name, kind in kinds:
        if isinstance(kind, type) and issubclass(kind, own.Strategy) and not kind.__abstractmethods__:
            found[name.lower()] = lambda kind=kind: kind
    return found
