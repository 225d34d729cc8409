"""Processes that each hold the model and embed the chunks they are sent."""

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

_state: dict[str, Any] = {}  # a worker's model and parts, for all the chunks it gets


def embed_in_workers(
    chunks: Iterable[Chunk], settings: EncoderSettings, parts: Parts, processes: int
) -> Iterator[EmbeddedChunk]:
    """The chunks as they get done; at most two per worker are held in memory.

    Raises:
        RuntimeError: a worker died.
    """
    # spawn: a forked process must not use CUDA, nor the parent's thread pools
    context = multiprocessing.get_context("spawn")
    pending: set[Future[EmbeddedChunk]] = set()
    with ProcessPoolExecutor(processes, context, _start, (settings, parts)) as pool:
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


def _start(settings: EncoderSettings, parts: Parts) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(parts.threads)
    _state.update(encoder=TextEncoder(settings), parts=parts)


def _embed(chunk: Chunk) -> EmbeddedChunk:
    return embed_chunk(_state["encoder"], _state["parts"], chunk)


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for its next chunk for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait_for([parent.sentinel])
    os._exit(1)
