"""What is counted and timed, in Prometheus' text format."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from tokenloop.runner.engine import Engine

CONTENT_TYPE = CONTENT_TYPE_LATEST
STEP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
WAIT_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """The metrics of one server. Times are in seconds."""

    def __init__(self, engine: Engine):
        self._registry = CollectorRegistry()
        self._registry.register(EngineCollector(engine))
        ProcessCollector(registry=self._registry)
        self.answers = Counter(
            "tokenloop_answers", "Requests that were answered, by their HTTP status.",
            ("path", "status"), registry=self._registry,
        )  # fmt: skip
        self.first_token = Histogram(
            "tokenloop_time_to_first_token_seconds", "From the request to its first token.",
            buckets=WAIT_BUCKETS, registry=self._registry,
        )  # fmt: skip
        self.next_token = Histogram(
            "tokenloop_time_between_tokens_seconds", "Between two tokens of one output.",
            buckets=STEP_BUCKETS, registry=self._registry,
        )  # fmt: skip

    def text(self) -> bytes:
        return generate_latest(self._registry)


class EngineCollector:
    """The engine's own counts, as they are when somebody asks."""

    def __init__(self, engine: Engine):
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        engine, counts = self._engine, self._engine.counts
        for name, text, value in (
            ("rows", "Rows that requests can have.", engine.rows),
            ("running_requests", "Requests that have a row.", counts.running),
            ("waiting_requests", "Requests that wait for a row.", counts.waiting),
            ("prefix_cache_bytes", "Bytes of kept beginnings of prompts.", counts.cache_bytes),
            ("prefix_cache_budget_bytes", "Bytes that they may take.", counts.cache_budget),
        ):
            yield GaugeMetricFamily(f"tokenloop_{name}", text, value)
        for name, text, value in (
            ("prompt_tokens", "Tokens of prompts that got a row.", counts.prompt_tokens),
            ("cached_tokens", "Those of them that were not computed.", counts.cached_tokens),
            ("prefix_cache_evictions", "Beginnings given up for others.", counts.cache_evictions),
            ("new_tokens", "Tokens that were generated.", counts.new_tokens),
            ("steps", "Steps, each of which gives every running row a token.", counts.steps),
            ("failures", "Times that the program failed.", counts.failed),
        ):
            yield CounterMetricFamily(f"tokenloop_{name}", text, value)
        yield from self._of_ranks()

    def _of_ranks(self) -> Iterator[Metric]:
        """What came from other ranks, and what they were told, where there are some."""
        program = self._engine.model.loop.program
        if program.ranks is None:
            return
        received, told = program.transfers.between_ranks, program.ranks.told
        for name, text, value in (
            ("rank_gathers", "Times that something came from other ranks.", received.count),
            ("rank_gathered_bytes", "Bytes that came from other ranks.", received.bytes),
            ("rank_messages", "Messages that told other ranks what was decided.", told.count),
            ("rank_message_bytes", "Bytes of those messages.", told.bytes),
        ):
            yield CounterMetricFamily(f"tokenloop_{name}", text, value)
