"""`murmur.tune`: search a recipe's hyper-parameters, in simulation or by runs on a coordinator."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from murmur.client import Client
from murmur.privacy.dp.plan import event_of
from murmur.protocol.errors import OperatorError
from murmur.protocol.recipe import Recipe, parse_recipe
from murmur.protocol.views import OVER, RunDetail
from murmur.simulation.search import Attempt, Pruned, Pruner, Search, Trial, search
from murmur.simulation.space import Value, parse_space
from murmur.simulation.spending import ALL_CLIENTS, Spent, joined

if TYPE_CHECKING:
    from murmur.simulation import Federation, Round

TABLE = ("metric", "trials", "seed", "pruner", "budget", "space")


def tune(
    recipe: Path | str | Mapping[str, Any],
    federation: Any = None,
    *,
    space: Mapping[str, Any] | None = None,
    metric: str | None = None,
    trials: int | None = None,
    seed: int | None = None,
    pruner: Pruner | None = None,
    budget: float | None = None,
    folder: Path | str = "murmur-tune",
    clients: int | None = None,
    options: Mapping[str, Any] | None = None,
    coordinator: Client | None = None,
    first_model: Callable[[Recipe], AbstractContextManager[Path]] | None = None,
    on_start: Callable[[int, Mapping[str, Value]], None] | None = None,
    on_trial: Callable[[Trial], None] | None = None,
) -> Search:
    """Search the settings of a recipe that make its metric best; each trial is a whole run, pruned where it is behind.

    recipe: a recipe file, a folder with one, or its values; its table [tune] has the space and what else is not given
    here. space: by dotted names: "1e-3..1e-1:log", "8..64:8", a list of choices, or one value for all trials.
    federation, clients, options: as `simulate` takes them; by default the folder of the recipe file. Updates are masked
    only where it changes what is learned: for distributed differential privacy, and for rules over groups.
    coordinator, first_model: instead, each trial is a run that starts from this model on a real coordinator.
    metric: "accuracy", "loss" (minimized), "name:min", "name:max". budget: epsilon of all trials together; by default
    the recipe's dp.budget. folder: where the search is kept, and goes on when it was ended.
    The same arguments find the same, except under differential privacy. Raises OperatorError for what cannot work; an
    exception in a client's own code ends the search, a run that fails is one failed trial.
    """
    values, place = recipe_values(recipe)
    said = _table(values.pop("tune", {}))
    varied, base = parse_space({**_flat(said.get("space", {})), **_flat(space or {})}, values)
    settled = parse_recipe(dict(base))
    if coordinator is not None:
        if settled.dp.mode == "local" and (budget or said.get("budget")):
            raise OperatorError(
                'with dp.mode = "local" every site has a ledger and a budget of its own, which nobody else sees: leave '
                "the search's budget out, or simulate"
            )
        if first_model is None:
            raise OperatorError("runs on a coordinator need a first model: give first_model (--task, or --init)")
        backend: Simulated | OnCoordinator = OnCoordinator(coordinator, first_model, Path(folder).resolve().name)
    else:
        source = federation if federation is not None else place
        if source is None:
            raise OperatorError("there is no federation to simulate: name one, as for murmur.simulate")
        backend = Simulated(_federation(source, clients, options))

    def chosen(name: str, given: Any, otherwise: Any) -> Any:
        return given if given is not None else said.get(name, otherwise)

    return search(
        base,
        varied,
        backend,
        folder=Path(folder),
        metric=chosen("metric", metric, "accuracy"),
        trials=chosen("trials", trials, 0),
        seed=chosen("seed", seed, settled.seed),
        pruner=chosen("pruner", pruner, "median"),
        budget=chosen("budget", budget, settled.dp.budget),
        on_start=on_start,
        on_trial=on_trial,
    )


def recipe_values(recipe: Path | str | Mapping[str, Any]) -> tuple[dict[str, Any], Path | None]:
    """What a recipe file says, not yet checked, and the folder that it lies in."""
    if isinstance(recipe, Mapping):
        return dict(recipe), None
    path = Path(recipe).expanduser()
    path = path / "recipe.toml" if path.is_dir() else path
    try:
        return tomllib.loads(path.read_text()), path.parent
    except OSError as error:
        raise OperatorError(f"cannot read the recipe {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise OperatorError(f"{path} is not TOML: {error}") from None


def _flat(given: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """By dotted names, so that what the caller says takes the place of what the file says."""
    found: dict[str, Any] = {}
    for name, value in given.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def _table(said: Any) -> Mapping[str, Any]:
    kinds: dict[str, Any] = {"metric": str, "trials": int, "seed": int, "pruner": str, "budget": (int, float)}
    if not isinstance(said, Mapping):
        raise OperatorError("[tune] is a table of a recipe")
    if unknown := set(said) - set(TABLE):
        raise OperatorError(f"[tune] has no {min(unknown)!r}; it has {', '.join(TABLE)}")
    for name, kind in (kinds | {"space": Mapping}).items():
        if name in said and (not isinstance(said[name], kind) or isinstance(said[name], bool)):
            raise OperatorError(f"[tune] {name} = {said[name]!r} is of the wrong kind")
    if said.get("pruner", "none") not in get_args(Pruner):
        raise OperatorError(f"[tune] pruner = {said['pruner']!r}: {', '.join(get_args(Pruner))}")
    return said


def _federation(source: Any, clients: int | None, options: Mapping[str, Any] | None) -> Federation:
    from murmur.simulation import as_federation, find_federation

    if isinstance(source, str | Path):
        return find_federation(str(source), clients, options)[0]
    return as_federation(source, clients, options)


class Simulated:
    """Trials by the simulator, over clients that are made once."""

    def __init__(self, federation: Federation) -> None:
        self._federation = federation
        self._examples: dict[str, int] = {}

    def cost(self, recipe: Recipe) -> Spent:
        if recipe.dp.of_clients:
            return {ALL_CLIENTS: (event_of(recipe.dp),) * recipe.rounds}
        return {client: found * recipe.rounds for client, found in self._training(recipe, self._federation.ids).items()}

    def run(self, attempt: Attempt) -> Mapping[str, float]:
        from murmur.simulation import simulate

        recipe, before = attempt.recipe, dict(attempt.spent)

        def on_round(done: Round) -> None:
            now: Spent = self._training(recipe, done.cohort)
            if recipe.dp.of_clients:
                now = {ALL_CLIENTS: (event_of(recipe.dp),)}
            for whose, events in now.items():
                before[whose] = joined((*before.get(whose, ()), *events))
            if now:
                attempt.spend(before)
            if done.n > 1:  # what a round measures is the version that it began with
                attempt.report(done.n - 1, done.metrics)

        needs_masks = recipe.dp.mode == "distributed" or recipe.secure.groups
        return simulate(self._federation, recipe, secure=None if needs_masks else False, on_round=on_round).final

    def _training(self, recipe: Recipe, clients: tuple[str, ...]) -> dict[str, tuple[Any, ...]]:
        """What one round of DP-SGD spends at each of these clients; nothing where the recipe has none."""
        from murmur.clients.ledger import training_event

        if recipe.dp.mode != "local":
            return {}
        return {c: (training_event(recipe.train, recipe.dp, self._count(c)),) for c in clients}

    def _count(self, client: str) -> int:
        if client not in self._examples:
            train: Any = self._federation.task(client).data("train")
            self._examples[client] = len(train) if train is not None else 0
        return self._examples[client]


class OnCoordinator:
    """Trials as runs on a coordinator, one after the other; a pruned one is stopped.

    A search that is ended leaves its run going, and finds it again when it goes on.
    """

    def __init__(
        self, client: Client, first_model: Callable[[Recipe], AbstractContextManager[Path]], search: str
    ) -> None:
        self._client, self._first_model, self._search = client, first_model, search

    def cost(self, recipe: Recipe) -> Spent:
        """Of client-level privacy. With dp.mode = "local" every site's own ledger counts, which nobody else sees."""
        return {ALL_CLIENTS: (event_of(recipe.dp),) * recipe.rounds} if recipe.dp.of_clients else {}

    def run(self, attempt: Attempt) -> Mapping[str, float]:
        run = attempt.kept("run") or self._start(attempt)
        attempt.keep("run", run)
        try:
            for event in self._client.watch(run):
                if event.kind == "model" or (event.kind == "phase" and event.data.get("state") == "committed"):
                    self._tell(attempt, self._client.run(run))
        except Pruned:
            self._client.stop_run(run)
            self._spend(attempt, self._client.run(run))
            raise
        detail = self._client.run(run)
        self._spend(attempt, detail)
        if detail.run.state != "finished":
            raise OperatorError(f"run {run} is {detail.run.state}: {detail.run.reason}")
        return {m.name: m.value for m in detail.metrics if m.version == detail.run.version}

    def _start(self, attempt: Attempt) -> str:
        """Start the attempt's run, or find the one that was started just before this search was killed."""
        name = f"{attempt.recipe.name[:30]}.{_name(self._search)[:24]}.{attempt.n}"
        recipe = attempt.recipe.model_copy(update={"name": name})
        going = (r.id for r in self._client.runs() if r.recipe == recipe and r.state not in OVER)
        if found := next(going, None):
            return found
        with self._first_model(recipe) as path:
            return self._client.start_run(recipe, path)

    def _tell(self, attempt: Attempt, detail: RunDetail) -> None:
        self._spend(attempt, detail)
        for version in sorted({m.version for m in detail.metrics} - {0}):
            attempt.report(version, {m.name: m.value for m in detail.metrics if m.version == version})

    @staticmethod
    def _spend(attempt: Attempt, detail: RunDetail) -> None:
        if detail.run.privacy and attempt.recipe.dp.of_clients and detail.run.privacy.spent:
            attempt.spend({ALL_CLIENTS: (event_of(attempt.recipe.dp),) * detail.run.privacy.spent})


def _name(text: str) -> str:
    return "".join(c if c.isascii() and (c.isalnum() or c in "_.-") else "-" for c in text.lower()) or "search"
