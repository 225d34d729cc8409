"""Computes the texts of all waiting requests together, in one thread.

Each batch takes one text of each waiting request in turn, until its tokens are enough: a request
of thousands of texts delays a short one by a batch, not by all of its texts. While a batch is
computed the next one fills, so that requests need not wait for each other on purpose, with one
exception: after a batch of several requests the next one waits a moment for as many.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.floating]


class Text(NamedTuple):
    """A text to embed.

    Attributes:
        ids, type_ids: [n] int32, as in :class:`moe_fast.encoding.lengths.TokenizedText`.
        domain_id: the index of its domain; ``None``: the learned router's, or the model's default.
        prompt_length: the number of its prompt's tokens that the pooling leaves out, or ``None``.
    """

    ids: NDArray[np.int32]
    type_ids: NDArray[np.int32] | None = None
    domain_id: int | None = None
    prompt_length: int | None = None


class QueueFullError(Exception):
    """So many tokens wait that a request is refused.

    Attributes:
        retry_after: whole seconds after which there should be room.
    """

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"too many texts are waiting; try again in {retry_after} s")
        self.retry_after = retry_after


class ClosedError(Exception):
    """The server is stopping, or its thread has died, and takes no further requests."""


class _Job:
    """A request's texts, of which the first ``taken`` are in a batch or done."""

    def __init__(self, texts: Sequence[Text]) -> None:
        self.texts = texts
        self.taken = 0
        self.vectors: list[Any] = [None] * len(texts)
        self.missing = len(texts)
        self.future: Future[Vectors] = Future()

    @property
    def waiting_tokens(self) -> int:
        return sum(len(text.ids) for text in self.texts[self.taken :])


class Batcher:
    """A thread that embeds texts, and the queue before it.

    Args:
        compute: embeds texts as [N, d]; only the batcher's thread calls it.
        max_batch_tokens: the most tokens in a batch, unless it is one text.
        max_queue_tokens: no request is taken while so many tokens wait. Below that one of any size
            is, so that none is refused for ever.
        max_wait: seconds that a batch waits, after one of several requests, for as many.
        observe: called after each batch with its numbers of texts and requests.
    """

    def __init__(
        self,
        compute: Callable[[Sequence[Text]], Vectors],
        *,
        max_batch_tokens: int,
        max_queue_tokens: int,
        max_wait: float,
        observe: Callable[[int, int], None] = lambda texts, requests: None,
    ) -> None:
        self._compute = compute
        self._max_batch_tokens = max_batch_tokens
        self._max_queue_tokens = max_queue_tokens
        self._max_wait = max_wait
        self._observe = observe
        self._jobs: deque[_Job] = deque()
        self._waiting_tokens = 0
        self._tokens_per_second = 0.0
        self._last_requests = 1
        self._closed = False
        self._why_closed = "the server is stopping"
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="moe_fast-batcher", daemon=True)
        self._thread.start()

    @property
    def waiting_tokens(self) -> int:
        """The number of tokens that wait, without those in the batch that is computed."""
        return self._waiting_tokens

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def submit(self, texts: Sequence[Text]) -> Future[Vectors]:
        """Queue a request's texts, at least one; the result is their vectors, [N, d].

        A cancelled future's texts are left out of later batches.

        Raises:
            QueueFullError: too many tokens wait.
            ClosedError: :meth:`close` was called.
        """
        job = _Job(texts)
        with self._changed:
            if self._closed:
                raise ClosedError(self._why_closed)
            if self._waiting_tokens >= self._max_queue_tokens:
                raise QueueFullError(self._seconds_of_queue())
            self._jobs.append(job)
            self._waiting_tokens += job.waiting_tokens
            self._changed.notify()
        return job.future

    def close(self) -> None:
        """Take no further requests, finish those that were taken, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _seconds_of_queue(self) -> int:
        rate = self._tokens_per_second or self._max_queue_tokens
        return max(1, min(3600, math.ceil(self._waiting_tokens / rate)))

    def _run(self) -> None:
        batch: list[tuple[_Job, int]] = []
        try:
            while batch := self._next_batch():
                self._compute_batch(batch)
        except BaseException:
            # Nobody would compute what waits: it fails now, and whatever comes later at once.
            with self._changed:
                self._closed, self._why_closed = True, "the server's computing thread has died"
                lost = [*(job for job, _ in batch), *self._jobs]
                self._jobs.clear()
                self._waiting_tokens = 0
            for job in lost:
                _settle(job.future, ClosedError(self._why_closed))
            raise

    def _compute_batch(self, batch: list[tuple[_Job, int]]) -> None:
        """Embed a batch, and note how long it took."""
        started = time.perf_counter()
        if self._embed(batch):
            tokens = sum(len(job.texts[i].ids) for job, i in batch)
            rate = tokens / max(time.perf_counter() - started, 1e-9)
            before = self._tokens_per_second or rate
            self._tokens_per_second = 0.8 * before + 0.2 * rate
            self._observe(len(batch), self._last_requests)

    def _next_batch(self) -> list[tuple[_Job, int]]:
        """The texts to embed next, as (request, index); none: the end."""
        with self._changed:
            while True:
                while not self._jobs:
                    if self._closed:
                        return []
                    self._changed.wait()
                if self._last_requests > 1 and self._max_wait > 0:
                    self._changed.wait_for(self._has_enough, self._max_wait)
                batch = self._take()
                if batch:  # otherwise all had been cancelled
                    self._last_requests = len({id(job) for job, _ in batch})
                    return batch

    def _has_enough(self) -> bool:
        return (
            self._closed
            or len(self._jobs) >= self._last_requests
            or self._waiting_tokens >= self._max_batch_tokens
        )

    def _take(self) -> list[tuple[_Job, int]]:
        batch: list[tuple[_Job, int]] = []
        tokens, kind = 0, None
        others: list[_Job] = []  # whose texts cannot be computed with these
        while self._jobs:
            job = self._jobs[0]
            if job.future.done():  # cancelled, or failed by another of its texts
                self._waiting_tokens -= job.waiting_tokens
                self._jobs.popleft()
                continue
            text = job.texts[job.taken]
            if batch and text.prompt_length != kind:
                others.append(self._jobs.popleft())
                continue
            if batch and tokens + len(text.ids) > self._max_batch_tokens:
                break
            kind = text.prompt_length
            tokens += len(text.ids)
            batch.append((job, job.taken))
            job.taken += 1
            self._jobs.rotate(-1)
            if job.taken == len(job.texts):
                self._jobs.pop()
        self._jobs.extendleft(reversed(others))
        self._waiting_tokens -= tokens
        return batch

    def _embed(self, batch: list[tuple[_Job, int]]) -> bool:
        """Compute a batch and hand out its vectors; return whether that succeeded."""
        try:
            vectors = self._compute([job.texts[i] for job, i in batch])
        except Exception as error:
            requests = {id(job): job for job, _ in batch}
            if len(requests) == 1:
                (job,) = requests.values()
                _settle(job.future, error)
                return False
            # One request's texts must not fail the others': each is computed alone.
            parts = [[(j, i) for j, i in batch if j is job] for job in requests.values()]
            return sum(self._embed(part) for part in parts) > 0
        for (job, i), vector in zip(batch, vectors, strict=True):
            job.vectors[i] = vector
            job.missing -= 1
            if job.missing == 0:
                _settle(job.future, np.stack(job.vectors))
        return True


def _settle(future: Future[Vectors], result: Vectors | Exception) -> None:
    """Give a future its result, unless its request was given up meanwhile."""
    with suppress(InvalidStateError):
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)
