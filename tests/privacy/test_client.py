"""A client keeps to its own policy and to the order of the steps, and its upload is what the layout says."""

import numpy as np
import pytest

from murmur.privacy.client import NEXT, Policy, State, Step
from murmur.protocol.errors import BadUpdate, IllegalTransition, PrivacyRefusal
from murmur.protocol.tensors import check_file, map_file, masked_layout, write_chunks


def refuses(reason, call, *args, clients=None):
    with pytest.raises(PrivacyRefusal) as refused:
        call(*args)
    assert refused.value.reason == reason, refused.value.detail
    if clients is not None:
        assert refused.value.facts["clients"] == clients


# Policy: local, whatever the coordinator says


@pytest.mark.parametrize(
    ("policy", "reason"),
    [(Policy(min_clients=3), "policy_min_clients"), (Policy(min_clients=2, min_threshold=4), "policy_threshold")],
)
def test_terms_below_the_own_policy_are_refused(context, join, policy, reason):
    refuses(reason, lambda: join(context(4, min_clients=2), policy=policy))  # t = 3
    join(context(5, min_clients=3), policy=policy)  # t = 4


def test_a_stranger_to_the_cohort_cannot_join(context, join):
    refuses("not_in_cohort", join, context(4), "mallory")


def test_the_same_attempt_is_not_joined_twice(context, join):
    first = join(context(4))
    refuses("joined_before", lambda: join(context(4), joined={first.context_sha256}))
    join(context(4, attempt=2), joined={first.context_sha256})


def test_only_trusted_keys_take_part(fleet, identity):
    trusted = {u: identity(u).public_key().public_bytes_raw() for u in ("c00", "c01", "c02", "c03")}
    for change in ({"c02": bytes(32)}, {"c02": None}):
        pinned = {u: key for u, key in (trusted | change).items() if key is not None}
        round_ = fleet(4, policy=Policy(min_clients=2, trusted=pinned))
        round_.advertise(round_.context.cohort)
        refuses("untrusted", round_.clients["c00"].share, round_.server.roster(round_.adverts), clients=["c02"])
    round_ = fleet(4, policy=Policy(min_clients=2, trusted=trusted))
    round_.until_upload()


def test_a_key_that_changed_since_earlier_rounds_is_refused(fleet, join, identity):
    round_ = fleet(4)
    round_.advertise(round_.context.cohort)
    roster = round_.server.roster(round_.adverts)
    first = round_.clients["c00"]
    first.share(roster)
    assert first.peers == {u: identity(u).public_key().public_bytes_raw() for u in ("c01", "c02", "c03")}
    for known, ok in ((first.peers, True), (first.peers | {"c03": bytes(32)}, False)):
        again = join(round_.context, known=known)
        round_.adverts["c00"] = again.advertise()
        roster = round_.server.roster(round_.adverts)
        if ok:
            again.share(roster)
        else:
            refuses("changed_key", again.share, roster, clients=["c03"])
            assert again.peers == {}


# The state machine


def test_the_table_has_one_way_through():
    assert [NEXT[state, step] for state, step in zip(State, Step, strict=False)] == list(State)[1:8]
    assert len(NEXT) == len(Step) == 7


def test_every_step_out_of_its_order_is_illegal_and_changes_nothing(fleet):
    round_ = fleet(4)
    everyone = round_.context.cohort
    client = round_.clients["c00"]
    aux = round_.aux("c00", 1)
    calls = {
        Step.SHARE: lambda: client.share("{}"),
        Step.OPEN: lambda: client.open("{}"),
        Step.MASK: lambda: client.mask([], weight=1, aux=aux),
        Step.AGREE: lambda: client.agree("{}"),
        Step.REVEAL: lambda: client.reveal("{}"),
    }
    order = [Step.ADVERTISE, Step.SHARE, Step.OPEN, Step.MASK, Step.AGREE, Step.REVEAL]
    phases = [round_.advertise, round_.share, round_.open, round_.upload, round_.agree, round_.reveal]
    for done, phase in enumerate(phases):
        state = client.state
        for step in order[done + 1 :]:
            with pytest.raises(IllegalTransition):
                calls[step]()
            assert client.state is state
        phase(everyone)
    with pytest.raises(IllegalTransition):
        client.mask([], weight=1, aux=aux)
    assert client.state is State.REVEALED


