"""Why either side of a masked round refuses to go on: the reasons that travel in a `PrivacyRefusal`, with their words.

A page puts "refused:" in front of them; "it" is the client that refused, or whose message was refused.
"""

from __future__ import annotations

REASONS: dict[str, str] = {
    # the terms of the round
    "bad_terms": "no update could meet the terms of this round",
    "cohort_order": "the list of the round's clients is not in order",
    "cohort_small": "fewer than three clients, so that each could read the other's update",
    "threshold_low": "so few clients could unmask that two groups could be told different things",
    "threshold_high": "more shares would be needed to unmask than are dealt",
    "min_clients_range": "the smallest sum that may be read is out of range",
    "not_in_cohort": "a client took part that was not asked to",
    # the client's own policy
    "policy_plain": "its policy takes part in masked rounds only",
    "policy_dp": "its policy takes part in runs with local differential privacy only",
    "policy_epsilon": "its data has no epsilon left for this",
    "policy_ask": "somebody there has said no to this run",
    "policy_stopped": "it was stopped by its own people, and takes part in nothing until they resume it",
    "policy_min_clients": "its policy asks for more clients in a sum",
    "policy_threshold": "its policy asks for more clients to unmask together",
    "policy_degree": "its policy asks for more clients to share masks with",
    "policy_colluders": "the clients that its policy distrusts could lie to it with so few shares",
    "joined_before": "it has taken part in this very attempt before",
    "summed_before": "its update was already summed, over other clients",
    "untrusted": "a client takes part whose key it does not trust",
    "changed_key": "a client takes part under another key than before",
    # keys and adverts
    "wrong_context": "a message was made for another round, or for other terms",
    "wrong_session": "a message was made for other participants",
    "bad_signature": "a signature does not belong to its message",
    "bad_key": "a key cannot be used",
    "duplicate_key": "two keys that must differ are the same",
    "own_advert": "its own keys are missing or were changed on the way",
    # shares
    "not_sealed": "a share could not be opened",
    "own_shares": "its own shares are missing or were changed on the way",
    "bad_share": "a share is not the one that was promised",
    "bad_dealer": "a client's shares do not rebuild what it promised",
    # who is summed
    "too_few": "too few clients are left to read the sum of",
    "unknown_survivor": "an update is to be summed of a client that shared no keys",
    "left_out": "its own update is not in the sum that it is asked to unmask",
    "disagreement": "the clients were told different lists of who is in the sum",
    "second_question": "it was asked the same step twice, with different content",
    "ended_before": "it has left this round already",
}
