"""route: chooses the experts of each token, and their weights.

T tokens of dimension D visit K of E experts each. With the router's weight Wr [E, D]:

    logits = x . Wr^T                      [T, E], in at least float32, autocast off
    index  = the K largest logits          [T, K], equal logits in order of expert id
    weight = f(logits, index)              [T, K]

``mode`` determines how experts are chosen:

    token_topk       for each token, by its own logits
    sentence_topk    for each sentence, by the mean of its real tokens' logits
    sentence_switch  the same with K = 1
    enforced         expert ids are given, per sentence or per token; the weight is 1
    dense            every token visits all E experts (K = E), with weights softmax(logits)

``weight_mode`` determines the weights; p is the softmax over all E logits:

    renormalize       softmax over the K chosen logits (the default for K >= 2)
    probability       the K chosen entries of p
    straight_through  forward exactly 1, gradient of log p: ``p / p.detach()`` (default, K = 1)
    one               the constant 1: the router gets no gradient from the task

Padding (``token_mask`` False) is never routed: its ids are E ("skip"), its weights and logits are
0. Its rows of ``x`` may hold anything, because they are not used.

Sources: Hallee et al., arXiv 2401.15713 (sentence and enforced routing, probability, one); Yu,
arXiv 2412.17364 (renormalize).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_fast.ops import backends
from moe_fast.ops.checked_calls import once_per_signature
from moe_fast.ops.checks import (
    FLOAT_DTYPES,
    INTEGER_DTYPES,
    check_choice,
    check_dtype,
    check_like,
    check_shape,
    check_tensor,
    compute_dtype,
    wants_gradients,
)
from moe_fast.ops.route import cpp, triton  # noqa: F401 - each registers itself
from moe_fast.ops.route.modes import (
    MODES,
    SENTENCE_MODES,
    check_experts_per_tok,
    resolve_weight_mode,
)
from moe_fast.ops.route.reference import route_enforced


@dataclass(frozen=True)
class Routing:
    """The routing of T tokens to K of E experts each.

    Attributes:
        top_k_index: [T, K] int64. An id >= E means "skip, contributes 0"; padding has the id E.
        top_k_weights: [T, K] float32 (float64 for float64 inputs).
        router_logits: [T, E] of the same dtype, for each token, also in the sentence modes; 0 for
            padding. ``None`` if routing is enforced.
        tokens_per_expert: [E] int64, the number of (token, slot) pairs of each expert.
    """

    top_k_index: Tensor
    top_k_weights: Tensor
    router_logits: Tensor | None
    tokens_per_expert: Tensor


def route(
    x: Tensor,
    router_weight: Tensor | None,
    num_experts_per_tok: int,
    *,
    mode: str = "token_topk",
    weight_mode: str = "auto",
    expert_ids: Tensor | None = None,
    token_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_experts: int | None = None,
    backend: str | None = None,
) -> Routing:
    """Route tokens to experts; see the module's docstring for the mathematics.

    Args:
        x: [T, D], or [B, L, D] with T = B * L; the input of the experts.
        router_weight: [E, D]; ``None`` with ``mode="enforced"``, which has no router.
        num_experts_per_tok: K, 1 <= K <= E. ``mode="dense"`` always visits all E experts.
        mode, weight_mode: see the module's docstring. "auto" is "one" for enforced, "probability"
            for dense routing, else "straight_through" for K = 1 and "renormalize" for K >= 2.
        expert_ids: with ``mode="enforced"`` only, int64 or int32, in [0, E). For an input
            [B, L, D]: [B] (one per sentence) or [B, L]. For an input [T, D]: [T], or [B] together
            with ``cu_seqlens``. Ids of padding are ignored.
        token_mask: bool, True for real tokens: [B, L] or [T]. ``None``: all are real.
        cu_seqlens: [B + 1] int32 or int64, the starts of sentences in a packed input [T, D]; the
            first is 0, the last T. The sentence modes need it for such an input.
        num_experts: E; needed if ``router_weight`` is ``None``.
        backend: see :func:`moe_fast.use_backend`.

    Returns:
        A :class:`Routing`; ``top_k_weights`` and ``router_logits`` carry gradients to ``x`` and
        ``router_weight``.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or names do not fit. On the CPU (elsewhere
            with ``MOE_FAST_CHECK=1``) also for ids out of range, and for logits that are NaN or
            infinite.
    """
    num_experts, weight_mode, dtype, run = _prepare(
        x,
        router_weight,
        num_experts_per_tok,
        mode,
        weight_mode,
        expert_ids,
        token_mask,
        cu_seqlens,
        num_experts,
        backend,
    )
    tokens, mask = x, token_mask
    starts = None if cu_seqlens is None else cu_seqlens.to(torch.int64)
    if x.dim() == 3:
        tokens, mask = x.flatten(0, 1), None if token_mask is None else token_mask.reshape(-1)
        if mode not in ("token_topk", "dense"):
            starts = torch.arange(x.shape[0] + 1, device=x.device) * x.shape[1]
    if expert_ids is not None:
        ids = expert_ids.reshape(-1).to(torch.int64)
        index, weights, counts = run(ids, tokens.shape[0], starts, mask, num_experts, dtype)
        return Routing(index, weights, None, counts)
    weights, logits, index, counts = run(
        tokens, router_weight, num_experts_per_tok, mode, weight_mode, mask, starts
    )
    return Routing(index, weights, logits, counts)


# --- once per signature --------------------------------------------------------------------------


@once_per_signature
def _prepare(
    x: Tensor,
    router_weight: Tensor | None,
    num_experts_per_tok: int,
    mode: str,
    weight_mode: str,
    expert_ids: Tensor | None,
    token_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    num_experts: int | None,
    backend: str | None,
) -> tuple[int, str, torch.dtype, Callable]:
    """Check the arguments; return E, the weight mode, the weights' dtype, and who computes."""
    num_experts = _check_experts(mode, router_weight, num_experts)
    weight_mode = resolve_weight_mode(mode, weight_mode, num_experts_per_tok)
    check_experts_per_tok(mode, num_experts_per_tok, num_experts)
    _check_tokens(x, token_mask, cu_seqlens)
    if mode == "enforced":
        check_choice("backend", backend, (None, *backends.CHOICES))
        _check_expert_ids(expert_ids, x, cu_seqlens)
        return num_experts, weight_mode, compute_dtype(x.dtype), route_enforced
    if expert_ids is not None:
        raise ValueError(f"expert_ids go with mode='enforced'; got them with mode={mode!r}.")
    assert router_weight is not None  # _check_experts
    check_shape("router_weight", router_weight, (num_experts, x.shape[-1]), "[E, D]")
    check_dtype("router_weight", router_weight, FLOAT_DTYPES)
    check_like("x", x, router_weight=router_weight)
    if mode in SENTENCE_MODES and cu_seqlens is None and x.dim() == 2:
        raise ValueError(
            f"mode={mode!r} needs sentences: give x as [B, L, D], or cu_seqlens beside [T, D]; "
            f"got x {list(x.shape)} and no cu_seqlens."
        )
    computed_in = compute_dtype(torch.promote_types(x.dtype, router_weight.dtype))
    needs_grad = wants_gradients(x, router_weight)
    run = backends.select("route", backend, x.device, computed_in, gradients=needs_grad)
    return num_experts, weight_mode, computed_in, run


