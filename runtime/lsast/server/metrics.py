"""What a server counts, for Prometheus."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

CONTENT_TYPE = CONTENT_TYPE_LATEST
"""Media type of `Metrics.text`."""

_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self.ended = Counter(
            "lsast_paintings", "Paintings that were accepted and ended, by how.", ["state"], registry=self._registry
        )
        for state in ("done", "failed", "cancelled"):
            self.ended.labels(state)
        self.refused = Counter("lsast_refused", "Requests that found the queue full.", registry=self._registry)
        self.waited = Histogram("lsast_waited_seconds", "Time in the queue.", buckets=_SECONDS, registry=self._registry)
        self.painted = Histogram(
            "lsast_painted_seconds", "Time of painting, without the queue.", buckets=_SECONDS, registry=self._registry
        )
        self._gauges = {
            "lsast_queued": "Paintings that wait.",
            "lsast_painting": "Paintings that are being painted.",
            "lsast_kept_bytes": "Bytes of finished paintings that are kept for their clients.",
            "lsast_worker_ready": "1 if a worker has its engines open.",
            "lsast_worker_restarts": "Workers that were started after the first.",
        }

    def watch(self, **readings: Callable[[], float]) -> None:
        """Read the gauges, named without ``lsast_``, from functions."""
        for name, read in readings.items():
            Gauge(f"lsast_{name}", self._gauges[f"lsast_{name}"], registry=self._registry).set_function(read)

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self._registry)
