import pytest

from murmur.protocol.errors import OperatorError
from murmur.protocol.recipe import Recipe, load_recipe, parse_recipe

SMALLEST = {"name": "digits", "task": "digits", "cohort": {"min": 3}}


def test_the_smallest_recipe_is_masked_fedavg():
    recipe = parse_recipe(SMALLEST)
    assert (recipe.secure.on, recipe.strategy.name, recipe.strategy.server, recipe.rounds) == (
        True,
        "fedavg",
        "SGD",
        10,
    )


def test_a_recipe_comes_back_from_its_json():
    recipe = parse_recipe({**SMALLEST, "train": {"lr": 0.1, "optimizer_options": {"momentum": 1, "nesterov": True}}})
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    options = recipe.train.optimizer_options
    assert options == {"momentum": 1.0, "nesterov": True}
    assert type(options["momentum"]) is float and type(options["nesterov"]) is bool


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"round": 3}, "round: there is no such key; 'rounds' is near"),
        ({"train": {"learning_rate": 0.1}}, "train.learning_rate: there is no such key; there are epochs, steps,"),
        (
            {"train": {"mixture": {"temprature": 2}}},
            "train.mixture.temprature: there is no such key; 'temperature' is near",
        ),
        ({"cohort": {"min": 2}}, "needs cohort.min of 3 or more"),
        ({"cohort": {"min": 5, "size": 4}}, "cohort.min = 5 is more than cohort.size = 4"),
        ({"strategy": {"mu": 0.1}}, 'name = "fedprox"'),
        ({"train": {"lr": float("nan")}}, "train.lr"),
        (
            {"cohort": {"min": 3, "size": 200, "over_select": 1.5}, "secure": {"ring_bits": 16, "threshold": 120}},
            "ring_bits = 16 is too small for 300 clients: their sum leaves 7 bits of a value, 8 are needed",
        ),
        ({"secure": {"ring_bits": 20}}, "secure.ring_bits: Input should be 16, 24 or 32"),
        ({"train": {"steps": 5, "epochs": 2}}, "train.steps takes the place of train.epochs"),
        ({"train": {"micro_batch": "most"}}, "train.micro_batch"),
        ({"train": {"compile": "gcc"}}, "train.compile"),
        ({"parallel": {"reduce": "bf16"}, "dp": {"mode": "local"}}, 'set parallel.reduce = "allreduce"'),
        ({"parallel": {"reduce": "ring"}}, "parallel.reduce: Input should be 'allreduce', 'bf16'"),
        ({"parallel": {"sync_every": 4}}, 'sync_every is for local-sgd and gossip: reduce = "allreduce" exchanges'),
        ({"name": "../x"}, "name: String should match"),
        ({"rounds": 0}, "rounds: Input should be greater"),
        ({"seed": 1 << 63}, "seed: Input should be less"),
    ],
)
def test_what_cannot_work_is_named(change, words):
    with pytest.raises(OperatorError, match=words.replace("(", r"\(").replace(".", r"\.")):
        parse_recipe({**SMALLEST, **change})


def test_what_release_0_1_0_did_not_know_is_not_told_to_it_unless_it_is_asked_for():
    plain = parse_recipe(SMALLEST).model_dump(mode="json")
    assert not {"steps", "compile"} & plain["train"].keys() and plain["parallel"] == {"data": 0}
    asked = {"train": {"steps": 5, "compile": True}, "parallel": {"reduce": "gossip", "sync_every": 4}}
    recipe = parse_recipe(SMALLEST | asked)
    assert recipe.model_dump(mode="json")["parallel"] == {"data": 0, "reduce": "gossip", "sync_every": 4}
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    assert (recipe.train.steps, recipe.train.compile, recipe.parallel.local) == (5, True, True)


GROUPED = {"cohort": {"min": 15}, "secure": {"groups": 5}, "strategy": {"combine": "median"}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"secure": {}}, 'strategy.combine = "median" looks at single updates, .*: set secure.groups = 5 or so, .* or'),
        ({"secure": {"groups": 5, "on": False}}, "secure.groups is for masked runs"),
        ({"strategy": {"combine": "krum"}}, 'with strategy.combine = "krum" .*: set combine = "median" or'),
        ({"strategy": {}}, 'with strategy.combine = "mean" would tell more'),
        ({"secure": {"groups": 2}}, "secure.groups = 2: with fewer than 3"),
        (
            {"cohort": {"min": 14}},
            "secure.groups = 5 needs cohort.min of 15 or more, 3 clients in each group: it is 14",
        ),
        ({"secure": {"groups": 5, "threshold": 3}}, "leaves secure.threshold at 0"),
        ({"cohort": {"min": 15, "size": 15, "over_select": 1.2}}, "cohort.over_select at 1: each group"),
        (
            {
                "dp": {"mode": "central"},
                "cohort": {"min": 15, "size": 15},
                "secure": {"on": False},
                "strategy": {"combine": "median", "weighting": "uniform"},
            },
            'dp.mode = "central" reckons its noise for a sum',
        ),
        (
            {"secure": {"on": False}, "strategy": {"combine": "krum", "byzantine": 7}},
            "strategy.byzantine = 7 needs 17 updates.* cohort.min = 15 is too few",
        ),
        ({"secure": {"on": False}, "strategy": {"combine": "krum", "selected": 16}}, "no more than n - byzantine"),
        ({"strategy": {"combine": "trimmed_mean", "trim": 0.5}}, "strategy.trim: Input should be less"),
    ],
)
def test_a_rule_that_cannot_be_is_refused_with_what_can(change, words):
    assert parse_recipe(SMALLEST | GROUPED).fewest == 3
    with pytest.raises(OperatorError, match=words):
        parse_recipe(SMALLEST | GROUPED | change)


