"""Where a simulation's clients come from: mappings, sequences, functions, folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tasks

from murmur.protocol.errors import OperatorError
from murmur.simulation import as_federation, find_federation, simulate

TASKS = str(Path(tasks.__file__))


def test_a_mapping_gives_its_names_in_sorted_order() -> None:
    made = as_federation({"b": lambda: tasks.Line(1, 5), "a": tasks.Line(0, 5)})
    assert made.ids == ("a", "b")
    assert len(made.task("b").data("train")) == 5  # pyright: ignore[reportArgumentType]


def test_places_in_a_sequence_become_ids_whose_order_is_theirs() -> None:
    made = as_federation([tasks.Line(k, 5 + k) for k in range(11)])
    assert made.ids[:3] == ("client-00", "client-01", "client-02")
    assert made.ids[10] == "client-10"
    assert made.task("client-10") is made.task("client-10")


def test_anything_with_a_length_and_places_will_do() -> None:
    class Thousand:
        def __len__(self) -> int:
            return 1000

        def __getitem__(self, number: int) -> Any:
            return tasks.Line(number, 4)

    history = simulate(Thousand(), rounds=2, cohort=5, seed=1)
    assert history.clients == 1000
    assert len(history.rounds[1].cohort) == 5


def test_a_function_gets_clients_and_options() -> None:
    assert len(as_federation(tasks.federation, 5, {"shift": 2})) == 5
    assert len(as_federation(lambda: tasks.federation(2), 5)) == 2  # it takes no number of clients


def test_a_target_is_a_file_and_a_function_or_a_folder_with_a_recipe(tmp_path: Path) -> None:
    made, recipe = find_federation(f"{TASKS}:federation", 4)
    assert (len(made), recipe) == (4, None)
    (tmp_path / "helper.py").write_text("N = 2\n")
    (tmp_path / "task.py").write_text(
        "import helper\nfrom tasks import Line\n\ndef federation():\n    return [Line(k, 5) for k in range(helper.N)]\n"
    )
    (tmp_path / "recipe.toml").write_text('name = "x"\ntask = "x"\nrounds = 7\n[secure]\non = false\n')
    made, recipe = find_federation(str(tmp_path))
    assert len(made) == 2
    assert recipe is not None
    assert recipe.rounds == 7


def test_mistakes_are_told_in_words(tmp_path: Path) -> None:
    cases: list[tuple[Any, dict[str, Any], str]] = [
        ({}, {}, "no clients"),
        ([], {}, "no clients"),
        ({"Site A": tasks.Line(0, 5)}, {}, "no client's name"),
        ([tasks.Line(0, 5)], {"clients": 2}, "has 1 clients, 2 were asked"),
        (tasks.Line(0, 5), {}, "one task is one client"),
        ([tasks.Line(0, 5)], {"options": {"shift": 1}}, "one already"),
        (tasks.federation, {"options": {"shifty": 1}}, "It takes: clients, shift"),
        ([lambda: 3], {}, "not a task"),
        (str(tmp_path), {}, "no task.py"),
        (f"{TASKS}:federations", {}, "no 'federations'"),
    ]
    for source, arguments, said in cases:
        with pytest.raises(OperatorError, match=said):
            simulate(source, rounds=1, **arguments)
