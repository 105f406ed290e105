"""The server's metrics for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
PREFIX = "free_transformer"


class Metrics:
    """Counters, gauges and histograms of one server."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)  # memory, CPU time, open files

        def counter(name: str, meaning: str) -> Counter:
            return Counter(f"{PREFIX}_{name}", meaning, registry=registry)

        self.requests = Counter(f"{PREFIX}_requests", "requests by HTTP status", ["status"], registry=registry)
        self.request_seconds = Histogram(
            f"{PREFIX}_request_seconds",
            "time from a request to the end of its response",
            buckets=SECONDS,
            registry=registry,
        )
        self.first_token_seconds = Histogram(
            f"{PREFIX}_first_token_seconds",
            "time from a request to a text's first token",
            buckets=SECONDS,
            registry=registry,
        )
        self.prompt_tokens = counter("prompt_tokens", "prompt tokens read")
        self.generated_tokens = counter("generated_tokens", "tokens generated")
        self.failed = counter("failed_texts", "texts that ended with an error")
        self.not_finite = counter("logits_not_finite", "texts that ended because their logits were NaN or infinite")
        self.restarts = counter("engine_restarts", "restarts of the engine after a failure")
        self.batch = Histogram(f"{PREFIX}_batch_texts", "texts generated per step", buckets=ROWS, registry=registry)
        self.running = Gauge(f"{PREFIX}_running_texts", "texts being generated", registry=registry)
        self.waiting = Gauge(f"{PREFIX}_waiting_texts", "texts in the queue", registry=registry)
