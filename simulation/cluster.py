"""The backend `ray`: actors on the machines of a Ray cluster, each with clients of its own.

A round goes to an actor as one batch of clients, and comes back as one partial sum: what travels does not grow with the
cohort. The version goes into Ray's object store once a round. A client stays with its actor, where what it keeps
between rounds lies. Ray pickles the federation for its workers, who trust this machine: it is for one's own cluster.
"""

from __future__ import annotations

import os
import shutil
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np

from ..clients.job import Result
from ..privacy.masks import Array
from ..protocol.errors import OperatorError
from ..protocol.messages import Assignment
from ..protocol.recipe import Recipe
from ..protocol.tensors import Layout, read_layout
from .cohorts import Asked, Part, Summed, Unsuited, joined
from .federation import Federation
from .places import memory_disk
from .workers import Either, Told, error_of, suits_vectorized, told_error

AHEAD = 2  # single updates that each actor may have made before they are asked for
NAMED = 5  # clients of a share that an error names
_Given = tuple[Federation, str, str]  # what an actor begins with: also the recipe as JSON, and the simulation's folder


class Cluster:
    """Actors of one CPU each; they are gone after `close`, and a Ray that was started for them."""

    name = "ray"

    def __init__(
        self, federation: Federation, recipe: Recipe, layout: Layout, folder: Path, address: str = "", workers: int = 0
    ) -> None:
        """address: of a cluster, "auto" for the one that this machine belongs to; "" starts Ray here.

        workers: actors, 0 for one on each CPU that Ray has. Raises OperatorError where Ray is missing or not reached,
        has fewer CPUs than that, or cannot send the federation.
        """
        self._ray = ray = _ray()
        self._wire, self._folder = layout.update(), folder
        self._numbers = {client: number for number, client in enumerate(federation.ids)}
        self._together = suits_vectorized(federation, recipe, layout)
        self._started = not ray.is_initialized()
        if self._started:
            try:
                ray.init(address=address or "local", **({} if address else _here(workers)), log_to_driver=False)
            except Exception as error:  # Ray raises plain Exception for a start of more than 30 s
                ray.shutdown()
                raise OperatorError(f"Ray cannot be reached at {address or 'this machine'}: {error}") from None
        self._actors: list[Any] = []
        try:
            self._begin(workers, (federation, recipe.model_dump_json(), str(folder)))
        except BaseException:
            self.close()
            raise

    def _begin(self, workers: int, given: _Given) -> None:
        ray = self._ray
        cpus = int(ray.cluster_resources().get("CPU", 0))
        if cpus < max(workers, 1):  # Ray would wait for more, without a word
            raise OperatorError(f"Ray has {cpus} CPUs, and each of {max(workers, 1)} workers needs one")
        _by_value(ray)
        try:
            sent = ray.put(given)
        except TypeError as error:
            why = error.__cause__ or error  # Ray's own words repeat all that was to be sent
            raise OperatorError(f"Ray cannot send the federation to its workers: {why}") from None
        kind = ray.remote(num_cpus=1, max_restarts=0)(_Actor)
        self._actors += [kind.remote(sent) for _ in range(workers or cpus)]

    def close(self) -> None:
        """End the actors, and Ray where it was started for them."""
        left = [actor.leave.remote() for actor in self._actors]
        if left:
            self._ray.wait(left, num_returns=len(left), timeout=5)
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors.clear()
        if self._started:
            self._ray.shutdown()

    def mean(self, asked: Asked) -> Summed:
        while True:
            try:
                return joined(self._parts(asked)).mean(self._wire, asked.assignment.kind)
            except Unsuited:
                self._together = False  # for all actors, or the sum would depend on who had which clients

    def _parts(self, asked: Asked) -> Iterator[Part]:
        shares: dict[int, list[str]] = {}
        for client in asked.cohort:
            shares.setdefault(self._actor(client), []).append(client)
        told, version = asked.assignment.model_dump(mode="json"), self._ray.put(asked.version.read_bytes())
        under_way = [
            (share, self._actors[number].part.remote(told, share, version, self._together))
            for number, share in sorted(shares.items())
        ]
        for share, future in under_way:
            answer, sums = self._answer(future, share)
            measured = {name: (total, count) for name, (total, count) in answer["measured"].items()}
            yield Part(sums=sums, weight=answer["weight"], measured=measured)

    def each(self, asked: Asked) -> Iterator[tuple[str, Result]]:
        told, version = asked.assignment.model_dump(mode="json"), self._ray.put(asked.version.read_bytes())
        clients, path = iter(asked.cohort), self._folder / "update.safetensors"
        under_way: list[tuple[str, Any]] = []
        while True:
            for client in islice(clients, AHEAD * len(self._actors) - len(under_way)):
                under_way.append((client, self._actors[self._actor(client)].each.remote(told, client, version)))
            if not under_way:
                return
            client, future = under_way.pop(0)
            answer, update = self._answer(future, [client])
            result = Result.from_json(answer["result"])
            if update is not None:
                path.write_bytes(update)
                result = replace(result, update=path)
            yield client, result

    def _actor(self, client: str) -> int:
        return self._numbers[client] % len(self._actors)

    def _answer(self, future: Any, share: Sequence[str]) -> Any:
        """What an actor answers and the numbers that go with it; raises what went wrong."""
        try:
            answer, numbers = self._ray.get(future)
        except self._ray.exceptions.RayError as error:
            said = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            more = f" or {len(share) - NAMED} others" if len(share) > NAMED else ""
            raise OperatorError(f"Ray lost what trained {' or '.join(share[:NAMED])}{more} ({said})") from None
        if "error" in answer:
            raise error_of(answer)
        return answer, numbers


