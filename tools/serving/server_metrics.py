"""Metrics of the server and its engine for Prometheus, at /metrics."""

from __future__ import annotations

import math
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ...runtime.engine.engine import Engine

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, math.inf)


class ServerMetrics:
    """Counters of requests; those of the engine are read when /metrics is requested."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "staticvl_requests", "Chat completions by HTTP status (499: the client left)", ["status"], registry=self.registry
        )
        self.generated = Counter("staticvl_generated_tokens", "Tokens of finished answers", registry=self.registry)
        self.seconds = Histogram(
            "staticvl_request_seconds", "From a request to its end", buckets=SECONDS, registry=self.registry
        )
        self.first = Histogram(
            "staticvl_first_token_seconds", "From a request to its first text", buckets=SECONDS, registry=self.registry
        )
        self.active = 0  # requests that have not ended
        self.registry.register(self)  # type: ignore[arg-type]  (anything with `collect`)

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def collect(self) -> Iterator[Metric]:
        engine, metrics, blocks = self.engine, self.engine.metrics, self.engine.cache.blocks
        gauges = {
            "staticvl_requests_active": ("Requests that have not ended", self.active),
            "staticvl_sequences_running": ("Answers that hold a slot", len(engine.scheduler.running)),
            "staticvl_sequences_waiting": ("Answers that wait for a slot", len(engine.scheduler.waiting)),
            "staticvl_slots": ("Slots of the cache", engine.cache.spec.slots),
            "staticvl_slots_free": ("Free slots", engine.cache.free),
            "staticvl_blocks": ("Blocks of the cache in all: of the budget, or the pages", blocks.budget),
            "staticvl_blocks_used": ("Blocks of answers that run", blocks.used),
            "staticvl_blocks_cached": ("Blocks that are kept for later prompts", blocks.cached),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(name, text, value=value)
        counters = {
            "staticvl_prompt_tokens": ("Positions of prompts that were run or reused", metrics.prompt_tokens),
            "staticvl_reused_tokens": ("Positions of prompts that were in the cache already", metrics.reused_tokens),
            "staticvl_tiles": ("Tiles of images whose features were needed", metrics.tiles),
            "staticvl_reused_tiles": ("Tiles whose features were known already", metrics.reused_tiles),
            "staticvl_slot_copies": ("Copies of cache rows from slot to slot, and of pages", metrics.copies),
            "staticvl_blocks_evicted": ("Blocks that were kept and that others needed", blocks.evicted),
            "staticvl_preemptions": ("Answers that gave up their slot and were computed again", engine.scheduler.preemptions),
        }
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(name, text, value=value)
        tables = {
            "staticvl_graph_runs": ("Runs of graphs", "kind", metrics.runs),
            "staticvl_graph_seconds": ("Seconds inside graphs", "kind", metrics.seconds),
            "staticvl_graph_size_real": ("Tiles, tokens or rows that were needed", "kind", metrics.real),
            "staticvl_graph_size_padded": ("Tiles, tokens or rows that were run", "kind", metrics.padded),
            "staticvl_sequences_finished": ("Answers by why they ended", "reason", metrics.finished),
        }
        for name, (text, label, values) in tables.items():
            family = CounterMetricFamily(name, text, labels=[label])
            for key, value in dict(values).items():
                family.add_metric([key], value)
            yield family
