"""What the service tells Prometheus. One registry a process, so that tests and workers do not share counters."""

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from wsgiref.simple_server import WSGIServer

import prometheus_client as prom
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from model.leases import Lease
from model.live_search import Counted
from online.canary import FAILED, PASSED, Check
from online.engine import Answered
from online.event_feed import EventFeed
from online.feeds import Following
from online.residents import ResidentSet

_LATENCY_S = (0.0001, 0.00025, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
_AGE_S = (3600, 6 * 3600, 12 * 3600, 86_400, 2 * 86_400, 4 * 86_400, 7 * 86_400, 14 * 86_400, 30 * 86_400, 90 * 86_400)


class Metrics:
    """Counters, histograms and gauges of one process."""

    def __init__(self) -> None:
        self.registry = prom.CollectorRegistry()
        prom.ProcessCollector(registry=self.registry)
        self._rows = prom.Counter(
            "tower_embeddings", "Embeddings answered.", ["release", "answer", "reason"], registry=self.registry
        )
        self._errors = prom.Counter(
            "tower_errors", "Requests, or rows of a batch, that ended in an error.", ["method", "status"],
            registry=self.registry,
        )  # fmt: skip
        self._latency = prom.Histogram(
            "tower_latency_seconds", "From the handler's start to its reply.", ["method"], buckets=_LATENCY_S,
            registry=self.registry,
        )  # fmt: skip
        self._age = prom.Histogram(
            "tower_state_age_seconds", "Now minus the as-of time of the state that was used.", buckets=_AGE_S,
            registry=self.registry,
        )  # fmt: skip
        self._store_errors = prom.Counter(
            "tower_store_errors", "Failed reads of the state store.", ["kind"], registry=self.registry
        )
        self._refusals = prom.Counter(
            "tower_release_refusals", "Releases or pointers that were not taken.", ["kind"], registry=self.registry
        )
        self._epoch = prom.Gauge("tower_epoch", "Epoch of the serving pointer in use.", registry=self.registry)
        self._releases = prom.Gauge(
            "tower_loaded_releases", "1 for each loaded release.",
            ["release", "role", "state_version", "embedding_version"], registry=self.registry,
        )  # fmt: skip
        self._items = prom.Gauge(
            "tower_index_items", "Items that Retrieve searches; absent where none are loaded.", ["release"],
            registry=self.registry,
        )  # fmt: skip
        self._lease_expires = prom.Gauge(
            "tower_lease_expires_seconds", "Unix time at which the registry's lease of this process runs out.",
            registry=self.registry,
        )  # fmt: skip
        self._lease_failures = prom.Counter(
            "tower_lease_failures", "Leases that could not be written.", registry=self.registry
        )
        self._canary_passed = prom.Gauge(
            "tower_canary_passed", "1 passed, 0 failed; absent while unknown.", ["release"], registry=self.registry
        )
        self._canary_difference = prom.Gauge(
            "tower_canary_difference", "Largest |difference| to the golden outputs.", ["release", "part"],
            registry=self.registry,
        )  # fmt: skip
        self._canary_failures = prom.Counter(
            "tower_canary_failures", "Canary rows, states or embeddings that were wrong.", ["release", "part"],
            registry=self.registry,
        )  # fmt: skip
        self._canary_as_of = prom.Gauge(
            "tower_canary_as_of_seconds", "As-of time of the oldest canary row: how far publishing has come.",
            ["release"], registry=self.registry,
        )  # fmt: skip
        self._following: list[Following] = []
        self.registry.register(_Feeds(lambda: self._following))
        self._row_counters: dict[tuple[str, str, str], prom.Counter] = {}
        self._latencies = {method: self._latency.labels(method) for method in ("Embed", "EmbedBatch", "Retrieve")}

    def answered(self, row: Answered) -> None:
        """Count one embedding."""
        key = (row.resident.release_id, row.answer.name, row.reason)
        counter = self._row_counters.get(key)
        if counter is None:
            counter = self._row_counters[key] = self._rows.labels(*key)
        counter.inc()
        if row.state_age_us:
            self._age.observe(row.state_age_us * 1e-6)

    def failed(self, method: str, status: str) -> None:
        """Count one error."""
        self._errors.labels(method, status).inc()

    def took(self, method: str, seconds: float) -> None:
        """Time one request."""
        self._latencies[method].observe(seconds)

    def store_failed(self, kind: str) -> None:
        """Count one failed read: timeout, connection, reply, or refused while the circuit is open."""
        self._store_errors.labels(kind).inc()

    def release_refused(self, kind: str) -> None:
        """Count one refusal: golden, checkpoint, item_index, bridge, lower_epoch or registry."""
        self._refusals.labels(kind).inc()

    def loaded(self, residents: ResidentSet) -> None:
        """Show what is loaded now."""
        self._epoch.set(residents.epoch)
        self._releases.clear()
        self._items.clear()
        for r in residents.residents:
            self._releases.labels(r.release_id, r.role.value, r.state_version, r.embedding_version).set(1)
            if r.index is not None:
                self._items.labels(r.release_id).set_function(partial(len, r.index.index))

    def fed(self, following: list[Following]) -> None:
        """Show the feeds there are; their values are read whenever somebody asks."""
        self._following = following

    def lease_written(self, lease: Lease) -> None:
        """Show how long the lease lasts."""
        self._lease_expires.set(lease.expires_at_us * 1e-6)

    def lease_failed(self) -> None:
        """Count one lease that could not be written."""
        self._lease_failures.inc()

    def canaries_checked(self, checks: Mapping[str, Check]) -> None:
        """Show what the canaries of each loaded release say."""
        for gauge in (self._canary_passed, self._canary_difference, self._canary_as_of):
            gauge.clear()
        for release_id, check in checks.items():
            if check.verdict in (PASSED, FAILED):
                self._canary_passed.labels(release_id).set(check.verdict == PASSED)
            for part, difference in check.differences.items():
                self._canary_difference.labels(release_id, part).set(difference)
            for part, _ in check.failures:
                self._canary_failures.labels(release_id, part).inc()
            if check.as_of_us is not None:
                self._canary_as_of.labels(release_id).set(check.as_of_us * 1e-6)

    def serve(self, host: str, port: int) -> WSGIServer:
        """Answer GET /metrics from a thread of its own; port 0 picks a free one (`server_port`)."""
        server, _ = prom.start_http_server(port, addr=host, registry=self.registry)
        return server


_Figure = tuple[str, str, Callable[[Following, float], float]]

_GAUGES: tuple[_Figure, ...] = (
    ("tower_index_revision", "Updates that the item index has seen.", lambda f, _: f.items.index.revision),
    ("tower_index_lag_seconds", "Since the item updates were last read to their end.",
     lambda f, now_s: now_s - f.updates_until_us * 1e-6),
)  # fmt: skip
_COUNTERS: tuple[_Figure, ...] = (
    ("tower_index_updates", "Item updates applied.", lambda f, _: f.updates.applied),
    ("tower_index_updates_refused", "Item updates that could not be applied.", lambda f, _: f.updates.refused),
    ("tower_index_updates_lost", "Item updates trimmed before they were read.", lambda f, _: f.updates.lost),
)
_Live = tuple[str, str, Callable[[EventFeed, Counted, float], float]]
_LIVE_GAUGES: tuple[_Live, ...] = (
    ("tower_live_events", "Events that are kept to be counted.", lambda events, *_: events.kept),
    ("tower_live_since_seconds", "Unix time from which on all events are counted.", lambda _, c, __: c.since_us * 1e-6),
    ("tower_live_until_seconds", "Unix time up to which they are counted.", lambda _, c, __: c.until_us * 1e-6),
    ("tower_live_short", "1 while they do not fill the longest window.", lambda _, c, __: c.is_short),
    ("tower_live_lag_seconds", "Since the events were last read to their end.",
     lambda events, _, now_s: now_s - events.read_until_us * 1e-6),
)  # fmt: skip


class _Feeds(Collector):
    """What the feeds of each index have come to, read whenever somebody asks."""

    def __init__(self, following: Callable[[], list[Following]]) -> None:
        self._following = following

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client."""
        now_s, label = time.time(), ["embedding_version"]
        following = [(each.items.embedding_version, each) for each in self._following()]
        for kind, figures in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS)):
            for name, told, read in figures:
                family = kind(name, told, labels=label)
                for version, each in following:
                    family.add_metric([version], read(each, now_s))
                yield family
        live = [(v, f.events, f.items.counted) for v, f in following if f.events and f.items.counted]
        for name, told, read_live in _LIVE_GAUGES:
            family = GaugeMetricFamily(name, told, labels=label)
            for version, events, counted in live:
                family.add_metric([version], read_live(events, counted, now_s))
            yield family
        lost = CounterMetricFamily("tower_live_entries_lost", "Entries of events trimmed before read.", labels=label)
        refused = CounterMetricFamily(
            "tower_live_events_refused", "Events that are not counted.", labels=[*label, "reason"]
        )  # fmt: skip
        for version, events, _ in live:
            lost.add_metric([version], events.lost)
            for reason, count in events.refused.copy().items():
                refused.add_metric([version, reason], count)
        yield lost
        yield refused
