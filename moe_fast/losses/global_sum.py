"""Sums over data-parallel processes, of which a loss of the global batch is computed."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _GlobalSum(torch.autograd.Function):
    """Sums over N processes; the backward pass multiplies the gradient by N.

    Every process computes the same loss from the same sums, and DistributedDataParallel averages
    the gradients of the N processes. With the factor N the average becomes the sum of the
    processes' shares, the gradient that one process with the whole batch would have. The general
    backward of a sum, a second all-reduce, would add up N equal gradients and give the same.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * dist.get_world_size()


def several_processes() -> bool:
    """Whether a process group with more than one process is initialised."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def global_sum(tensor: Tensor) -> Tensor:
    """Sum ``tensor`` over all processes, each of which must call; one process gets it unchanged.

    The gradient is right only if the loss is the same function of the sums on every process, and
    the gradients of the parameters are averaged over processes afterwards.
    """
    return _GlobalSum.apply(tensor) if several_processes() else tensor
