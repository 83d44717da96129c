"""The site's own word: decides on an assignment before a byte of it is downloaded; the coordinator cannot change it."""

from __future__ import annotations

from collections.abc import Collection

from ..protocol.errors import NotAllowed, PrivacyRefusal
from ..protocol.messages import Assignment, Kind, SecureTerms
from ..protocol.thresholds import holders
from .settings import Policy


def check_assignment(assignment: Assignment, *, me: str, policy: Policy, tasks: Collection[str]) -> None:
    """Return when this site may take part; raise NotAllowed or PrivacyRefusal, in words, when it may not.

    me: this client's name. tasks: the names of the tasks that are installed here.
    """
    if assignment.task not in tasks:
        here = ", ".join(sorted(tasks)) or "none"
        raise NotAllowed(f"the task {assignment.task!r} is not installed at this site (installed: {here})")
    if (policy.require_dp or policy.epsilon) and assignment.dp.mode != "local":
        why = "requires it" if policy.require_dp else f"allows its data an epsilon of {policy.epsilon:g}"
        raise PrivacyRefusal("policy_dp", f"the run trains without local differential privacy, and this site {why}")
    if assignment.secure is not None:
        _check_terms(assignment.secure, me, policy)
    elif policy.require_secure:
        what = "a single update" if assignment.kind is Kind.TRAIN else "a single site's metrics"
        raise PrivacyRefusal(
            "policy_plain",
            f"this site takes part in secure rounds only, and in this one the coordinator would read {what}",
        )


def _check_terms(terms: SecureTerms, me: str, policy: Policy) -> None:
    # `privacy` checks most of this again, but only once the model is here.
    cohort, threshold, min_clients, asked = terms.cohort, terms.threshold, terms.min_clients, policy.min_clients
    n, shares = len(cohort), holders(len(cohort), terms.degree)
    if len(set(cohort)) != n:
        raise PrivacyRefusal("cohort_order", "the cohort names a client twice")
    if me not in cohort:
        raise PrivacyRefusal("not_in_cohort", f"{me} is not in the cohort that it was asked to take part in")
    if n < 3:
        raise PrivacyRefusal("cohort_small", f"{n} clients in the cohort: each could read the other's update")
    if n < asked:
        raise PrivacyRefusal("policy_min_clients", f"{n} clients in the cohort, this site asks for {asked}")
    if min_clients < asked:
        raise PrivacyRefusal(
            "policy_min_clients", f"a sum of {min_clients} updates could be read, this site asks for {asked}"
        )
    if threshold < policy.min_threshold:
        raise PrivacyRefusal(
            "policy_threshold", f"{threshold} clients could unmask together, this site asks for {policy.min_threshold}"
        )
    if shares < n and terms.degree < policy.min_degree:
        raise PrivacyRefusal(
            "policy_degree", f"each client masks with {terms.degree} others, this site asks for {policy.min_degree}"
        )
    if 2 * threshold <= shares:
        raise PrivacyRefusal(
            "threshold_low", f"{threshold} of {shares} shares would unmask: two groups could be told different things"
        )
    if 2 * threshold <= shares + policy.colluders:
        raise PrivacyRefusal(
            "policy_colluders",
            f"{threshold} of {shares} shares would unmask: too few if {policy.colluders} of their holders lie",
        )
    if threshold > shares:
        raise PrivacyRefusal("threshold_high", f"{threshold} shares would be needed, {shares} are dealt")
