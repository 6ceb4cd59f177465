"""What a server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from gripvlm.serve.controller import Step

__all__ = ["Metrics"]

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
SHARES = (0.02, 0.05, 0.1, 0.15, 0.25, 0.35, 0.5, 0.75, 1)


class Metrics:
    """One server's, in a registry of its own. Counters may be raised from any thread."""

    def __init__(self) -> None:
        self._registry = r = CollectorRegistry()
        self._requests = Counter("gripvlm_requests", "Chat requests answered, by HTTP status.", ["status"], registry=r)
        self._cancelled = Counter("gripvlm_cancelled", "Requests whose client left while they ran.", registry=r)
        self._phases = Histogram(
            "gripvlm_phase_seconds",
            "Time of a request: read (from its last byte), queue, tower (vision), prefill (pruning included), decode.",
            ["phase"],
            buckets=SECONDS,
            registry=r,
        )
        self._first = Histogram(
            "gripvlm_time_to_first_token_seconds", "From a request's last byte.", buckets=SECONDS, registry=r
        )
        self._visual = Counter("gripvlm_visual_tokens", "Visual tokens, paid for or saved.", ["kind"], registry=r)
        self._raised = Counter("gripvlm_raised_requests", "Requests that kept more than their budget.", registry=r)
        self._extra = Counter("gripvlm_raised_visual_tokens", "Visual tokens paid for above budgets.", registry=r)
        self._steps = Counter(
            "gripvlm_controller_steps", "Steps along the ladder of budgets.", ["direction"], registry=r
        )
        for way in get_args(Step):
            self._steps.labels(way)  # so that it is there, as 0, before the first
        self._prompt = Counter("gripvlm_prompt_text_tokens", "Tokens of prompts that are no visual tokens.", registry=r)
        self._decoded = Counter("gripvlm_completion_tokens", "Tokens decoded.", registry=r)
        self._shares = Histogram(
            "gripvlm_keep_share", "Share of its visual tokens that a request paid for.", buckets=SHARES, registry=r
        )
        self._encoded = Counter(
            "gripvlm_encode_cache", "Prompts whose pictures were encoded already, or not.", ["result"], registry=r
        )

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Adds a gauge whose value is read when it is asked for."""
        Gauge(name, text, registry=self._registry).set_function(value)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)

    def request(self, status: int) -> None:
        self._requests.labels(str(status)).inc()

    def cancelled(self) -> None:
        self._cancelled.inc()

    def phase(self, name: str, seconds: float) -> None:
        self._phases.labels(name).observe(seconds)

    def first_token(self, seconds: float) -> None:
        self._first.observe(seconds)

    def encoded(self, result: str) -> None:
        self._encoded.labels(result).inc()

    def decoded(self, tokens: int) -> None:
        self._decoded.inc(tokens)

    def stepped(self, way: Step) -> None:
        self._steps.labels(way).inc()

    def pruned(self, visual: int, kept: float, text: int, above: int = 0) -> None:
        """The prompt of a request.

        Args:
            visual: its visual tokens before pruning.
            kept: those paid for.
            text: all other tokens.
            above: how many of those paid for the budget did not ask for (`Pruner.may_exceed`).
        """
        self._prompt.inc(text)
        if visual:
            self._visual.labels("paid").inc(kept)
            self._visual.labels("saved").inc(visual - kept)
            self._shares.observe(kept / visual)
        if above:
            self._raised.inc()
            self._extra.inc(above)
