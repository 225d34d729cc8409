"""info_nce in C++, on the CPU, with all logits in memory: kernels/csrc/cpu/info_nce.cpp.

It is for the batches of ordinary training, where the number of PyTorch operations would take longer
than their work. The backward pass uses the logits of the forward pass, so it has three products,
and larger batches run in tiles.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_fast.ops import backends, native
from moe_fast.ops.checks import COMPILED_DTYPES
from moe_fast.ops.eager_dispatch import Operation
from moe_fast.ops.info_nce import tiled
from moe_fast.ops.info_nce.arguments import check_scale, row_weights
from moe_fast.ops.info_nce.tiles import check_finite

# B x N, and the entries of all embeddings: 4 and 8 MB of float32.
MOST_LOGITS, MOST_ENTRIES = 2**20, 2**21


def _suits(a: Tensor, b: Tensor, negatives: Tensor | None) -> bool:
    """Whether the batch is small, and in dtypes that the kernel reads."""
    hard = 0 if negatives is None else negatives.shape[0]
    candidates = b.shape[0] + hard
    return (
        a.shape[0] * candidates <= MOST_LOGITS
        and (a.shape[0] + candidates) * a.shape[1] <= MOST_ENTRIES
        and all(x is None or x.dtype in COMPILED_DTYPES for x in (a, b, negatives))
    )


def _native_inputs(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the tensors as the kernel reads them: int64 ids, weights that sum to 1."""
    a, b, negatives, scale, *ids, weights = inputs
    ids = [None if i is None else i.to(torch.int64) for i in ids]
    return a, b, negatives, scale, *ids, None if weights is None else row_weights(weights, a)


def _info_nce(
    a: Tensor,
    b: Tensor,
    negatives: Tensor | None,
    scale: Tensor,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    domain_ids: Tensor | None,
    group_ids: Tensor | None,
    weights: Tensor | None,
    label_smoothing: float,
    symmetric: bool,
    cosine: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = (a, b, negatives, scale, row_ids, col_ids, domain_ids, group_ids, weights)
    op = torch.ops.moe_fast_cpp.info_nce
    try:
        return native.call(op, *_native_inputs(inputs), label_smoothing, symmetric, cosine)
    except ValueError:
        check_scale(scale)
        check_finite(a=a, b=b, negatives=negatives)  # names the row
        raise


def _info_nce_backward(grad_loss: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    tensors, others = _native_inputs(inputs[:9]), inputs[9:]
    return native.call(torch.ops.moe_fast_cpp.info_nce_backward, grad_loss, *tensors, *others)


def _fake(a, b, negatives, scale, *rest):
    batch, symmetric = a.shape[0], rest[-2]
    candidates = batch if negatives is None else batch + negatives.shape[0]
    return (
        scale.new_empty(()),
        scale.new_empty((batch,)),
        scale.new_empty((batch,), dtype=torch.int64),
        scale.new_empty((4, batch)),
        scale.new_empty((4, batch if symmetric else 0)),
        scale.new_empty((batch, candidates)),
    )


_OPERATION = Operation(_info_nce, _fake, tiled.fake_backward, differentiable=4, saved=(3, 4, 5))
_run_op = _OPERATION.implement("info_nce_cpp", _info_nce, _info_nce_backward)


def _run(a: Tensor, b: Tensor, negatives: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    run = _run_op if _suits(a, b, negatives) else tiled.run
    return run(a, b, negatives, *rest)[:3]


def _note(_: str) -> str:
    return f"up to {MOST_LOGITS:,} logits, larger batches run in tiles"


backends.register(
    "info_nce", "cpp", _run, native.why_no_products, dtypes=COMPILED_DTYPES, note=_note
)
