"""GET /metrics: what the server does, as Prometheus reads it."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from hybrid.server.api_error import ApiError
from hybrid.server.service import Service

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The metrics of one server. Nothing of them is global."""

    def __init__(self, service: Service) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_ModelCollector(service))
        self.requests = Counter(
            "hybrid_http_requests",
            "HTTP responses",
            ("path", "status"),
            registry=self._registry,
        )
        self.request_seconds = Histogram(
            "hybrid_http_request_seconds",
            "Time from a request's headers to the end of its response",
            ("path",),
            registry=self._registry,
            buckets=SECONDS,
        )

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _ModelCollector(Collector):
    """Reads the engine's and the loop's own counts whenever Prometheus comes."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        try:
            engine, loop = self._service.model
        except ApiError:
            yield GaugeMetricFamily("hybrid_loaded", "Whether the model is loaded", 0)
            return
        now, ended, config = loop.stats, engine.stats, engine.config
        passes = now.passes
        n_pairs = passes.n_tokens * config.n_layers * config.n_neurons
        gauges = (
            ("loaded", "Whether the model is loaded", 1),
            ("load_seconds", "Time that loading took", ended.load_s),
            ("weight_bytes", "Bytes of the packed weights", ended.weight_bytes),
            ("sequences", "Answers that can run at once", now.n_sequences),
            ("active_sequences", "Answers that run", len(loop.running)),
            ("queued_requests", "Requests that wait for a sequence", now.n_waiting),
            ("prefix_cache_bytes", "Keys and values of sequences that ended", now.cache_bytes),
            (
                "active_neuron_fraction",
                "Share of the FFN neurons that fired, over all tokens so far",
                passes.n_active / n_pairs if n_pairs else 0,
            ),
            (
                "pass_gigabytes_per_second",
                "Weights and KV cache read per second of passes so far, in 1e9 bytes",
                passes.n_bytes / passes.seconds / 1e9 if passes.seconds else 0,
            ),
        )
        counters = (
            ("prompt_tokens", "Tokens of prompts, of answers that ended", ended.prompt_tokens),
            ("cached_tokens", "Those found in the prefix cache", ended.cached_tokens),
            ("generated_tokens", "Tokens of answers that ended", ended.generated_tokens),
            ("generations", "Answers that ended", ended.n_generations),
            ("prefill_seconds", "Time of prompts, of answers that ended", ended.prefill_s),
            ("decode_seconds", "Time of decode, of answers that ended", ended.decode_s),
            ("passes", "Passes over the weights", passes.n_passes),
            ("pass_tokens", "Tokens of passes, of prompts and answers", passes.n_tokens),
            ("pass_seconds", "Time of passes", passes.seconds),
            ("pass_bytes", "Weights and KV cache that passes read", passes.n_bytes),
            ("active_neurons", "(neuron, token) pairs that fired in passes", passes.n_active),
        )
        for name, text, value in gauges:
            yield GaugeMetricFamily(f"hybrid_{name}", text, value)
        for name, text, value in counters:
            yield CounterMetricFamily(f"hybrid_{name}", text, value)