def test_the_same_question_gets_the_same_answer(fleet):
    round_ = fleet(4).until_reveal()
    client = round_.clients["c01"]
    signatures = round_.signatures("c01")
    assert client.advertise() == round_.adverts["c01"]
    assert client.share(round_.server.roster(round_.adverts)) == round_.shares["c01"]
    assert client.agree(round_.told) == round_.agrees["c01"]
    assert client.reveal(signatures) == round_.reveals["c01"]


@pytest.mark.parametrize("step", ["share", "open", "agree", "reveal"])
def test_another_question_at_the_same_step_ends_the_session(fleet, step):
    round_ = fleet(4).until_reveal()
    client = round_.clients["c01"]
    refuses("second_question", getattr(client, step), "{}")
    assert client.state is State.ENDED
    refuses("ended_before", client.reveal, round_.signatures("c01"))


# The upload


@pytest.fixture
def opened(fleet):
    round_ = fleet(5)
    for phase in (round_.advertise, round_.share, round_.open):
        phase(round_.context.cohort)
    return round_


def test_an_upload_is_a_file_of_the_masked_layout(opened, tmp_path):
    layout = masked_layout(opened.context.dim, opened.context.aux)
    client, path = opened.clients["c00"], tmp_path / "update"
    with path.open("wb") as file:
        write_chunks(file, layout, client.mask([opened.values("c00")], weight=1, aux=opened.aux("c00", 1)))
    check_file(path, layout)
    assert client.state is State.MASKED
    assert {name: len(a) for name, a in map_file(path, layout).items()} == {"aux": opened.context.aux, "ring": 100}


@pytest.mark.parametrize("dim", [1, 65536, 65537, 131075])
def test_how_an_update_is_cut_does_not_change_the_upload(fleet, dim):
    bodies = set()
    for cuts in ([], [1], [dim // 3, dim // 2], [min(dim, 65535)], range(0, dim, 40_000)):
        round_ = fleet(3, dim)
        for phase in (round_.advertise, round_.share, round_.open):
            phase(round_.context.cohort)
        pieces = np.split(round_.values("c01"), list(cuts))
        bodies.add(b"".join(round_.clients["c01"].mask(pieces, weight=3, aux=round_.aux("c01", 3))))
    assert len(bodies) == 1


def test_a_value_that_is_not_finite_ends_the_upload(opened):
    values = opened.values("c00")
    values[42] = np.nan
    client = opened.clients["c00"]
    with pytest.raises(BadUpdate, match="element 42 of the update is nan"):
        list(client.mask([values], weight=1, aux=opened.aux("c00", 1)))
    assert client.state is State.ENDED


def test_an_upload_that_broke_off_cannot_be_agreed_on_nor_repeated(opened):
    client = opened.clients["c00"]
    pieces = client.mask([opened.values("c00")], weight=1, aux=opened.aux("c00", 1))
    next(pieces)
    with pytest.raises(IllegalTransition):
        client.agree("{}")
    pieces.close()
    assert client.state is State.ENDED
    with pytest.raises(IllegalTransition):
        client.mask([opened.values("c00")], weight=1, aux=opened.aux("c00", 1))


def test_a_wrong_weight_or_block_is_refused_before_any_keystream_is_used(opened):
    client, aux = opened.clients["c00"], opened.aux("c00", 1)
    with pytest.raises(BadUpdate, match="weighs 1001"):
        client.mask([opened.values("c00")], weight=1001, aux=aux)
    for wrong in (aux[:-1], aux.view(np.int64)):
        with pytest.raises(ValueError, match="uint64"):
            client.mask([opened.values("c00")], weight=1, aux=wrong)
    assert client.state is State.OPENED