def _check_experts(mode: str, router_weight: Tensor | None, num_experts: int | None) -> int:
    """Return E, from the router's weight or (enforced) the argument; raise if it is missing."""
    check_choice("mode", mode, MODES)
    if router_weight is None:
        if mode != "enforced":
            raise ValueError(f"router_weight must be given with mode={mode!r}; got None.")
        if num_experts is None:
            raise ValueError("num_experts must be given where router_weight is None; got None.")
        return num_experts
    check_tensor("router_weight", router_weight)
    if router_weight.dim() != 2:
        raise ValueError(f"router_weight must be [E, D]; got {list(router_weight.shape)}.")
    if num_experts is not None and num_experts != router_weight.shape[0]:
        raise ValueError(
            f"num_experts must equal router_weight's E = {router_weight.shape[0]}; "
            f"got {num_experts}."
        )
    return router_weight.shape[0]


def _check_tokens(x: Tensor, token_mask: Tensor | None, cu_seqlens: Tensor | None) -> None:
    check_dtype("x", x, FLOAT_DTYPES)
    if x.dim() not in (2, 3):
        raise ValueError(f"x must be [T, D] or [B, L, D]; got {list(x.shape)}.")
    check_like("x", x, dtype=False, token_mask=token_mask, cu_seqlens=cu_seqlens)
    if token_mask is not None:
        check_dtype("token_mask", token_mask, (torch.bool,))
        check_shape("token_mask", token_mask, tuple(x.shape[:-1]), "of x without D")
    if cu_seqlens is None:
        return
    if x.dim() == 3:
        raise ValueError(f"cu_seqlens go with a packed x [T, D]; got them with x {list(x.shape)}.")
    check_dtype("cu_seqlens", cu_seqlens, INTEGER_DTYPES)
    check_shape("cu_seqlens", cu_seqlens, (None,), "[B + 1]")


def _check_expert_ids(expert_ids: Tensor | None, x: Tensor, cu_seqlens: Tensor | None) -> None:
    """Raise unless there is one id per token, or one per sentence."""
    if expert_ids is None:
        raise ValueError("expert_ids must be given with mode='enforced'; got None.")
    check_dtype("expert_ids", expert_ids, INTEGER_DTYPES)
    check_like("x", x, dtype=False, expert_ids=expert_ids)
    allowed = [list(x.shape[:-1])]
    if x.dim() == 3 or cu_seqlens is not None:
        allowed.append([x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1])
    if list(expert_ids.shape) not in allowed:
        per_sentence = "[B] with cu_seqlens" if len(allowed) == 1 else str(allowed[-1])
        raise ValueError(
            f"expert_ids must have shape {allowed[0]} (one per token) or {per_sentence} (one per "
            f"sentence) for x {list(x.shape)}; got {list(expert_ids.shape)}."
        )
