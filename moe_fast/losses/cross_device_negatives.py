"""Exchanges columns between processes, so that each compares its own rows with all columns.

Rows are anchors, columns are their candidates: B positives and B * G hard negatives per process.
A :class:`Shard` holds one process's columns. Each process visits every shard once, its own first,
and adds to the shard's sums or gradients; the totals end up with the process that owns the shard.

- :class:`AllGather` brings all shards to every process. It needs memory for all columns and, in the
  backward pass, for a gradient of each.
- :class:`Ring` passes shards from process to process, with their sums or gradients; each process
  holds two at a time.

Both give the same result. Every process must make the same calls. Processes may hold different
numbers of rows; nothing is padded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_fast.ops.info_nce.tiled import hard_side, join_sums, new_sums, pair_side
from moe_fast.ops.info_nce.tiles import Side


@dataclass(frozen=True)
class Shard:
    """The columns of one process with B pairs; fields as in :func:`moe_fast.ops.info_nce`.

    Attributes:
        weights: [B], summing to 1 over all processes.
        negatives: [B * G, d]; [0, d] if there are none.
    """

    b: Tensor
    negatives: Tensor
    weights: Tensor
    row_ids: Tensor | None
    col_ids: Tensor | None
    domain_ids: Tensor | None
    group_ids: Tensor | None

    def sides(self, cosine: bool) -> tuple[Side, Side | None]:
        """Return positives and hard negatives (or ``None``) as :class:`Side` objects."""
        ids = (self.row_ids, self.col_ids, self.domain_ids, self.group_ids)
        hard = hard_side(self.negatives, len(self.b), ids, cosine)
        return pair_side(self.b, ids, cosine), hard

    def empty(self, num_pairs: int, num_negatives: int) -> Shard:
        """Allocate uninitialised memory for another process's shard, with these sizes."""

        def like(t: Tensor | None, rows: int) -> Any:
            return None if t is None else t.new_empty((rows, *t.shape[1:]))

        return Shard(
            like(self.b, num_pairs),
            like(self.negatives, num_negatives),
            like(self.weights, num_pairs),
            like(self.row_ids, num_pairs),
            like(self.col_ids, num_pairs + num_negatives),
            like(self.domain_ids, num_pairs),
            like(self.group_ids, num_pairs),
        )

    def tensors(self) -> list[Tensor]:
        """Return the tensors that are not ``None``, in the order of the fields."""
        values = (getattr(self, field.name) for field in fields(self))
        return [t for t in values if t is not None]


# Functions that visit a shard: (shard, its sums or gradients, whether it is this process's own).
AddSums = Callable[[Shard, Tensor, bool], None]
AddGradients = Callable[[Shard, Tensor, Tensor, Tensor, bool], None]


