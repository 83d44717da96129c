"""Prometheus: the coordinator's state in numbers, read from the database when they are asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..protocol.views import RunView
from .http import Parts

CLIENTS, RUNS = ("pending", "active", "revoked"), ("running", "paused", "finished", "failed", "stopped")


def exposition(p: Parts) -> bytes:
    """The text that a Prometheus server scrapes."""
    registry = CollectorRegistry()
    registry.register(_State(p))
    return generate_latest(registry)


class _State(Collector):
    def __init__(self, p: Parts) -> None:
        self._p = p

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        service = self._p.service
        clients, runs = service.clients(), service.runs()
        yield _by("murmur_clients", "Clients by state.", "state", Counter(c.state for c in clients), CLIENTS)
        yield GaugeMetricFamily("murmur_clients_online", "Clients heard of lately.", sum(c.online for c in clients))
        yield _by("murmur_runs", "Runs by state.", "state", Counter(r.state for r in runs), RUNS)
        yield GaugeMetricFamily("murmur_leads", "Whether this process moves the rounds on.", self._p.conductor.leads)
        yield GaugeMetricFamily("murmur_event_id", "The newest event of the log.", self._p.hub.newest_event)
        yield from self._of_runs([r for r in runs if not r.over])

    def _of_runs(self, runs: list[RunView]) -> Iterator[Metric]:
        """Of the runs that go on: those that ended say no more, and there may be thousands."""
        labels = ["run", "name"]
        rounds = GaugeMetricFamily("murmur_run_rounds_done", "Rounds committed.", labels=labels)
        wanted = GaugeMetricFamily("murmur_run_rounds", "Rounds that the run asks for.", labels=labels)
        seconds = GaugeMetricFamily("murmur_round_seconds", "Seconds of the last round that committed.", labels=labels)
        parts = GaugeMetricFamily("murmur_round_clients", "Clients of the round by state.", labels=[*labels, "state"])
        epsilon = GaugeMetricFamily("murmur_run_epsilon", "Privacy spent.", labels=[*labels, "delta", "unit"])
        metric = GaugeMetricFamily("murmur_run_metric", "The newest value.", labels=[*labels, "metric"])
        for run in runs:
            of = [run.id, run.name]
            rounds.add_metric(of, run.round)
            wanted.add_metric(of, run.rounds)
            for name, value in sorted(run.latest.items()):
                metric.add_metric([*of, name], value)
            if run.privacy and run.privacy.value is not None:
                epsilon.add_metric([*of, f"{run.privacy.delta:g}", run.privacy.unit], run.privacy.value)
            detail = self._p.service.run(run.id)
            done = [r for r in detail.rounds if r.state == "committed" and r.closed_at]
            if done and (closed := done[-1].closed_at):
                seconds.add_metric(of, (closed - done[-1].opened_at).total_seconds())
            states = Counter(a.state for a in detail.current.assignments) if detail.current else Counter[str]()
            for state, count in sorted(states.items()):
                parts.add_metric([*of, state], count)
        yield from (rounds, wanted, seconds, parts, epsilon, metric)


def _by(name: str, said: str, label: str, counted: Counter[str], known: tuple[str, ...]) -> Metric:
    family = GaugeMetricFamily(name, said, labels=[label])
    for value in known:
        family.add_metric([value], counted[value])
    return family
