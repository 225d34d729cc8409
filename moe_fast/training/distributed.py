"""Synchronizes the parameters and gradients of a loss between data-parallel processes.

``DistributedDataParallel`` does so for the encoder that it wraps, but not for the parameters of a
loss (a temperature), which lie outside of the encoder.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, distributed, nn


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its mean over the processes, as ``DistributedDataParallel`` does.

    If a process has no gradient of a parameter, it counts as zero there. If no process has one, it
    stays ``None``, so that the optimizer skips the parameter. Every process must call this, with
    the same parameters. There are two messages, whatever the number of parameters.
    """
    trainable = [p for p in parameters if p.requires_grad]
    if not trainable:
        return
    present = torch.tensor([p.grad is not None for p in trainable], device=trainable[0].device)
    used = present.to(torch.float32)
    distributed.all_reduce(used)
    trainable = [p for p, count in zip(trainable, used.tolist(), strict=True) if count]
    if not trainable:
        return
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in trainable]
    # The message has the widest dtype of all gradients, so that float64 stays float64.
    wire = max((g.dtype for g in grads), key=lambda dtype: torch.finfo(dtype).bits)
    flat = torch.cat([g.detach().flatten().to(wire) for g in grads])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    parts = flat.split([g.numel() for g in grads])
    for parameter, part in zip(trainable, parts, strict=True):
        parameter.grad = part.view_as(parameter).to(parameter.dtype)


def broadcast_from_first(tensors: Iterable[Tensor]) -> None:
    """Copy process 0's values into the tensors of all processes; every process must call this."""
    with torch.no_grad():
        for tensor in tensors:
            value = tensor.detach().contiguous()
            distributed.broadcast(value, src=0)
            tensor.copy_(value)
