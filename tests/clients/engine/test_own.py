"""Parts that stay at the site: from round to round, through kills and retries, never in an update."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from murmur.clients.engine.loop import run_job
from murmur.clients.engine.own import LOCAL, load_model, read_own, write_own
from murmur.clients.engine.parts import local_of
from murmur.clients.engine.session import Session
from murmur.clients.engine.state import built, initial_model, map_tensors, parts_of, write_model
from murmur.protocol.errors import OperatorError
from murmur.protocol.tensors import read_layout

from .conftest import tensors
from .test_checkpoint import ALWAYS, ONE, interrupted, resumed, waits
from .test_loop import HARD, apart, size

_ = waits  # a fixture
HEAD = {"local/head.weight", "local/head.bias"}
NORMS = ("trunk.1.*",)
STATISTICS = {f"local/trunk.1.{n}" for n in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}


def kept(job, tmp_path):
    """What a job has left, as its client's next job finds it."""
    return job.own_after.replace(tmp_path / "before")


@pytest.mark.parametrize(("local", "stays"), [(("head.*",), HEAD), (NORMS, STATISTICS)], ids=["head", "FedBN"])
def test_what_stays_at_the_site_is_in_its_own_file_and_not_in_the_update(local, stays, task, make_job):
    personal, job = task("Personal", local=local), make_job("Personal", {"local": local}, **HARD)
    run_job(personal, job)
    everything = {*personal.model().state_dict()}
    assert {*tensors(job.own_after)} == stays
    assert {t.name for t in read_layout(job.update).tensors} == everything - {n.removeprefix(LOCAL) for n in stays}
    assert read_layout(job.model).base == ""  # nothing is frozen, so nothing is compared


def test_two_rounds_at_one_site_are_one_training_of_all_parts(task, make_job, tmp_path):
    # A site by itself: what the server makes of its update is what it had, so nothing may be lost between the rounds.
    whole, split = task(norm=False, dropout=0.0), task("Personal", n=64)
    whole.model = lambda: torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 3))
    split.model, split.local = whole.model, ("1.*",)
    settings = {"batch_size": 64, "epochs": 1, "lr": 0.1}
    whole.n = 64
    initial_model(split, 7, tmp_path / "version")
    initial = load_model(split, tmp_path / "version")
    write_model(initial, tmp_path / "all")
    job = replace(make_job(**settings), model=tmp_path / "version")
    for number in (1, 2, 3):
        run_job(split, replace(job, round=number))
        own = kept(job, tmp_path)
        module = load_model(split, job.model, own)
        with torch.no_grad():
            for name, delta in tensors(job.update).items():
                module.get_parameter(name).add_(delta)
        write_model(module, tmp_path / "version", parts_of(module, split.local))
        job = replace(job, own=own)
    run_job(whole, replace(make_job(**settings | {"epochs": 3}), model=tmp_path / "all"))
    wanted = {n: t + initial.state_dict()[n] for n, t in tensors(job.update).items()}
    found = {n: t.detach() for n, t in module.state_dict().items()}
    assert size({n: found[n] - built(split).state_dict()[n] for n in ("1.weight",)}) > 0.01
    assert apart(found, wanted) < 1e-6
    assert map_tensors(tmp_path / "version", read_layout(tmp_path / "version")).keys() == {"0.weight", "0.bias"}


def test_evaluation_uses_the_sites_own_parts(task, make_job, tmp_path):
    personal, job = task("Personal"), make_job("Personal", **HARD | {"epochs": 8, "lr": 0.5})
    run_job(personal, job)
    ask = replace(job, kind="evaluate", own=kept(job, tmp_path))
    own, start = (run_job(personal, replace(ask, own=path)).metrics["loss"][0] for path in (ask.own, None))
    module, (x, y) = load_model(personal, ask.model, ask.own), personal.data("test").tensors
    with torch.no_grad():
        assert own == pytest.approx(float(torch.nn.functional.cross_entropy(module(x), y, reduction="sum")), rel=1e-5)
    assert abs(own - start) > 0.1
    assert not ask.own_after.exists()


def test_the_clients_of_one_session_have_a_head_each(task, make_job, tmp_path):
    session, job = Session(), make_job("Personal", **HARD)
    north, south = task("Personal"), task("Personal")
    found = {}
    for client, which in (("north", north), ("south", south), ("north again", north)):
        run_job(which, replace(job, client=client.split()[0]), session=session)
        found[client] = tensors(kept(job, tmp_path))
    assert all(torch.equal(found["north"][n], found["north again"][n]) for n in HEAD)
    assert apart(found["north"], found["south"]) > 1e-3


def test_a_round_that_is_tried_again_begins_with_the_same_parts(task, make_job, tmp_path):
    personal, session, job = task("Personal"), Session(), make_job("Personal", **HARD)
    run_job(personal, job, session=session)
    own = replace(job, round=2, own=kept(job, tmp_path))
    run_job(personal, own, session=session)
    first = own.own_after.read_bytes(), own.update.read_bytes()
    own.own_after.write_bytes(b"half a file of a killed start")
    run_job(personal, own, session=session)
    assert (own.own_after.read_bytes(), own.update.read_bytes()) == first


