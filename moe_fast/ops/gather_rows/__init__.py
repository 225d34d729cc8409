"""gather_rows: copies each token's vector to its rows, in the order of the experts.

T tokens have K slots each, S = T * K rows in all; see :class:`moe_fast.ops.RoutingPlan`.

    rows[r] = x[row_to_token[r]]        0 in the skipped rows behind expert_offsets[E]

With :func:`combine_rows` this suffices to write an expert of another form: between the two calls
the rows of expert e are contiguous, ``expert_offsets[e] .. expert_offsets[e + 1]``. (``expert_mlp``
gathers inside its products and needs neither.) The gradient of a token is the sum of its rows'
gradients, which is ``combine_rows`` with weights of 1.

Source: the permutation of MegaBlocks, arXiv 2211.15841, without its padding.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from moe_fast.ops import backends
from moe_fast.ops.checked_calls import once_per_signature
from moe_fast.ops.checks import FLOAT_DTYPES, check_dtype, check_like, check_shape, wants_gradients
from moe_fast.ops.gather_rows import cpp, reference  # noqa: F401 - each registers itself
from moe_fast.ops.plan import RoutingPlan


def gather_rows(x: Tensor, plan: RoutingPlan, *, backend: str | None = None) -> Tensor:
    """Return the rows of ``plan``, each a copy of its token's vector.

    Args:
        x: [T, D].
        plan: from :func:`plan`, of T tokens.
        backend: see :func:`moe_fast.use_backend`.

    Returns:
        [S, D] in the dtype of x, also under autocast, because nothing is computed.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit; on the CPU the ``cpp`` backend
            also checks the values of the plan's index tensors.
    """
    run = _prepare(x, plan, backend)
    return run(x, plan.expert_offsets, plan.row_to_token, plan.slot_to_row)


@once_per_signature
def _prepare(x: Tensor, plan: RoutingPlan, backend: str | None) -> Callable:
    """Check the arguments and return the implementation to run."""
    check_shape("x", x, (None, None), "[T, D]")
    check_dtype("x", x, FLOAT_DTYPES)
    slots = plan.row_to_token.shape[0]
    if slots % x.shape[0] if x.shape[0] else slots:
        raise ValueError(
            f"plan must be of the {x.shape[0]} tokens of x; got {slots} rows, no multiple of it."
        )
    check_shape("plan.slot_to_row", plan.slot_to_row, (slots,), "[S]")
    check_like("x", x, dtype=False, expert_offsets=plan.expert_offsets)
    needs_grad = wants_gradients(x)
    return backends.select("gather_rows", backend, x.device, x.dtype, gradients=needs_grad)
