"""What a server tells Prometheus of itself."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
PREFIX = "free_transformer"


class Metrics:
    """Counters, gauges and histograms of one server."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)  # memory, processor time, open files
        self.requests = Counter(f"{PREFIX}_requests", "requests by HTTP status", ["status"], registry=registry)
        self.request_seconds = Histogram(
            f"{PREFIX}_request_seconds", "from a request to the end of its answer", buckets=SECONDS, registry=registry
        )
        self.first_token_seconds = Histogram(
            f"{PREFIX}_first_token_seconds", "until a text has a token", buckets=SECONDS, registry=registry
        )
        self.prompt_tokens = Counter(f"{PREFIX}_prompt_tokens", "tokens of prompts read", registry=registry)
        self.generated_tokens = Counter(f"{PREFIX}_generated_tokens", "tokens written", registry=registry)
        self.batch = Histogram(f"{PREFIX}_batch_texts", "texts written in a step", buckets=ROWS, registry=registry)
        self.running = Gauge(f"{PREFIX}_running_texts", "texts that are being written", registry=registry)
        self.waiting = Gauge(f"{PREFIX}_waiting_texts", "texts that wait to be written", registry=registry)