class _Actor:
    """A worker on some machine of the cluster."""

    def __init__(self, given: _Given) -> None:
        self._federation, recipe, folder = given
        self._recipe = Recipe.model_validate_json(recipe)
        here = Path(folder).is_dir()  # then what this process leaves, should it be killed, goes with the folder
        self._home = Path(mkdtemp(prefix="murmur-ray-", dir=folder if here else memory_disk()))
        self._version = self._home / "version.safetensors"
        self._made: Either | None = None
        self._end = weakref.finalize(self, shutil.rmtree, self._home, ignore_errors=True)

    def leave(self) -> None:
        """Delete the files."""
        self._end()

    def part(self, told: Told, share: list[str], version: bytes, together: bool) -> tuple[Told, dict[str, Array]]:
        def found(either: Either, asked: Asked) -> tuple[Told, dict[str, Array]]:
            part = either.part(asked, together=together)
            return {"weight": part.weight, "measured": part.measured}, part.sums

        return self._tried(found, told, share, version)

    def each(self, told: Told, client: str, version: bytes) -> tuple[Told, bytes | None]:
        def found(either: Either, asked: Asked) -> tuple[Told, bytes | None]:
            ((_, result),) = either.each(asked)
            update = result.update.read_bytes() if result.update is not None else None
            return {"result": result.to_json()}, update

        return self._tried(found, told, [client], version)

    def _tried(self, found: Callable[[Either, Asked], Any], told: Told, share: list[str], version: bytes) -> Any:
        try:
            self._version.write_bytes(version)
            if self._made is None:
                self._made = Either(self._federation, self._recipe, read_layout(self._version), self._home)
            asked = Asked(assignment=Assignment.model_validate(told), cohort=share, version=self._version)
            return found(self._made, asked)
        except Exception as error:
            return told_error(error), None


def _here(workers: int) -> dict[str, Any]:
    """How Ray is started on this machine: its workers import from where this process does."""
    places = os.pathsep.join(filter(None, sys.path))
    return {
        "num_cpus": workers or None,
        "include_dashboard": False,
        "runtime_env": {"env_vars": {"PYTHONPATH": places}},
    }


def _by_value(ray: Any) -> None:
    """Let what the federation is made of travel as it is: a worker may have no file of it.

    That is every module that is neither installed, nor Python's, nor ours.
    """
    installed = (sys.prefix, sys.base_prefix, os.path.dirname(np.__file__))
    for name, module in [*sys.modules.items()]:
        file = getattr(module, "__file__", None)
        if file and not file.startswith(installed) and name.partition(".")[0] not in ("murmur", "__main__"):
            ray.cloudpickle.register_pickle_by_value(module)


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anybody
    try:
        import ray
    except ImportError:
        raise OperatorError('backend = "ray" needs Ray: pip install "murmur[ray]"') from None
    return ray
