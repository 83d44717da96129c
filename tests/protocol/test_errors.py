import copy

import pytest

from murmur.protocol.errors import (
    BadUpdate,
    InternalError,
    MurmurError,
    NotApproved,
    NotAuthenticated,
    PeerError,
    PrivacyRefusal,
    Replayed,
    TooLate,
    WrongOffset,
    from_problem,
)


def everything(base=MurmurError):
    return [base, *(found for child in base.__subclasses__() for found in everything(child))]


OURS = [kind for kind in everything() if kind.__module__ == "murmur.protocol.errors" and kind is not PrivacyRefusal]


@pytest.mark.parametrize("kind", OURS, ids=lambda kind: kind.__name__)
def test_an_error_comes_back_from_its_problem_document_as_it_went(kind):
    error = kind("7 of 9 bytes", offset=7)
    found = from_problem(error.problem())
    assert type(found) is kind
    assert (found.detail, found.facts, str(found)) == ("7 of 9 bytes", {"offset": 7}, "7 of 9 bytes")


def test_each_code_names_one_class():
    codes = [kind.code for kind in OURS]
    assert len(set(codes)) == len(codes)


def test_a_refusal_keeps_its_reason():
    found = from_problem(PrivacyRefusal("too_few", "2 of 3").problem())
    assert isinstance(found, PrivacyRefusal)
    assert (found.reason, found.detail) == ("too_few", "2 of 3")


def test_an_error_without_words_says_its_title():
    assert NotAuthenticated().problem()["detail"] == "Not authenticated"


@pytest.mark.parametrize(
    ("status", "kind"), [(404, PeerError), (499, PeerError), (500, InternalError), (503, InternalError)]
)
def test_an_unknown_code_becomes_the_branch_of_its_status(status, kind):
    assert type(from_problem({"code": "of_the_future", "status": status})) is kind


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"status": "many"},
        {"status": None, "code": None},
        {"code": ["too_late"], "status": 1e99},
        {"code": "too_late", "self": 1, "kind": 2, "args": 3},
        {"code": "privacy_refusal", "reason": {"a": 1}},
        {"code": "trainer_failed", "rank": 1},
        {"code": "too_late", "detail": {"text": 5}},
    ],
)
def test_a_hostile_problem_document_still_becomes_an_error(document):
    import murmur.clients.trainer  # noqa: F401  its errors take arguments of their own

    assert isinstance(from_problem(document), MurmurError)


def test_branches_are_what_a_caller_can_act_on():
    assert issubclass(Replayed, NotAuthenticated) and issubclass(NotApproved, PeerError)
    assert WrongOffset.status == 409 and TooLate.status == 410 and BadUpdate.status == 422


def test_a_copy_of_an_error_is_whole():  # it is made as for another process
    error = copy.copy(WrongOffset("go on at 5", offset=5))
    assert (type(error), error.facts) == (WrongOffset, {"offset": 5})