class AllGather:
    """Brings every shard to every process.

    Args:
        mine: this process's shard.
        sizes: (pairs, hard negatives) of each process.
    """

    def __init__(self, mine: Shard, sizes: Sequence[tuple[int, int]]) -> None:
        rank = dist.get_rank()
        self.mine = mine
        self.shards = [mine if r == rank else mine.empty(*size) for r, size in enumerate(sizes)]
        _wait(
            dist.broadcast(t.contiguous(), src=r, async_op=True)
            for r, shard in enumerate(self.shards)
            for t in shard.tensors()
            if t.numel()
        )
        self._order = sorted(range(len(sizes)), key=lambda r: r != rank)

    def add_sums(self, add: AddSums, like: Tensor) -> Tensor:
        """Return the sums [6, B] of this process's columns over the rows of all processes.

        The six sums are those of :func:`moe_fast.ops.info_nce.tiled.new_sums`.

        Args:
            add: visits a shard and adds to its sums.
            like: a tensor of the sums' dtype and device.
        """
        rank = dist.get_rank()
        sums = [new_sums(len(shard.b), like) for shard in self.shards]
        for r in self._order:
            add(self.shards[r], sums[r], r == rank)
        parts = [torch.empty_like(sums[rank]) for _ in self.shards]
        _wait(
            dist.gather(part, parts if r == rank else None, dst=r, async_op=True)
            for r, part in enumerate(sums)
        )
        for part in parts[1:]:
            join_sums(parts[0], part)
        return parts[0]

    def add_gradients(
        self, add: AddGradients, my_sums: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients [B, d] and [B * G, d] of this process's columns over all rows.

        They still need :func:`moe_fast.ops.info_nce.tiles.finish_columns`.

        Args:
            add: visits a shard and adds to its gradients.
            my_sums: what :meth:`add_sums` returned.
            dtype: of the gradients.
        """
        rank = dist.get_rank()
        sums = [
            my_sums if r == rank else my_sums.new_empty((len(my_sums), len(shard.b)))
            for r, shard in enumerate(self.shards)
        ]
        _wait(dist.broadcast(t, src=r, async_op=True) for r, t in enumerate(sums) if t.numel())
        grads = [_new_gradients(shard, dtype) for shard in self.shards]
        for r in self._order:
            add(self.shards[r], sums[r], *grads[r], r == rank)
        _wait(
            dist.reduce(grad, dst=r, async_op=True)
            for r, pair in enumerate(grads)
            for grad in pair
            if grad.numel()
        )
        return grads[rank]


class Ring:
    """Passes the shards around, one at a time; arguments and methods as in :class:`AllGather`."""

    def __init__(self, mine: Shard, sizes: Sequence[tuple[int, int]]) -> None:
        self.mine = mine
        self._sizes = sizes

    def add_sums(self, add: AddSums, like: Tensor) -> Tensor:
        """See :meth:`AllGather.add_sums`."""
        shard, sums = self.mine, new_sums(len(self.mine.b), like)
        for step in range(len(self._sizes)):
            add(shard, sums, step == 0)
            following = self._following(step)
            arriving = new_sums(len(following.b), like)
            self._pass_on([*shard.tensors(), sums], [*following.tensors(), arriving])
            shard, sums = following, arriving
        return sums

    def add_gradients(
        self, add: AddGradients, my_sums: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`AllGather.add_gradients`."""
        shard, sums, grads = self.mine, my_sums, _new_gradients(self.mine, dtype)
        for step in range(len(self._sizes)):
            add(shard, sums, *grads, step == 0)
            following = self._following(step)
            arriving = my_sums.new_empty((len(my_sums), len(following.b)))
            arriving_grads = _new_gradients(following, dtype)
            self._pass_on(
                [*shard.tensors(), sums, *grads],
                [*following.tensors(), arriving, *arriving_grads],
            )
            shard, sums, grads = following, arriving, arriving_grads
        return grads

    def _following(self, step: int) -> Shard:
        """Allocate memory for the next shard: of one rank lower at each step, at last our own."""
        return self.mine.empty(*self._sizes[(dist.get_rank() - step - 1) % len(self._sizes)])

    def _pass_on(self, leaving: Sequence[Tensor], arriving: Sequence[Tensor]) -> None:
        rank, count = dist.get_rank(), len(self._sizes)
        sends = [
            dist.P2POp(dist.isend, t.contiguous(), (rank + 1) % count, tag=tag)
            for tag, t in enumerate(leaving)
            if t.numel()
        ]
        receives = [
            dist.P2POp(dist.irecv, t, (rank - 1) % count, tag=tag)
            for tag, t in enumerate(arriving)
            if t.numel()
        ]
        _wait(dist.batch_isend_irecv([*sends, *receives]))


def _new_gradients(shard: Shard, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(shard.b, dtype=dtype), torch.zeros_like(shard.negatives, dtype=dtype)


def _wait(messages: Iterable) -> None:
    for message in list(messages):  # start all of them before waiting for the first
        if message is not None:
            message.wait()


def table_of(values: Sequence[int], device: torch.device) -> list[list[int]]:
    """Gather the ``values`` of all processes, one list per rank; all must give equally many."""
    mine = torch.tensor(values, dtype=torch.int64, device=device)
    rows = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, mine)
    return [row.tolist() for row in rows]
