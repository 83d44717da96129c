"""The site's policy in words, for the people of an organization who read no TOML."""

from __future__ import annotations

from .settings import Policy


def in_words(policy: Policy) -> list[str]:
    """What this site takes part in, one sentence for each thing that its policy decides."""
    p = policy
    said = [
        "It takes part only where the coordinator can read nothing but the sum of all updates."
        if p.require_secure
        else "It takes part in rounds without masks too: there the coordinator reads this site's own update.",
        f"A cohort has {p.min_clients:,} clients or more, and no sum of fewer updates can be read.",
        f"To unmask a sum, {p.min_threshold:,} clients or more have to act together.",
        f"In cohorts where not everybody masks with everybody, it masks with {p.min_degree:,} others or more.",
    ]
    if p.colluders:
        said.append(f"Masks hold even if the coordinator owns {p.colluders:,} of the clients that could unmask it.")
    said.append(
        "A run that asks for the first time is held until somebody here approves it."
        if p.ask
        else "It takes part in every run that this policy allows, without asking anybody."
    )
    if p.trusted:
        said.append(f"The keys of these clients are known here and compared: {', '.join(sorted(p.trusted))}.")
    said.append(
        "The key of a client that it has not met before is believed from then on."
        if p.accept_new
        else "It takes part with clients alone whose keys are written here."
    )
    if p.require_dp or p.epsilon:
        said.append("It takes part only in runs with local differential privacy: noise is added while it trains here.")
    said.append(
        f"Each data set may spend an epsilon of {p.epsilon:g} at delta {p.delta:g}, over all runs together."
        if p.epsilon
        else f"There is no bound on what local differential privacy spends; it is counted at delta {p.delta:g}."
    )
    said.append(
        "In runs with local differential privacy it reports metrics, which that does not cover."
        if p.share_metrics
        else "In runs with local differential privacy it reports no metrics, which that would not cover."
    )
    said.append(
        {
            True: "Of an error the coordinator is told the last lines.",
            "place": "Of an error the coordinator is told its kind and the line of code, none of its words.",
            False: "Of an error the coordinator is told its kind and nothing more.",
        }[p.share_errors]
    )
    said.append(
        "A killed agent finds on disk what it needs to go on inside a round without masks."
        if p.resume
        else "Nothing of a training is kept on disk for an agent that was killed."
    )
    return said
