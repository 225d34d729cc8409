"""Processes that each hold the model and embed the chunks they are sent."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait as wait_for
from typing import TYPE_CHECKING, Any

import torch

from moe_fast.inference.encoder import EncoderSettings, TextEncoder
from moe_fast.inference.parts import Parts

if TYPE_CHECKING:
    from moe_fast.inference.embed import Chunk, EmbeddedChunk

_state: dict[str, Any] = {}  # a worker's model and parts, for all the chunks it gets


@contextmanager
def worker_pool(
    processes: int, settings: EncoderSettings, parts: Parts
) -> Iterator[Callable[[Chunk], Future[EmbeddedChunk]]]:
    """A function that sends a chunk to the next free worker.

    Raises:
        RuntimeError: a worker died.
    """
    # spawn: a forked process must not use CUDA, nor the parent's thread pools
    context = multiprocessing.get_context("spawn")
    arguments = (settings, parts)
    with ProcessPoolExecutor(processes, context, _start, arguments) as pool:
        try:
            yield lambda chunk: pool.submit(_embed, chunk)
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a worker process died (killed, or out of memory?). What it had finished is kept: "
                "run again to go on."
            ) from error


def _start(settings: EncoderSettings, parts: Parts) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(parts.threads)
    _state.update(encoder=TextEncoder(settings), parts=parts)


def _embed(chunk: Chunk) -> EmbeddedChunk:
    from moe_fast.inference.embed import embed_chunk

    return embed_chunk(_state["encoder"], _state["parts"], chunk)


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for its next chunk for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait_for([parent.sentinel])
    os._exit(1)
