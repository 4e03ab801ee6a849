"""What Prometheus reads."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "camrt_requests",
            "Requests by model, route and status",
            ["model", "route", "status"],
            registry=self.registry,
        )
        self.images = Counter("camrt_images", "Images that were explained", ["model", "method"], registry=self.registry)
        self.stage = Histogram(
            "camrt_stage_seconds",
            "Time of a stage: read, queue, network, answer",
            ["model", "stage"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.batch = Histogram(
            "camrt_batch_size",
            "Images in a run of the network",
            ["model"],
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=self.registry,
        )
        self.waiting = Gauge(
            "camrt_waiting_images", "Images that wait for the network", ["model"], registry=self.registry
        )

    def observe(self, model: str, what: str, value: float) -> None:
        """what: a stage, or "batch"."""
        if what == "batch":
            self.batch.labels(model).observe(value)
        else:
            self.stage.labels(model, what).observe(value)

    def text(self) -> bytes:
        return generate_latest(self.registry)
