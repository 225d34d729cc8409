"""Sums over data-parallel processes that a loss of the global batch is made of."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _GlobalSum(torch.autograd.Function):
    """Sum over processes; the gradient is that of the sum times the number of processes.

    Every process computes the same loss from the same sums, and DistributedDataParallel averages
    the gradients of N processes: with the factor N the average is the sum of each process's share,
    the gradient that one process with the whole batch would have. The general backward, a second
    all-reduce, would sum N equal gradients to the same.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * dist.get_world_size()


def global_sum(tensor: Tensor) -> Tensor:
    """``tensor`` summed over all processes, of which each must call; itself where there is one.

    To be used for losses that are the same function of the sums on every process, whose parameter
    gradients are then averaged.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return tensor
    return _GlobalSum.apply(tensor)
