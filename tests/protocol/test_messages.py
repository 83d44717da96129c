import pytest
from pydantic import ValidationError

from murmur.protocol.messages import (
    Assignment,
    Complete,
    Enrol,
    Failure,
    Kind,
    Poll,
    Progress,
    Step,
    StepKind,
    UploadOffer,
    Work,
)
from murmur.protocol.sections import Distill, Train

ASSIGNMENT = Assignment(
    id="run1.3.1.a",
    fence=1,
    run="run1",
    round=3,
    attempt=1,
    kind=Kind.TRAIN,
    task="digits",
    model="0" * 64,
    model_bytes=100,
    train=Train(),
    mu=0.0,
    weighting="examples",
    max_weight=1000,
    metrics=("loss",),
    seed=5,
    patience_s=60,
    secure=None,
)


@pytest.mark.parametrize(
    "message",
    [
        ASSIGNMENT,
        Work(assignment=ASSIGNMENT, void=("a:1",), next_poll_s=2.5),
        Step(kind=StepKind.ROSTER, body="{}"),
        Poll.model_validate({"info": {"version": "1"}, "busy": {"a:1": {"phase": "training", "step": 3}}}),
        Complete.model_validate({"fence": 1, "sha256": "0" * 64, "metrics": {"loss": {"sum": 1.5, "count": 3}}}),
    ],
    ids=lambda message: type(message).__name__,
)
def test_a_message_comes_back_from_its_json(message):
    assert type(message).model_validate_json(message.model_dump_json()) == message


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (Progress, {"phase": "training", "steps": 1, "colour": "red"}),
        (Progress, {"phase": "sleeping"}),
        (Progress, {"phase": "training", "step": -1}),
        (UploadOffer, {"fence": 1, "sha256": "0" * 63, "size": 1}),
        (UploadOffer, {"fence": 1, "sha256": "A" * 64, "size": 1}),
        (UploadOffer, {"fence": 0, "sha256": "0" * 64, "size": 1}),
        (UploadOffer, {"fence": 1, "sha256": "0" * 64, "size": 0}),
        (Complete, {"fence": 1, "sha256": "0" * 64, "weight": float("nan")}),
        (Complete, {"fence": 1, "sha256": "0" * 64, "weight": -1}),
        (Complete, {"fence": 1, "sha256": "0" * 64, "metrics": {"loss": {"sum": float("inf"), "count": 1}}}),
        (Failure, {"fence": 1, "code": "a b", "detail": ""}),
        (Failure, {"fence": 1, "code": "a", "detail": "x" * 4097}),
        (Enrol, {"token": "t" * 20, "name": "A/../b", "public_key": "", "info": {"version": ""}}),
        (Enrol, {"token": "short", "name": "a", "public_key": "", "info": {"version": ""}}),
    ],
)
def test_what_a_message_does_not_allow_is_refused(kind, values):
    with pytest.raises(ValidationError):
        kind.model_validate(values)


@pytest.mark.parametrize("reference", ["../x", "a/b", "", "a b", "é", "a\n"])
def test_an_assignments_name_can_never_leave_its_place_in_a_path(reference):
    with pytest.raises(ValidationError):
        Assignment.model_validate({**ASSIGNMENT.model_dump(), "id": reference})


def test_a_message_is_never_changed():
    with pytest.raises(ValidationError):
        ASSIGNMENT.fence = 2


@pytest.mark.parametrize(
    "change",
    [
        {"mu": 0.1},
        {"seed": 6},
        {"weighting": "uniform"},
        {"metrics": ("loss", "accuracy")},
        {"train": Train(lr=0.5)},
        {"train": Train(distill=Distill(weight=1))},
        {"algorithm": "scaffold"},
    ],
    ids=str,
)
def test_all_that_decides_the_training_is_in_its_digest(change):
    assert ASSIGNMENT.model_copy(update=change).settings_sha256() != ASSIGNMENT.settings_sha256()


def test_what_earlier_releases_do_not_know_stays_out_where_nothing_asks_for_it():
    assert "algorithm" not in ASSIGNMENT.model_dump() and "distill" not in ASSIGNMENT.model_dump()["train"]
    assert "algorithm" not in ASSIGNMENT.settings() and "distill" not in ASSIGNMENT.settings()["train"]


def test_effective_steps_are_reported_where_the_server_needs_them():
    assert ASSIGNMENT.reported == ("train_loss", "loss")
    assert ASSIGNMENT.model_copy(update={"algorithm": "fednova"}).reported == ("train_loss", "local_steps", "loss")


def test_who_trains_is_not_in_the_settings_digest():
    other = ASSIGNMENT.model_copy(update={"id": "run1.3.1.b", "fence": 9, "patience_s": 5})
    assert other.settings_sha256() == ASSIGNMENT.settings_sha256()
    assert len(other.settings_sha256()) == 64
