"""Losses over router logits: load_balance, z_loss, expert_supervision.

Each takes the logits of one layer, [T, E], or of several layers that saw the same tokens,
[layers, T, E]. Padding is never counted, whatever its logits are. Everything is a sum over tokens,
divided once at the end: ``reduce`` turns a process's sums into those over all processes, and the
loss is that of the global batch, which the mean of the processes' losses would not be. The two
halves can be called apart, ``{loss}_sums`` and what makes the loss of them: the sums of a batch's
parts add up to the batch's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_fast.ops.checks import (
    INTEGER_DTYPES,
    check_dtype,
    check_shape,
    checks_values,
    compute_dtype,
)

Reduce = Callable[[Tensor], Tensor]


def one_process(sums: Tensor) -> Tensor:
    """The ``reduce`` of a single process: its sums are all there is."""
    return sums


def load_balance(
    router_logits: Tensor, top_k_index: Tensor, *, reduce: Reduce = one_process
) -> Tensor:
    """``E * sum_e f_e * P_e``, summed over layers: 1 for a layer in balance, E where it collapsed.

    A coefficient for it grows with the layers: Hallee et al. (arXiv 2401.15713) pool theirs over
    all layers, so that their 0.05 is about 0.05 / L here for L layers; divide by L for the mean.

    f_e is the share of routed slots that went to expert e (sums to 1 over e; no gradient), P_e the
    mean of the tokens' softmax probabilities of e.

    Args:
        router_logits: [T, E] or [layers, T, E].
        top_k_index: int64 [T, K] or [layers, T, K], >= 0; an id >= E is padding.
        reduce: sums a tensor over processes; see the module's docstring.

    Returns:
        [] float32 (float64 for float64 logits); 0 where no token is real.

    Raises:
        ValueError, TypeError: for shapes or dtypes that do not fit or, where values are checked,
            a negative id.

    Source: Fedus et al. (Switch Transformer), arXiv 2101.03961, eq. 4, for any K.
    """
    return load_balance_from_sums(reduce(load_balance_sums(router_logits, top_k_index)))


def load_balance_sums(router_logits: Tensor, top_k_index: Tensor) -> Tensor:
    """[2, E] or [2, layers, E]: slots of each expert over K (no gradient), and probabilities.

    Summed over e, the first is the number of real tokens. Arguments and errors as in
    :func:`load_balance`.
    """
    logits = check_logits(router_logits)
    check_dtype("top_k_index", top_k_index, INTEGER_DTYPES)
    check_shape("top_k_index", top_k_index, (*router_logits.shape[:-1], None), "[..., T, K]")
    check_ids("top_k_index", top_k_index)
    num_experts = logits.shape[-1]
    real = top_k_index[..., :1] < num_experts
    probabilities = (logits.masked_fill(~real, 0).softmax(-1) * real).sum(-2)  # [..., E]
    ids = top_k_index.to(torch.int64).clamp(max=num_experts).flatten(-2)
    counts = ids.new_zeros(*ids.shape[:-1], num_experts + 1)  # int64: float32 stops at 2^24
    slots = counts.scatter_add(-1, ids, torch.ones_like(ids))[..., :num_experts].to(logits.dtype)
    return torch.stack((slots / top_k_index.shape[-1], probabilities))


def load_balance_from_sums(sums: Tensor) -> Tensor:
    """The loss, [], of :func:`load_balance_sums` over a whole batch."""
    slots, probabilities = sums[0].detach(), sums[1]
    num_tokens = slots.sum(-1, keepdim=True).clamp(min=1)
    return sums.shape[-1] * ((slots / num_tokens) * (probabilities / num_tokens)).sum()


def z_loss(
    router_logits: Tensor, token_mask: Tensor | None = None, *, reduce: Reduce = one_process
) -> Tensor:
    """The mean over tokens of ``logsumexp(logits)^2``, summed over layers.

    Args:
        router_logits: [T, E] or [layers, T, E].
        token_mask: bool [T], True for real tokens; ``None``: all are.
        reduce: sums a tensor over processes; see the module's docstring.

    Returns:
        [] float32 (float64 for float64 logits); 0 where no token is real.

    Raises:
        ValueError, TypeError: for shapes or dtypes that do not fit.

    Source: Zoph et al. (ST-MoE), arXiv 2202.08906, eq. 5.
    """
    return mean_from_sums(reduce(z_loss_sums(router_logits, token_mask)))


def z_loss_sums(router_logits: Tensor, token_mask: Tensor | None = None) -> Tensor:
    """[2]: the squares, and the number of real tokens; arguments as in :func:`z_loss`."""
    logits, real = zero_padding(check_logits(router_logits), token_mask)
    squares = (logits.logsumexp(-1).square() * real).sum()
    return torch.stack((squares, real.sum()))


def mean_from_sums(sums: Tensor) -> Tensor:
    """[]: the mean, from [2] a total and a count (without a gradient); 0 of nothing."""
    return sums[0] / sums[1].detach().clamp(min=1)


def expert_supervision(
    router_logits: Tensor,
    sentence_ids: Tensor,
    expert_ids: Tensor,
    token_mask: Tensor | None = None,
    *,
    reduce: Reduce = one_process,
) -> Tensor:
    """Cross entropy of each sentence's mean logits against the expert that its domain is given.

    The mean is over the sentence's real tokens and over the layers, the loss the mean over
    sentences; one without a real token is left out.

    Args:
        router_logits: [T, E] or [layers, T, E].
        sentence_ids: int64 [T], each token's sentence in [0, B), padding's too.
        expert_ids: int64 [B] in [0, E).
        token_mask: bool [T], True for real tokens; ``None``: all are.
        reduce: sums a tensor over processes; see the module's docstring.

    Returns:
        [] float32 (float64 for float64 logits); 0 where no token is real.

    Raises:
        ValueError, TypeError: for shapes or dtypes that do not fit or, where values are checked,
            an id out of range.

    Source: Hallee et al., arXiv 2401.15713.
    """
    sums = expert_supervision_sums(router_logits, sentence_ids, expert_ids, token_mask)
    return mean_from_sums(reduce(sums))


def expert_supervision_sums(
    router_logits: Tensor,
    sentence_ids: Tensor,
    expert_ids: Tensor,
    token_mask: Tensor | None = None,
) -> Tensor:
    """[2]: the cross entropies, and the number of sentences; see :func:`expert_supervision`."""
    logits = check_logits(router_logits)
    check_dtype("sentence_ids", sentence_ids, INTEGER_DTYPES)
    check_shape("sentence_ids", sentence_ids, (logits.shape[-2],), "[T]")
    check_dtype("expert_ids", expert_ids, INTEGER_DTYPES)
    check_shape("expert_ids", expert_ids, (None,), "[B]")
    check_ids("sentence_ids", sentence_ids, "B", len(expert_ids))
    check_ids("expert_ids", expert_ids, "E", logits.shape[-1])  # or -100 would mean "left out"
    logits, real = zero_padding(logits, token_mask)
    of_token = logits if logits.dim() == 2 else logits.mean(0)
    num_sentences = len(expert_ids)
    sums = of_token.new_zeros(num_sentences, logits.shape[-1]).index_add(0, sentence_ids, of_token)
    num_tokens = real.new_zeros(num_sentences).index_add(0, sentence_ids, real)
    mean_logits = sums / num_tokens.clamp(min=1)[:, None]
    losses = F.cross_entropy(mean_logits, expert_ids.to(torch.int64), reduction="none")
    counted = (num_tokens > 0).to(losses.dtype)
    return torch.stack(((losses * counted).sum(), counted.sum()))


def check_logits(router_logits: Tensor) -> Tensor:
    """[..., T, E] in at least float32; raises for another rank or dtype."""
    if router_logits.dim() not in (2, 3):
        raise ValueError(
            f"router_logits must be [T, E] or [layers, T, E]; got {list(router_logits.shape)}."
        )
    if not router_logits.is_floating_point():
        raise TypeError(f"router_logits must be floating-point; got {router_logits.dtype}.")
    return router_logits.to(compute_dtype(router_logits.dtype))


def check_ids(name: str, ids: Tensor, bound_name: str = "", bound: int | None = None) -> None:
    """Raise ``ValueError`` for an id outside [0, bound), where values are checked."""
    if not checks_values(ids.device):
        return
    wrong = ids[(ids < 0) if bound is None else (ids < 0) | (ids >= bound)]
    if wrong.numel():
        allowed = "be at least 0" if bound is None else f"lie in [0, {bound_name}) = [0, {bound})"
        raise ValueError(f"{name} must {allowed}; got {int(wrong[0])}.")


def zero_padding(logits: Tensor, token_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The logits with 0 in place of padding's, and [T] in their dtype: 1 for real tokens, else 0.

    A factor of 0 alone would let padding's NaN through, into the gradient as well.
    """
    if token_mask is None:
        return logits, logits.new_ones(logits.shape[-2])
    check_dtype("token_mask", token_mask, (torch.bool,))
    check_shape("token_mask", token_mask, (logits.shape[-2],), "[T]")
    return logits.masked_fill(~token_mask[:, None], 0), token_mask.to(logits.dtype)
