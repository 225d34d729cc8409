"""Losses over router logits: load_balance, z_loss, expert_supervision.

T is the number of tokens, E that of experts, K that of experts per token, B that of sentences. Each
loss takes the logits of one layer, [T, E], or of several layers that saw the same tokens,
[layers, T, E]. Padding never counts, whatever its logits are.

Each loss is computed in two steps that can be called separately. ``{loss}_sums`` sums over the
tokens of a part of the batch; another function computes the loss from the total of all parts'
sums. ``reduce`` sums over processes in between. The result is then the loss of the global batch,
which differs from the mean of the processes' losses.
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
    """The ``reduce`` of a single process: returns its sums unchanged."""
    return sums


def load_balance(
    router_logits: Tensor, top_k_index: Tensor, *, reduce: Reduce = one_process
) -> Tensor:
    """Compute ``E * sum_e f_e * P_e``, summed over layers.

    f_e is the share of routed slots that went to expert e (they sum to 1 over e; no gradient), P_e
    the mean of the tokens' softmax probabilities of e. A balanced layer gives 1, a layer that sends
    all tokens to one expert gives E.

    The sum grows with the number of layers L; divide it by L for the mean. Hallee et al.
    (arXiv 2401.15713) compute one term over all layers, so their coefficient of 0.05 is about
    0.05 / L here.

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
    """Return the sums of :func:`load_balance`, [2, E] or [2, layers, E].

    The first row counts the slots of each expert, divided by K (no gradient): its sum over e is
    the number of real tokens. The second row sums the tokens' probabilities. Arguments and errors
    are those of :func:`load_balance`.
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
    """Compute the loss, [], from the :func:`load_balance_sums` of a whole batch."""
    slots, probabilities = sums[0].detach(), sums[1]
    num_tokens = slots.sum(-1, keepdim=True).clamp(min=1)
    return sums.shape[-1] * ((slots / num_tokens) * (probabilities / num_tokens)).sum()


def z_loss(
    router_logits: Tensor, token_mask: Tensor | None = None, *, reduce: Reduce = one_process
) -> Tensor:
    """Compute the mean over tokens of ``logsumexp(logits)^2``, summed over layers.

    Args:
        router_logits: [T, E] or [layers, T, E].
        token_mask: bool [T], True for real tokens; ``None``: all are real.
        reduce: sums a tensor over processes; see the module's docstring.

    Returns:
        [] float32 (float64 for float64 logits); 0 if no token is real.

    Raises:
        ValueError, TypeError: shapes or dtypes do not fit.

    Source: Zoph et al. (ST-MoE), arXiv 2202.08906, eq. 5.
    """
    return mean_from_sums(reduce(z_loss_sums(router_logits, token_mask)))


def z_loss_sums(router_logits: Tensor, token_mask: Tensor | None = None) -> Tensor:
    """Return [2]: the sum of squares, and the number of real tokens; see :func:`z_loss`."""
    logits, real = zero_padding(check_logits(router_logits), token_mask)
    squares = (logits.logsumexp(-1).square() * real).sum()
    return torch.stack((squares, real.sum()))


def mean_from_sums(sums: Tensor) -> Tensor:
    """Return the mean, [], from [2], a total and a count (no gradient); 0 if the count is 0."""
    return sums[0] / sums[1].detach().clamp(min=1)


def expert_supervision(
    router_logits: Tensor,
    sentence_ids: Tensor,
    expert_ids: Tensor,
    token_mask: Tensor | None = None,
    *,
    reduce: Reduce = one_process,
) -> Tensor:
    """Compute the cross entropy of each sentence's mean logits with its expert as the target.

    The logits are averaged over the sentence's real tokens and over the layers, the cross entropies
    over sentences. Sentences without a real token are left out.

    Args:
        router_logits: [T, E] or [layers, T, E].
        sentence_ids: int64 [T], the sentence of each token, in [0, B), also for padding.
        expert_ids: int64 [B], the target of each sentence, in [0, E).
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
    """Return [2]: the sum of cross entropies, and the number of sentences.

    See :func:`expert_supervision`.
    """
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
    """Return the logits [..., T, E] in at least float32; raises for another rank or dtype."""
    if router_logits.dim() not in (2, 3):
        raise ValueError(
            f"router_logits must be [T, E] or [layers, T, E]; got {list(router_logits.shape)}."
        )
    if not router_logits.is_floating_point():
        raise TypeError(f"router_logits must be floating-point; got {router_logits.dtype}.")
    return router_logits.to(compute_dtype(router_logits.dtype))


def check_ids(name: str, ids: Tensor, bound_name: str = "", bound: int | None = None) -> None:
    """Raise ``ValueError`` for an id outside [0, bound), if values are checked.

    Without ``bound``, only negative ids raise. ``bound_name`` is the bound's name in the message.
    """
    if not checks_values(ids.device):
        return
    wrong = ids[(ids < 0) if bound is None else (ids < 0) | (ids >= bound)]
    if wrong.numel():
        allowed = "be at least 0" if bound is None else f"lie in [0, {bound_name}) = [0, {bound})"
        raise ValueError(f"{name} must {allowed}; got {int(wrong[0])}.")


def zero_padding(logits: Tensor, token_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the logits with 0 for padding, and a mask [T] in their dtype: 1 for real tokens.

    Multiplying by the mask is not enough: a NaN in padding would survive, in the gradient too.
    """
    if token_mask is None:
        return logits, logits.new_ones(logits.shape[-2])
    check_dtype("token_mask", token_mask, (torch.bool,))
    check_shape("token_mask", token_mask, (logits.shape[-2],), "[T]")
    return logits.masked_fill(~token_mask[:, None], 0), token_mask.to(logits.dtype)
