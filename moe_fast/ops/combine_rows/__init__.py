"""combine_rows: sums each token's weighted rows, from the experts' order to the tokens' order.

T tokens have K slots each, S = T * K rows in all; see :class:`moe_fast.ops.RoutingPlan`.

    y[t] = sum over k of w[t, k] * rows[slot_to_row[t, k]]        skipped slots contribute exactly 0

Backward, with upstream gradient dy:

    drows[r] = w[slot of r] * dy[token of r]        0 in skipped rows
    dw[t, k] = <rows[slot_to_row[t, k]], dy[t]>     0 for skipped slots

Each token gathers its rows, instead of rows being scattered to tokens. So there are no atomics,
slots are always summed in the same order, and the result is deterministic.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moe_fast.ops import backends
from moe_fast.ops.checked_calls import once_per_signature
from moe_fast.ops.checks import FLOAT_DTYPES, check_dtype, check_like, check_shape, wants_gradients
from moe_fast.ops.combine_rows import cpp, reference  # noqa: F401 - each registers itself
from moe_fast.ops.plan import RoutingPlan


def combine_rows(
    rows: Tensor, top_k_weights: Tensor, plan: RoutingPlan, *, backend: str | None = None
) -> Tensor:
    """Compute the weighted sum of each token's rows.

    Args:
        rows: [S, D], in the order of ``plan``; skipped rows are not read.
        top_k_weights: [T, K] float32 or float64, S = T * K; those of skipped slots are not used.
        plan: from :func:`plan`.
        backend: see :func:`moe_fast.use_backend`.

    Returns:
        [T, D] in the dtype of ``rows``, also under autocast. The sum is computed in the wider of
        the two dtypes and rounded once.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit; on the CPU the ``cpp`` backend
            also checks the values of the plan's index tensors.
    """
    run = _prepare(rows, top_k_weights, plan, backend)
    return run(rows, top_k_weights, plan.expert_offsets, plan.slot_to_row)


@once_per_signature
def _prepare(
    rows: Tensor, top_k_weights: Tensor, plan: RoutingPlan, backend: str | None
) -> Callable:
    """Check the arguments and return the implementation to run."""
    check_shape("top_k_weights", top_k_weights, (None, None), "[T, K]")
    check_dtype("top_k_weights", top_k_weights, (torch.float32, torch.float64))
    slots = top_k_weights.shape[0] * top_k_weights.shape[1]
    check_shape("rows", rows, (slots, None), "[T * K, D]")
    check_dtype("rows", rows, FLOAT_DTYPES)
    check_shape("plan.slot_to_row", plan.slot_to_row, (slots,), "[T * K]")
    offsets = plan.expert_offsets
    check_like("rows", rows, dtype=False, top_k_weights=top_k_weights, expert_offsets=offsets)
    computed_in = torch.promote_types(rows.dtype, top_k_weights.dtype)
    needs_grad = wants_gradients(rows, top_k_weights)
    return backends.select("combine_rows", backend, rows.device, computed_in, gradients=needs_grad)
