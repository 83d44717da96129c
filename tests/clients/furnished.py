"""A site whose record has one of everything that its page shows."""

from __future__ import annotations

import json
from hashlib import sha256

import httpx

from murmur.clients.ledger import training_event
from murmur.clients.record import terms_of
from murmur.clients.settings import Policy
from murmur.clients.shared import Site
from murmur.protocol.messages import Assignment, Kind, SecureTerms
from murmur.protocol.sections import Dp, Train

from .scripted import A

MODEL = "ab" * 32
SECURE = SecureTerms(cohort=("alpha", "beta", "gamma"), threshold=2, min_clients=3, clip_value=8.0)
LOCAL = Dp(mode="local", clip_norm=1.0, noise_multiplier=4.0)
MASKED = A.model_copy(update={"id": "masked.1.1.alpha", "run": "masked", "task": "digits", "model": MODEL,
                              "model_bytes": 250_000, "secure": SECURE, "metrics": ("accuracy",)})  # fmt: skip
# Runs by what became of them, each with why.
ENDS = {"late": "it is late", "refused": "it is refused", "failed": "it failed", "delivered": ""}
PAGES = ("/", "/sent", "/policy", "/runs/masked", "/runs/plain", "/runs/delivered", "/runs/none")


def furnish(site: Site) -> Site:
    """Asked by six runs, of which one waits for consent; with a message of each kind, and a charge of epsilon."""
    record = site.record
    for state, why in ENDS.items():
        a = _asked(state, MASKED if state != "failed" else A, attempt=2 if state == "late" else 1)
        record.asked(a)
        record.ended(a.id, state, why)
    evaluated = _asked("delivered", MASKED).model_copy(update={"id": "delivered.2.1.alpha", "kind": Kind.EVALUATE})
    record.asked(evaluated)
    plain = _asked("plain", A).model_copy(
        update={"dp": LOCAL, "mu": 0.1, "weighting": "uniform", "train": Train(steps=5)}
    )
    for a in (plain, MASKED):
        record.asked(a)
        record.consent(a)
    record.decide("plain", "approved", terms_of(plain))
    record.waits(MASKED.id, True)
    site.ledger.reserve(plain, "all", training_event(Train(batch_size=10), LOCAL, 1000), Policy())

    about = f"/v1/assignments/{MASKED.id}"
    measured = {"accuracy": {"sum": 41.0, "count": 50.0}}
    for run in (MASKED.id, plain.id):
        post(site, f"/v1/assignments/{run}/upload", {"size": 9, "sha256": MODEL})
        post(site, f"/v1/assignments/{run}/complete", {"sha256": MODEL, "weight": 120.0, "metrics": measured})
    for kind in ("advert", "shares", "agree", "reveal"):
        post(site, f"{about}/answers/{kind}", {"of": kind})
    post(site, f"{about}/failure", {"fence": 3, "code": "<b>x</b>", "detail": "y"})
    post(site, f"{about}/progress", {})
    post(site, "/v1/enrol", {"name": "alpha", "public_key": "k", "info": {}})
    post(site, "/v1/poll", {"info": {"version": "1", "tasks": ["digits"], "gpus": ["H100"]}})
    for other in ("/v1/token", "/v1/transfer", "/v1/news"):
        post(site, other, {})
    for path in ("/v1/blobs/0", "/v1/me"):
        site.before_sending(httpx.Request("GET", f"http://x{path}"))
    return site


def _asked(run: str, a: Assignment, attempt: int = 1) -> Assignment:
    return a.model_copy(update={"id": f"{run}.1.{attempt}.alpha", "run": run, "attempt": attempt})


def post(site: Site, path: str, body: dict) -> None:
    content = json.dumps(body | {"hash": sha256(path.encode()).hexdigest()} if path == "/v1/news" else body).encode()
    site.before_sending(httpx.Request("POST", f"http://x{path}", content=content))
