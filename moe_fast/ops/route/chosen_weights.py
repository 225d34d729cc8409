"""Computes the routing weights of experts that were chosen before."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_fast.ops.checked_calls import once_per_signature
from moe_fast.ops.checks import INTEGER_DTYPES, check_choice, check_dtype, check_shape
from moe_fast.ops.route.modes import CHOOSING_MODES, SENTENCE_MODES, resolve_weight_mode
from moe_fast.ops.route.reference import Choice, weights_of


def chosen_weights(
    router_logits: Tensor,
    top_k_index: Tensor,
    *,
    mode: str,
    weight_mode: str = "auto",
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Return the weights that :func:`route` gives to chosen experts, with their gradient.

    It is for a choice that must be repeated although the logits may have changed (in a second
    forward pass, which rounds differently). For the choice that :func:`route` made from the same
    logits, the weights are the same.

    Args:
        router_logits: [T, E], as :func:`route` returns them.
        top_k_index: [T, K] int64; an id >= E is padding, with weight 0.
        mode, weight_mode: as in :func:`route`; the mode must be one that chooses.
        cu_seqlens: [B + 1], the starts of sentences; the sentence modes need it.

    Returns:
        [T, K] in the dtype of the logits, differentiable with respect to them.

    Raises:
        ValueError, TypeError: settings, shapes or dtypes do not fit.
    """
    weight_mode = _check(router_logits, top_k_index, mode, weight_mode, cu_seqlens is not None)
    real = top_k_index < router_logits.shape[1]
    index = torch.where(real, top_k_index, 0)
    choice = Choice(router_logits, mode, real[:, 0], cu_seqlens)
    logits = choice.to_tokens(choice.logits)
    if weight_mode == "straight_through":
        log_p = logits.log_softmax(-1).gather(1, index)
        weights = (log_p - log_p.detach()).exp()
    else:
        weights = weights_of(logits, index, weight_mode)
    return torch.where(real, weights, 0)


@once_per_signature
def _check(
    router_logits: Tensor, top_k_index: Tensor, mode: str, weight_mode: str, has_sentences: bool
) -> str:
    """Check the arguments and return the concrete weight mode."""
    check_choice("mode", mode, CHOOSING_MODES)
    check_dtype("top_k_index", top_k_index, INTEGER_DTYPES)
    check_shape("top_k_index", top_k_index, (router_logits.shape[0], None), "[T, K]")
    if mode in SENTENCE_MODES and not has_sentences:
        raise ValueError(f"mode={mode!r} needs cu_seqlens; got None.")
    return resolve_weight_mode(mode, weight_mode, top_k_index.shape[1])