def test_a_plain_run_takes_any_rule_and_groups_grow_with_the_cohort():
    for combine in ("median", "trimmed_mean", "krum"):
        values = {"secure": {"on": False}, "strategy": {"combine": combine, "byzantine": 6, "selected": 9}}
        assert parse_recipe(SMALLEST | {"cohort": {"min": 15}} | values).strategy.combine == combine
    recipe = parse_recipe(SMALLEST | GROUPED | {"cohort": {"min": 29}})
    assert (recipe.fewest, recipe.secure.fewest_groups) == (5, 3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"train": {"optimizer": "Adam"}},
            'is exact with SGD only, .*: Adam has other steps. Set train.optimizer = "SGD"',
        ),
        ({"train": {"optimizer_options": {"momentum": 0.9}}}, "momentum blurs: leave it out"),
        ({"train": {"clip_norm": 1.0}}, "clipping bends: set train.clip_norm = 0"),
        ({"strategy": {"name": "scaffold", "combine": "median"}, "secure": {"on": False}}, 'combine = "mean"'),
        (
            {
                "dp": {"mode": "central"},
                "cohort": {"size": 4},
                "strategy": {"name": "scaffold", "weighting": "uniform", "population": 4},
            },
            'dp.mode = "central" would cover only the update',
        ),
        ({"cohort": {"size": 5}}, "asks 5 clients in a round .*: set strategy.population to the number of clients"),
        ({"strategy": {"name": "scaffold", "mu": 0.1}}, "mu belongs to FedProx"),
        ({"strategy": {"name": "fedavg", "population": 9}}, "population belongs to SCAFFOLD"),
        ({"strategy": {"name": "fednova"}, "train": {"optimizer": "Adam"}}, "is exact with SGD only"),
        ({"strategy": {"name": "fednova"}, "dp": {"mode": "local"}}, "how many steps were taken, without noise"),
        ({"train": {"distill": {"weight": 1}}, "dp": {"mode": "local"}}, "train.distill is not for dp.mode"),
        ({"train": {"distill": {"weight": -1}}}, "train.distill.weight: Input should be greater"),
    ],
    ids=str,
)
def test_a_local_algorithm_that_would_not_be_exact_is_refused_with_the_way_out(change, words):
    base = {**SMALLEST, "strategy": {"name": "scaffold"}}
    assert parse_recipe(base).strategy.algorithm == "scaffold"
    with pytest.raises(OperatorError, match=words):
        parse_recipe(base | change)


def test_what_local_algorithms_do_take():
    nova = parse_recipe(
        {**SMALLEST, "strategy": {"name": "fednova"}, "train": {"optimizer_options": {"momentum": 0.9}}}
    )
    assert nova.strategy.algorithm == "fednova"
    decayed = {"optimizer_options": {"weight_decay": 0.01}}
    some = {"strategy": {"name": "scaffold", "population": 9}, "cohort": {"size": 5}, "train": decayed}
    assert parse_recipe({**SMALLEST, **some}).strategy.population == 9
    assert parse_recipe({**SMALLEST, "strategy": {"name": "fedprox", "mu": 1}}).strategy.algorithm == "plain"


def test_two_clients_may_take_part_in_the_open():
    assert parse_recipe({**SMALLEST, "cohort": {"min": 2}, "secure": {"on": False}}).cohort.min == 2


def test_changes_override_the_file(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text('name = "a"\ntask = "t"\n[cohort]\nmin = 3\n[train]\nlr = 0.1\n')
    recipe = load_recipe(path, train__lr=0.5, train__epochs=2, rounds=4)
    assert (recipe.train.lr, recipe.train.epochs, recipe.rounds) == (0.5, 2, 4)


@pytest.mark.parametrize(
    ("text", "changes", "words"),
    [
        ("name = ", {}, "is not TOML"),
        ('name = "\udcff"', {}, "is not TOML"),
        ('name = "a"\ntask = "t"\ntrain = 5\n', {"train__lr": 0.5}, "train is a table"),
        ('name = "a"\ntask = "t"\n', {"cohort__min": 2}, "needs cohort.min of 3"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path, text, changes, words):
    path = tmp_path / "recipe.toml"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(OperatorError, match=words):
        load_recipe(path, **changes)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(OperatorError, match=r"cannot read the recipe .*none\.toml: No such file"):
        load_recipe(tmp_path / "none.toml")


def test_a_small_ring_bounds_how_many_are_asked_at_once():
    asked = {bits: parse_recipe(SMALLEST | {"secure": {"ring_bits": bits}}).asked for bits in (16, 24, 32)}
    assert asked == {16: 255, 24: 65_535, 32: (1 << 24) - 1}  # 8 bits of a value are left of each
    assert parse_recipe(SMALLEST | {"secure": {"on": False}}).asked == 0
    assert parse_recipe(SMALLEST | {"cohort": {"min": 3, "size": 10}}).asked == 10