def test_a_killed_round_ends_in_the_same_parts(task, make_job, tmp_path, waits):
    personal, job = task("Personal", local=["*.1.*", "head.*"]), None
    job = make_job("Personal", {"local": ["*.1.*", "head.*"]}, batch_size=16, epochs=3)
    run_job(personal, job)
    wanted = job.update.read_bytes(), job.own_after.read_bytes()
    job = replace(job, checkpoint=tmp_path / "kept", checkpoint_s=ALWAYS, digest=ONE)
    interrupted(personal, job, 8)
    assert resumed(personal, job)[1] == 9
    assert (job.update.read_bytes(), job.own_after.read_bytes()) == wanted


def test_two_ranks_leave_the_same_parts_as_one(task, make_job, alone, in_ranks, tmp_path):
    job = make_job("TwoHeads")
    found = []
    for run in (alone, in_ranks):
        run("TwoHeads", **HARD)
        found.append(tensors(kept(job, tmp_path)))
    assert size(found[0]) > 0.01 and apart(*found) < 1e-6


def test_tensors_of_other_prefixes_stay_in_the_file(task, make_job, tmp_path):
    personal, job = task("Personal"), make_job("Personal", **HARD)
    write_own(job, "control/", {"head.weight": torch.ones(2)})
    job = replace(job, own=kept(job, tmp_path))
    run_job(personal, job)
    found = tensors(job.own_after)
    assert {*found} == HEAD | {"control/head.weight"} and found["control/head.weight"].tolist() == [1, 1]
    write_own(job, "control/", {"bias": torch.zeros(1)})  # another writer of the same job
    assert {*tensors(job.own_after)} == HEAD | {"control/bias"}
    assert {*read_own(job.own_after, LOCAL)} == {n.removeprefix(LOCAL) for n in HEAD}


def test_what_was_kept_of_another_model_or_is_damaged_is_told(task, make_job, tmp_path):
    personal, job = task("Personal"), make_job("Personal", **HARD)
    for name, tensor in (("head.weight", torch.zeros(2)), ("tail", torch.zeros(2))):
        write_own(replace(job, own=None), LOCAL, {name: tensor})
        with pytest.raises(OperatorError, match=f"does not fit the task's: .*kept: {name}; the task's: head.weight, "):
            run_job(personal, replace(job, own=kept(job, tmp_path)))
    (tmp_path / "before").write_bytes(b"damaged")
    with pytest.raises(OperatorError, match="what this site has kept of the run cannot be read"):
        run_job(personal, replace(job, own=tmp_path / "before"))
    with pytest.raises(OperatorError, match="NaN or infinity"):
        write_own(job, LOCAL, {"head.weight": torch.tensor([float("nan")])})


@pytest.mark.parametrize(
    ("local", "words"),
    [
        (("haed.*",), r"local names 'haed\.\*', which fits no tensor"),
        ("head.*", r"local is 'head\.\*': write a tuple"),
        ((3,), "write a tuple"),
        (("*",), "nothing of the task's model would travel"),
    ],
)
def test_patterns_that_cannot_be_meant_are_told_before_a_run(local, words, task, tmp_path):
    personal = task("Personal")
    personal.local = local
    with pytest.raises(OperatorError, match=words):
        initial_model(personal, 7, tmp_path / "m")


def test_a_tensor_that_is_tied_to_a_local_one_does_not_leave(task):
    model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(5, 3), "head": torch.nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    with pytest.raises(OperatorError, match=r"'head\.weight' of the model stays at the site, and 'embed\.weight'"):
        parts_of(model, ("head.*",))
    assert parts_of(model, ("*",)).local == ("embed.weight",)
    assert local_of(task()) == ()


def test_the_proximal_pull_leaves_local_parts_alone(task, make_job, tmp_path):
    # A pull of 1 / lr brings a parameter that it holds back to the version at every step; the head is not held.
    personal, job = task("TwoHeads"), make_job("TwoHeads", **HARD)
    start = {LOCAL + n: t for n, t in built(personal).state_dict().items() if n.startswith("heads")}
    moved = []
    for mu in (0.0, 9.9):
        run_job(personal, replace(job, mu=mu))
        moved.append((size(tensors(job.update)), apart(tensors(kept(job, tmp_path)), start)))
    (free, head), (held, head_held) = moved
    assert held < free / 2 and head_held > 0.9 * head


# Two heads


def test_a_head_is_moved_by_its_own_tasks_examples_alone(task, make_job, tmp_path):
    for only, still in ((0, "two"), (1, "one")):
        job, session = make_job("TwoHeads", {"only": only}, **HARD), Session()
        one = task("TwoHeads", only=only)
        session.load(one, job)
        before = {n: t.clone() for n, t in session.module.state_dict().items()}
        run_job(one, job, session=session)
        moved = {n for n, t in session.module.state_dict().items() if not torch.equal(t, before[n])}
        assert not any(still in n for n in moved) and len([n for n in moved if n.startswith("heads")]) == 2
        assert size({"trunk": tensors(job.update)["trunk.weight"]}) > 1e-3
        assert not any("heads" in t.name for t in read_layout(job.update).tensors)


def test_learned_weights_of_tasks_travel_and_heads_do_not(alone, make_job):
    update, _ = alone("TwoHeads", {"learned": True}, **HARD)
    assert {*update} == {"trunk.weight", "trunk.bias", "weights.log_variance"}
    assert size({"s": update["weights.log_variance"]}) > 1e-3
