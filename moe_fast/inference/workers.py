"""Embeds chunks in worker processes, each with a copy of the model."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for
from typing import Any

import torch

from moe_fast.inference.chunks import Chunk, EmbeddedChunk, embed_chunk
from moe_fast.inference.parts import Parts
from moe_fast.inference.text_encoder import EncoderSettings, TextEncoder
from moe_fast.ops import backends

_state: dict[str, Any] = {}  # a worker's model and parts, used for all of its chunks


def embed_in_workers(
    chunks: Iterable[Chunk], settings: EncoderSettings, parts: Parts, processes: int
) -> Iterator[EmbeddedChunk]:
    """Embed chunks in worker processes, and yield the results as they are finished.

    At most two chunks per worker are in memory at a time.

    Raises:
        RuntimeError: a worker died.
        ValueError: as `embed_chunk`.
    """
    # spawn, because a forked process must not use CUDA or the parent's thread pools
    context = multiprocessing.get_context("spawn")
    arguments = (settings, parts, backends.default)
    pending: set[Future[EmbeddedChunk]] = set()
    with ProcessPoolExecutor(processes, context, _start, arguments) as pool:
        try:
            for chunk in chunks:
                pending.add(pool.submit(_embed, chunk))
                if len(pending) >= 2 * processes:
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            for future in pending:
                yield future.result()
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a worker process died (killed, or out of memory?). What it had finished is kept: "
                "run again to go on."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _start(settings: EncoderSettings, parts: Parts, backend: str) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(parts.threads)
    _state.update(encoder=TextEncoder(settings), parts=parts, backend=backend)


def _embed(chunk: Chunk) -> EmbeddedChunk:
    with backends.use_backend(_state["backend"]):
        return embed_chunk(_state["encoder"], _state["parts"], chunk)


def _end_with_parent() -> None:
    """End this worker when its parent ends; otherwise it would wait for the next chunk forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait_for([parent.sentinel])
    os._exit(1)
