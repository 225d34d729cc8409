"""Chooses the number of tokens of a chunk, by measuring on the texts, the model and the machine.

A chunk must fit in memory with its graph, but if it is too small, fixed costs (such as kernel
launches) dominate its time. Both are measured on some of the batch's own texts: the bytes per token
that one small forward pass keeps for its backward pass, and the time per token of forward passes of
growing size.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_fast.layers import MoERouter
from moe_fast.losses.chunked_encoding import random_state_kept, without_sync
from moe_fast.losses.global_sum import several_processes
from moe_fast.losses.text_chunks import Chunk, TextLengths, take_rows

logger = logging.getLogger(__name__)

Encode = Callable[[Mapping[str, Any]], Tensor]

SMALLEST = 512  # the first size that is timed
_LARGEST = 65_536
_GAIN = 0.05  # the share of time that doubling a chunk must save to be worth its memory
_SHARE_OF_MEMORY = 0.5
_SLOW = 1.25
_ENOUGH_CHUNKS = 16  # with as many in a batch, the check of a given size costs little


class ChunkProbe:
    """Measures a model on one batch's texts, without changing random states or routers' counts.

    Args:
        model: the model that ``encode`` runs.
        encode: a function from features to embeddings.
        columns: the features of the batch.
        lengths: :func:`~moe_fast.losses.text_chunks.text_lengths` of each column.
        device: the device of the features.
    """

    def __init__(
        self,
        model: nn.Module,
        encode: Encode,
        columns: Sequence[Mapping[str, Any]],
        lengths: Sequence[TextLengths],
        device: torch.device,
    ) -> None:
        self.model = model
        self.encode = encode
        self.device = device
        # The column with the most tokens takes most of the time.
        self._column = max(range(len(columns)), key=lambda c: int(lengths[c].tokens.sum()))
        self._features = columns[self._column]
        self._widths = lengths[self._column].widths.clamp(min=1)
        self._order = self._widths.argsort(stable=True)

    def tokens(self) -> int:
        """The number of tokens that can be measured on, those of the largest column."""
        return int(self._widths.sum())

    def seconds_per_token(self, num_tokens: int) -> float:
        """Seconds per token of a forward pass without a graph; the faster of two runs.

        The pass is over about ``num_tokens`` tokens, padding included.
        """
        features, size = self._block(num_tokens)
        times = []
        for _ in range(2):
            with torch.no_grad(), without_side_effects(self.model, self.device):
                start = self._now()
                self.encode(features)
                times.append(self._now() - start)
        return min(times) / size

    def bytes_per_token(self, num_tokens: int) -> float:
        """Bytes per token that a forward over about ``num_tokens`` tokens keeps for backward."""
        features, size = self._block(num_tokens)
        aside = without_side_effects(self.model, self.device)
        keeping = kept_for_backward(self.model.parameters())
        with torch.enable_grad(), aside, without_sync(self.model), keeping as kept:
            self.encode(features)
        return sum(kept.values()) / size

    def _block(self, num_tokens: int) -> tuple[dict[str, Any], int]:
        """Return features of texts around the median length, and their tokens, padding included."""
        middle = len(self._order) // 2
        size = max(1, num_tokens // int(self._widths[self._order[middle]]))
        first = max(0, middle - size // 2)
        rows = self._order[first : first + size]
        width = int(self._widths[rows].max())
        chunk = Chunk(self._column, rows.to(self.device), width)
        return take_rows(self._features, chunk), len(rows) * width

    def _now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()


def choose_tokens_per_chunk(probe: ChunkProbe) -> int:
    """Return the smallest chunk size that is nearly as fast as the best that fits; logs the choice.

    Every process must call this; all of them get the smallest of their choices.
    """
    probe.seconds_per_token(SMALLEST)  # a warm-up: the first run is always slow
    bytes_per_token = probe.bytes_per_token(SMALLEST)
    free = free_bytes(probe.device)
    fits = _LARGEST if free is None else int(_SHARE_OF_MEMORY * free / max(bytes_per_token, 1.0))
    seconds: dict[int, float] = {}
    size = SMALLEST
    while size <= min(fits, _LARGEST) and (not seconds or size < 2 * probe.tokens()):
        seconds[size] = probe.seconds_per_token(size)
        if seconds[size] > (1 - _GAIN) * seconds.get(size // 2, float("inf")):
            break
        size *= 2
    best = min(seconds.values(), default=0.0)
    chosen = next((s for s, t in seconds.items() if t * (1 - _GAIN) <= best), max(fits, 1))
    logger.warning(
        "CachedLoss: tokens_per_chunk = %d, chosen by measuring: microseconds per token %s; "
        "%.0f KiB kept per token, %s tokens fit.",
        chosen,
        ", ".join(f"{1e6 * t:.1f} at {s}" for s, t in seconds.items()) or "not measured",
        bytes_per_token / 1024,
        "an unknown number of" if free is None else fits,
    )
    return -most_over_processes(-chosen, probe.device)


def warn_if_slow(probe: ChunkProbe, tokens_per_chunk: int) -> None:
    """Log a warning if chunks four times as large take at least a fifth less time per token.

    Nothing is measured if the largest column has fewer than 16 chunks; it would cost too much.
    """
    if probe.tokens() < _ENOUGH_CHUNKS * tokens_per_chunk:
        return
    probe.seconds_per_token(tokens_per_chunk)
    given = probe.seconds_per_token(tokens_per_chunk)
    larger = probe.seconds_per_token(4 * tokens_per_chunk)
    if given > _SLOW * larger:
        logger.warning(
            "CachedLoss: tokens_per_chunk=%d is slow: %.1f microseconds per token, against %.1f "
            "with chunks of %d. Unless memory forbids it, give more, or None to have it chosen.",
            tokens_per_chunk,
            1e6 * given,
            1e6 * larger,
            4 * tokens_per_chunk,
        )


def free_bytes(device: torch.device) -> int | None:
    """Return the free memory of ``device`` in bytes; ``None`` if it is not known."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.is_file():
        return None
    for line in meminfo.read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return None


def most_over_processes(number: int, device: torch.device) -> int:
    """Return the largest of the processes' numbers; every process must call this."""
    if not several_processes():
        return number
    most = torch.tensor(number, device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)


@contextmanager
def kept_for_backward(known: Iterable[Tensor]) -> Iterator[dict[int, int]]:
    """Collect the bytes that the block saves for a backward pass, {address of the storage: bytes}.

    Args:
        known: tensors that are not counted, such as parameters, which exist anyway.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in known}
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        yield kept


@contextmanager
def without_side_effects(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Within the block, random draws and routed tokens leave no trace.

    The state of the random generators is restored afterwards. Routers are put into evaluation mode:
    they route in the same way but do not count their tokens for the logs.
    """
    routers = [m for m in model.modules() if isinstance(m, MoERouter) and m.training]
    for router in routers:
        router.training = False
    try:
        with random_state_kept(device):
            yield
    finally:
        for router in routers:
            router.training = True
