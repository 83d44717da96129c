"""Transfers that only measure the way: bounded, for approved clients, and forgotten."""

from fastapi.testclient import TestClient

from murmur.coordinator.agents_api import MEASURED_BYTES
from murmur.coordinator.http import Parts

from .test_agents_api import Caller, callers, enrolled, facts, http, parts, refused  # fixtures of the same app

_ = (callers, http, parts)


def test_a_client_measures_its_way_in_both_directions_and_nothing_is_kept(callers: list[Caller], parts: Parts):
    caller, before = callers[0], facts(parts)
    for size in (0, 1, 100_000, (1 << 20) + 1):
        answer = caller.get(f"/v1/transfer?bytes={size}")
        assert (answer.status_code, len(answer.content)) == (200, size)
        assert answer.headers["content-length"] == str(size)
    given = {"content": bytes(100_000), "headers": caller.bearer}
    assert caller.http.post("/v1/transfer", **given).json() == {"accepted": True}
    assert facts(parts) == before


def test_a_transfer_that_measures_is_bounded_and_for_approved_clients(
    http: TestClient, parts: Parts, callers: list[Caller]
):
    caller = callers[0]
    refused(caller.get(f"/v1/transfer?bytes={MEASURED_BYTES + 1}"), 422, "bad_request")
    too_large = caller.http.post("/v1/transfer", content=bytes(MEASURED_BYTES + 1), headers=caller.bearer)
    refused(too_large, 413, "too_large")
    stranger = enrolled(http, parts, "pending", approve=False)
    refused(stranger.get("/v1/transfer?bytes=10"), 401, "not_authenticated")
