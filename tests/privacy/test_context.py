"""The terms of a round: which are refused, and that everything in them changes the digest."""

from dataclasses import asdict, fields, replace

import pytest

from murmur.privacy.context import Context
from murmur.protocol.errors import PrivacyRefusal
from murmur.protocol.thresholds import default_threshold


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"cohort": ("b", "a", "c", "d")}, "cohort_order"),
        ({"cohort": ("a", "a", "b", "c")}, "cohort_order"),
        ({"cohort": ("a", "b"), "threshold": 2}, "cohort_small"),
        ({"threshold": 2}, "threshold_low"),  # 2 * 2 = 4 is not above 4
        ({"threshold": 5}, "threshold_high"),
        ({"min_clients": 1}, "min_clients_range"),
        ({"min_clients": 5}, "min_clients_range"),
        ({"dim": -1}, "bad_terms"),
        ({"aux": 0}, "bad_terms"),
        ({"clip_value": 0.0}, "bad_terms"),
        ({"clip_value": float("inf")}, "bad_terms"),
        ({"clip_value": float("nan")}, "bad_terms"),
        ({"max_weight": 0}, "bad_terms"),
    ],
)
def test_terms_that_could_reveal_an_update_are_refused(context, changes, reason):
    with pytest.raises(PrivacyRefusal) as refused:
        context(4, **changes)
    assert refused.value.reason == reason


def test_the_smallest_rounds_have_thresholds_above_half(context):
    assert [default_threshold(n) for n in (3, 4, 5, 10, 50)] == [3, 3, 4, 7, 34]
    for n in range(3, 60):
        context(n)  # would refuse


def test_every_field_of_the_terms_changes_the_digest(context):
    terms = context(4)
    others = {
        "run": "r2",
        "round": 2,
        "attempt": 2,
        "kind": "evaluate",
        "model_sha256": "0" * 64,
        "layout_sha256": "0" * 64,
        "settings_sha256": "0" * 64,
        "dim": 101,
        "aux": 8,
        "cohort": ("c00", "c01", "c02", "c04"),
        "threshold": 4,
        "min_clients": 3,
        "clip_value": 2.0,
        "max_weight": 1001,
        "ring_bits": 24,
        "degree": 2,
        "total_weight": 7000,
    }
    assert others.keys() == {f.name for f in fields(Context)}
    digests = {replace(terms, **{name: value}).digest() for name, value in others.items()}
    assert len(digests | {terms.digest()}) == len(others) + 1


def test_equal_terms_have_one_digest_however_they_were_written(context):
    terms = context(4, clip_value=8, cohort=["c00", "c01", "c02", "c03"])
    assert terms.digest() == context(4, clip_value=8.0).digest() == Context(**asdict(terms)).digest()
