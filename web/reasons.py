"""What a coordinator, or a site on its own page, gives as a reason, in the viewer's language.

They keep their reasons in English, with their numbers, as their logs have them too. Those of a known shape are said in
the viewer's language; any other stays as it is.
"""

from __future__ import annotations

import re
from functools import cache

from .language import ENGLISH, _, spoken

# As they are written in coordinator/, clients/ and privacy/, with a name for each value; test_reasons.py compares.
SENTENCES = (
    "not heard for {s} s while {state}",
    "no progress for {s} s while {state}",
    "{n} clients are online, {needed} are needed",
    "{n} of {groups} groups have {fewest} clients online, {needed} groups are needed",
    "{n} groups left while {state}, {needed} needed",
    "{n} clients left while {state}, {needed} needed",
    "while {state}, fewer than {threshold} clients are left that hold shares of {clients}: the sum cannot be unmasked",
    "the round had enough updates before this one came",
    "the disk of the coordinator's blobs is full: {what}. Free some space or move the blobs to a larger disk; "
    "nothing is lost, and work goes on where it stopped once there is room",
    "the disk of the coordinator's blobs is full: {what}",
    "{free} are free and {needed} are needed",
    "{free} are free",
    "it got through a part of its work, which does not count",
    "its update began from too old a version",
    "it left in the midst of its work",
    "its hours ended in the midst of its work",
    "it crashed in the midst of its work",
    "stopped by {by}",
    "interrupted ({what}): murmur simulate --resume {run} goes on",
    "its process was killed",
    "no run {run}",
    "run {run} has no round {n}",
    "there is no version {n} of a run {run}",
    "no client named {client}",
    "no run is named {model}, so there is no such model",
    "somebody else moved {alias} at this moment: look again",
    "there is a user named {user} already",
    "no user named {user}",
    "the password until now is another one",
    "a password has 12 characters or more",
    "there is no such session or token; it may have ended",
    "this is the last admin: make somebody else one first",
    # what is wrong with an audit log
    "entry {n} stands where entry {wanted} should",
    "entry {n} does not follow from entry {before}: it names another hash",
    "entry {n} was changed: its hash does not fit what it says",
    "entry {n} is another one than what was kept of it",
    "the log ends at entry {n}, but entry {kept} was kept: its end was cut off",
    # how an epsilon is to be read
    "Client-level: whoever sees the models learns little about what any one organization put into them, all of "
    "its data together. That it took part is no secret.",
    "the coordinator sees the sum without noise and is trusted to add it",
    "all clients in a sum add their part of the noise and keep it to themselves",
    "all clients in a sum but {n} add their part of the noise and keep it to themselves",
    "every client runs the agreed software, which clips its update",
    "the coordinator sees single updates; it refuses those above the bound",
    "it covers the models; the cohort's metrics and who took part are shown as they are",
    "sampling is not counted in its favour",
    "neighbours differ in {whose}: present or absent",
    "neighbours differ in {whose}: replaced by another",
    "one client's whole participation",
    "one training example",
    "who was sampled stays secret, also from those who are sampled",
    # why a site did not do what it was asked for
    "the task {task} is not installed at this site (installed: {here})",
    "the run trains without local differential privacy, and this site {why}",
    "requires it",
    "allows its data an epsilon of {epsilon}",
    "this site takes part in secure rounds only, and in this one the coordinator would read {what}",
    "a single update",
    "a single site's metrics",
    "{n} clients in the cohort: each could read the other's update",
    "{n} clients in the cohort, this site asks for {asked}",
    "a sum of {n} updates could be read, this site asks for {asked}",
    "{n} clients could unmask together, this site asks for {asked}",
    "each client masks with {n} others, this site asks for {asked}",
    "with this training the data would have spent an epsilon of {epsilon} at delta {delta}, and this site allows "
    "{allowed}",
    "somebody at this site has said no to run {run}",
    "somebody there has stopped it; it takes part in nothing until it is resumed",
    "{client} takes part with the key {key}, which this site does not trust",
    "no run {run} has asked for this site's consent",
    "{month} is no month: write it as 2026-11",
)
STATES = {
    "selecting": "choosing clients",
    "keys": "exchanging keys",
    "shares": "storing key backups",
    "collecting": "training and sending",
    "agreeing": "agreeing on who sent",
    "revealing": "unmasking the sum",
    "aggregating": "adding up",
}


def told(text: str) -> str:
    """A reason, or another sentence of the coordinator, as it is shown."""
    english = spoken() == ENGLISH
    for sentence, shape in _shapes():
        if english and "{state}" not in sentence:
            continue  # it is said as it is stored; a state is a word of the code
        if found := shape.fullmatch(text):
            values = found.groupdict()
            if "state" in values:
                values["state"] = _(STATES.get(values["state"], values["state"]))
            values |= {name: told(values[name]) for name in ("what", "whose", "why") if name in values}
            return _(sentence, **values)
    return text


@cache
def _shapes() -> list[tuple[str, re.Pattern[str]]]:
    return [
        (sentence, re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>[^:]+?)", re.escape(sentence)))) for sentence in SENTENCES
    ]
