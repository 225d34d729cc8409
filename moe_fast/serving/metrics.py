"""What the server counts, for Prometheus."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client import multiprocess as of_processes

_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_TEXTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_FOLDER = "PROMETHEUS_MULTIPROC_DIR"


class Metrics:
    """Counters of one application.

    Where the environment names a folder in ``PROMETHEUS_MULTIPROC_DIR``, as ``moe-fast serve
    --workers`` does, :meth:`text` sums those of all processes that write there.
    """

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        own: dict[str, Any] = {"namespace": "moe_fast", "registry": self._registry}
        self.requests = Counter(
            "requests", "Requests for embeddings by HTTP status.", ["status"], **own
        )
        self.seconds = Histogram(
            "request_seconds", "Time from a request to its answer.", buckets=_SECONDS, **own
        )
        self.texts = Counter("texts", "Texts that were embedded, by domain.", ["domain"], **own)
        self.tokens = Counter("tokens", "Tokens that were embedded.", **own)
        self.batches = Counter("batches", "Forward passes.", **own)
        self.batch_texts = Histogram("batch_texts", "Texts in a batch.", buckets=_TEXTS, **own)
        self.batch_requests = Histogram(
            "batch_requests", "Requests in a batch.", buckets=_TEXTS, **own
        )
        self.padding_avoided = Counter(
            "padding_tokens_avoided",
            "Tokens of padding that the longest text of each batch would have cost the others.",
            **own,
        )
        self.waiting_tokens = Gauge(
            "waiting_tokens", "Tokens in the queue.", multiprocess_mode="livesum", **own
        )
        _forget_dead_processes()

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        if _FOLDER not in os.environ:
            return generate_latest(self._registry)
        registry = CollectorRegistry()
        of_processes.MultiProcessCollector(registry)
        return generate_latest(registry)


class CountedRequests:
    """An ASGI application that counts the requests of one path, by status, and their seconds.

    Args:
        app: the application behind it.
        metrics: where to count.
        path: such as ``"/v1/embeddings"``.
    """

    def __init__(self, app: Any, metrics: Metrics, path: str) -> None:
        self.app = app
        self.metrics = metrics
        self.path = path

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Hand a request on, and count its answer."""
        if scope["type"] != "http" or scope["path"] != self.path:
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500

        async def watched(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, watched)
        finally:
            self.metrics.requests.labels(str(status)).inc()
            self.metrics.seconds.observe(time.perf_counter() - started)


def _forget_dead_processes() -> None:
    """Remove the gauges of workers that were killed; a new worker takes each one's place."""
    folder = os.environ.get(_FOLDER)
    for file in Path(folder).glob("gauge_live*_*.db") if folder else ():
        pid = int(file.stem.rpartition("_")[2])
        if not Path(f"/proc/{pid}").exists():
            of_processes.mark_process_dead(pid)
