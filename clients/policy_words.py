"""The site's policy in words, for the people of an organization who read no TOML."""

from __future__ import annotations

from ..web.language import _
from .settings import Policy


def in_words(policy: Policy) -> list[str]:
    """What this site takes part in, one sentence for each thing that its policy decides."""
    p = policy
    said = [
        _("It takes part only where the coordinator can read nothing but the sum of all updates.")
        if p.require_secure
        else _("It takes part in rounds without masks too: there the coordinator reads this site's own update."),
        _("A cohort has {n:,} clients or more, and no sum of fewer updates can be read.", n=p.min_clients),
        _("To unmask a sum, {n:,} clients or more have to act together.", n=p.min_threshold),
        _("In cohorts where not everybody masks with everybody, it masks with {n:,} others or more.", n=p.min_degree),
    ]
    if p.colluders:
        said.append(
            _("Masks hold even if the coordinator owns {n:,} of the clients that could unmask it.", n=p.colluders)
        )
    said.append(
        _("A run that asks for the first time is held until somebody here approves it.")
        if p.ask
        else _("It takes part in every run that this policy allows, without asking anybody.")
    )
    if p.trusted:
        said.append(
            _("The keys of these clients are known here and compared: {names}.", names=", ".join(sorted(p.trusted)))
        )
    said.append(
        _("The key of a client that it has not met before is believed from then on.")
        if p.accept_new
        else _("It takes part with clients alone whose keys are written here.")
    )
    if p.require_dp or p.epsilon:
        said.append(
            _("It takes part only in runs with local differential privacy: noise is added while it trains here.")
        )
    said.append(
        _(
            "Each data set may spend an epsilon of {epsilon:g} at delta {delta:g}, over all runs together.",
            epsilon=p.epsilon,
            delta=p.delta,
        )
        if p.epsilon
        else _(
            "There is no bound on what local differential privacy spends; it is counted at delta {delta:g}.",
            delta=p.delta,
        )
    )
    said.append(
        _("In runs with local differential privacy it reports metrics, which that does not cover.")
        if p.share_metrics
        else _("In runs with local differential privacy it reports no metrics, which that would not cover.")
    )
    said.append(
        {
            True: _("Of an error the coordinator is told the last lines."),
            "place": _("Of an error the coordinator is told its kind and the line of code, none of its words."),
            False: _("Of an error the coordinator is told its kind and nothing more."),
        }[p.share_errors]
    )
    said.append(
        _("A killed agent finds on disk what it needs to go on inside a round without masks.")
        if p.resume
        else _("Nothing of a training is kept on disk for an agent that was killed.")
    )
    return said
