import pytest

from murmur.clients.policy import check_assignment
from murmur.clients.settings import Policy
from murmur.protocol.errors import NotAllowed, PrivacyRefusal
from murmur.protocol.messages import Assignment, Kind, SecureTerms
from murmur.protocol.refusals import REASONS
from murmur.protocol.sections import Train

COHORT = ("a", "b", "c", "d")


def assignment(**terms):
    secure = SecureTerms.model_validate({"cohort": COHORT, "threshold": 3, "min_clients": 3, "clip_value": 8} | terms)
    return Assignment(
        id="x", fence=1, run="r", round=1, attempt=1, kind=Kind.TRAIN, task="digits", model="0" * 64, model_bytes=1,
        train=Train(), mu=0, weighting="uniform", max_weight=1, metrics=(), seed=0, patience_s=1, secure=secure,
    )  # fmt: skip


def check(given, policy=None, me="a", tasks=("digits",)):
    check_assignment(given, me=me, policy=policy or Policy(), tasks=tasks)


def test_a_masked_round_of_an_installed_task_is_taken():
    check(assignment())


def test_a_plain_round_needs_the_sites_leave():
    plain = assignment().model_copy(update={"secure": None})
    with pytest.raises(PrivacyRefusal, match="would read a single update"):
        check(plain)
    with pytest.raises(PrivacyRefusal, match="single site's metrics"):
        check(plain.model_copy(update={"kind": Kind.EVALUATE}))
    check(plain, Policy(require_secure=False))


def test_a_task_must_be_installed_even_for_a_plain_round():
    with pytest.raises(NotAllowed, match=r"'digits' is not installed at this site \(installed: none\)"):
        check(assignment().model_copy(update={"secure": None}), Policy(require_secure=False), tasks=())


@pytest.mark.parametrize(
    ("terms", "policy", "me", "reason"),
    [
        ({}, {}, "e", "not_in_cohort"),
        ({"cohort": ("a", "b", "b", "c")}, {}, "a", "cohort_order"),
        ({}, {"min_clients": 5}, "a", "policy_min_clients"),
        ({"min_clients": 2}, {}, "a", "policy_min_clients"),
        ({}, {"min_threshold": 4}, "a", "policy_threshold"),
        ({"threshold": 2}, {}, "a", "threshold_low"),
        ({"threshold": 5}, {}, "a", "threshold_high"),
        ({"cohort": ("a", "b"), "threshold": 2, "min_clients": 2}, {"min_clients": 2}, "a", "cohort_small"),
    ],
)
def test_terms_that_say_too_much_are_refused(terms, policy, me, reason):
    with pytest.raises(PrivacyRefusal) as refused:
        check(assignment(**terms), Policy(**policy), me=me)
    assert refused.value.reason == reason
    assert reason in REASONS  # pages have a sentence for it


def test_no_setting_takes_a_masked_round_of_two():
    with pytest.raises(PrivacyRefusal):
        check(assignment(cohort=("a", "b"), threshold=2, min_clients=2), Policy(min_clients=2, require_secure=False))
