"""route in PyTorch, and enforced routing, which has only this form."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from moe_fast.ops import backends
from moe_fast.ops.checks import check_starts, checks_values, compute_dtype, without_autocast
from moe_fast.ops.eager_dispatch import Operation, register_op, schema_of
from moe_fast.ops.route.modes import SENTENCE_MODES


def top_k_by_logit(logits: Tensor, k: int) -> Tensor:
    """Return the ids of the ``k`` largest logits per row, [N, E] -> [N, k].

    Equal logits come in the order of their ids: the sort is stable, ``torch.topk`` is not.
    """
    return torch.sort(logits, dim=-1, descending=True, stable=True).indices[:, :k]


def sentence_of_token(starts: Tensor, num_tokens: int) -> Tensor:
    """Return the sentence of each token: [B + 1] starts -> [T] int64.

    The result always lies in [0, B), also if starts are not checked and end before the tokens do.
    """
    positions = torch.arange(num_tokens, device=starts.device)
    sentence = torch.searchsorted(starts[1:], positions, right=True)
    return sentence.clamp(max=starts.shape[0] - 2)


class NonFiniteLogitsError(ValueError):
    """Router logits are NaN or infinite."""

    START = "router logits must not be NaN or infinite"  # of the message, also in C++


def check_logits(logits: Tensor) -> None:
    """Raise `NonFiniteLogitsError` for logits that are not finite, if values are checked."""
    if checks_values(logits.device) and not logits.isfinite().all():
        row = int((~logits.isfinite()).any(-1).nonzero()[0])
        raise NonFiniteLogitsError(
            f"{NonFiniteLogitsError.START}; got {logits[row].tolist()} for token {row}: x or "
            "router_weight holds such values."
        )


class Choice:
    """The logits by which experts are chosen: of tokens, or means of sentences.

    Its methods convert values of these (tokens or sentences) to values of tokens, and back.
    """

    def __init__(self, logits: Tensor, mode: str, mask: Tensor | None, starts: Tensor | None):
        self.sentence = None
        self.logits = logits  # [T, E]
        if mode in SENTENCE_MODES:
            assert starts is not None
            self.sentence = sentence_of_token(starts, logits.shape[0])
            real = logits.new_ones(logits.shape[0]) if mask is None else mask.to(logits.dtype)
            size = starts.shape[0] - 1
            counts = real.new_zeros(size).index_add_(0, self.sentence, real)
            self.share = (real / counts.clamp(min=1)[self.sentence])[:, None]  # [T, 1]
            self.logits = logits.new_zeros(size, logits.shape[1]).index_add_(
                0, self.sentence, logits * self.share
            )  # [B, E]

    def to_tokens(self, values: Tensor) -> Tensor:
        """Return the values [T, ...] of tokens, given those of tokens or of their sentences."""
        return values if self.sentence is None else values[self.sentence]

    def sum_over_tokens(self, values: Tensor) -> Tensor:
        """Sum values of tokens per sentence: the adjoint of ``to_tokens``."""
        if self.sentence is None:
            return values
        return values.new_zeros(self.logits.shape[0], values.shape[1]).index_add_(
            0, self.sentence, values
        )

    def logits_gradient(self, grad: Tensor) -> Tensor:
        """Return the gradient of the tokens' logits, [T, E], given that of ``self.logits``."""
        return grad if self.sentence is None else grad[self.sentence] * self.share


def _real_rows(x: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return x in ``dtype`` with 0 for padding, whose rows may hold anything, even NaN."""
    x = x.to(dtype)
    return x if mask is None else torch.where(mask[:, None], x, 0)


def _chosen(logits: Tensor, k: int, mode: str) -> Tensor:
    if mode == "dense":
        return torch.arange(logits.shape[1], device=logits.device).repeat(logits.shape[0], 1)
    return top_k_by_logit(logits, k)


def weights_of(logits: Tensor, index: Tensor, weight_mode: str) -> Tensor:
    """Return the weights [N, K] of the experts ``index`` [N, K], from their logits [N, E]."""
    if weight_mode == "renormalize":
        return logits.gather(1, index).softmax(-1)
    if weight_mode == "probability":
        return logits.softmax(-1).gather(1, index)
    return torch.ones_like(logits.gather(1, index))  # straight_through, one


def _weights_gradient(logits: Tensor, index: Tensor, weight_mode: str, grad: Tensor) -> Tensor:
    """Return the gradient of ``logits`` [N, E], given that of the weights, ``grad`` [N, K]."""
    if weight_mode == "one":
        return torch.zeros_like(logits)
    if weight_mode == "renormalize":
        w = logits.gather(1, index).softmax(-1)
        grad = w * (grad - (w * grad).sum(-1, keepdim=True))
        return torch.zeros_like(logits).scatter_add_(1, index, grad)
    p = logits.softmax(-1)
    spread = torch.zeros_like(logits).scatter_add_(1, index, grad)
    if weight_mode == "probability":
        return p * (spread - (p * spread).sum(-1, keepdim=True))
    return spread - p * spread.sum(-1, keepdim=True)  # straight_through: gradient of log p


def _skip_padding(
    index: Tensor, weights: Tensor, mask: Tensor | None, num_experts: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Give padding the id E and the weight 0; count the slots of each expert."""
    if mask is not None:
        index = torch.where(mask[:, None], index, num_experts)
        weights = torch.where(mask[:, None], weights, 0)
    counts = torch.bincount(index.reshape(-1), minlength=num_experts + 1)[:num_experts]
    return index.contiguous(), weights.contiguous(), counts.clone()


@without_autocast
def _route(
    x: Tensor,
    router_weight: Tensor,
    num_experts_per_tok: int,
    mode: str,
    weight_mode: str,
    token_mask: Tensor | None,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_starts(starts, x.shape[0])
    dtype = compute_dtype(torch.promote_types(x.dtype, router_weight.dtype))
    logits = _real_rows(x, token_mask, dtype) @ router_weight.to(dtype).t()
    check_logits(logits)
    choice = Choice(logits, mode, token_mask, starts)
    index = _chosen(choice.logits, num_experts_per_tok, mode)
    weights = weights_of(choice.logits, index, weight_mode)
    index, weights, counts = _skip_padding(
        choice.to_tokens(index), choice.to_tokens(weights), token_mask, logits.shape[1]
    )
    return weights, logits, index, counts


def _fake(x, router_weight, num_experts_per_tok, mode, weight_mode, token_mask, starts):
    num_tokens, num_experts = x.shape[0], router_weight.shape[0]
    k = num_experts if mode == "dense" else num_experts_per_tok
    dtype = compute_dtype(torch.promote_types(x.dtype, router_weight.dtype))
    return (
        x.new_empty((num_tokens, k), dtype=dtype),
        x.new_empty((num_tokens, num_experts), dtype=dtype),
        x.new_empty((num_tokens, k), dtype=torch.int64),
        x.new_empty((num_experts,), dtype=torch.int64),
    )


@without_autocast
def _route_backward(
    grad_weights: Tensor,
    grad_logits: Tensor,
    x: Tensor,
    router_weight: Tensor,
    logits: Tensor,
    num_experts_per_tok: int,
    mode: str,
    weight_mode: str,
    token_mask: Tensor | None,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor]:
    choice = Choice(logits, mode, token_mask, starts)
    index = _chosen(choice.logits, num_experts_per_tok, mode)
    if token_mask is not None:
        grad_weights = torch.where(token_mask[:, None], grad_weights, 0)
        grad_logits = torch.where(token_mask[:, None], grad_logits, 0)
    grad_choice = _weights_gradient(
        choice.logits, index, weight_mode, choice.sum_over_tokens(grad_weights)
    )
    grad = grad_logits + choice.logits_gradient(grad_choice)
    grad_x = grad @ router_weight.to(grad.dtype)
    grad_router_weight = grad.t() @ _real_rows(x, token_mask, grad.dtype)
    return grad_x.to(x.dtype), grad_router_weight.to(router_weight.dtype)


def _fake_backward(grad_weights, grad_logits, x, router_weight, *rest):
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(
        router_weight, memory_format=torch.contiguous_format
    )


def _save_for_backward(ctx, inputs, output):
    x, router_weight, k, mode, weight_mode, token_mask, starts = inputs
    _, logits, index, counts = output
    ctx.save_for_backward(x, router_weight, logits, token_mask, starts)
    ctx.settings = (k, mode, weight_mode)
    ctx.mark_non_differentiable(index, counts)


def _gradients(backward, ctx, grad_weights, grad_logits, _index, _counts):
    x, router_weight, logits, token_mask, starts = ctx.saved_tensors
    grads = backward(
        grad_weights, grad_logits, x, router_weight, logits, *ctx.settings, token_mask, starts
    )
    return *grads, None, None, None, None, None


def _route_enforced(
    expert_ids: Tensor,
    num_tokens: int,
    starts: Tensor | None,
    token_mask: Tensor | None,
    num_experts: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    check_starts(starts, num_tokens)
    if expert_ids.shape[0] != num_tokens or (
        starts is not None and starts.shape[0] - 1 == num_tokens
    ):
        assert starts is not None
        expert_ids = expert_ids[sentence_of_token(starts, num_tokens)]
    if checks_values(expert_ids.device):
        real = expert_ids if token_mask is None else expert_ids[token_mask]
        wrong = real[(real < 0) | (real >= num_experts)]
        if wrong.numel():
            raise ValueError(
                f"expert_ids must lie in [0, num_experts) = [0, {num_experts}); "
                f"got {int(wrong[0])}."
            )
    index = torch.where((expert_ids < 0) | (expert_ids > num_experts), num_experts, expert_ids)
    weights = torch.ones(num_tokens, 1, dtype=dtype, device=expert_ids.device)
    return _skip_padding(index[:, None], weights, token_mask, num_experts)


def _fake_enforced(expert_ids, num_tokens, starts, token_mask, num_experts, dtype):
    return (
        expert_ids.new_empty((num_tokens, 1)),
        expert_ids.new_empty((num_tokens, 1), dtype=dtype),
        expert_ids.new_empty((num_experts,)),
    )


def implement(name: str, forward: Callable, backward: Callable) -> Callable:
    """Register an implementation of route; unlike in other ops, two results have a gradient."""
    run_backward = register_op(
        f"moe_fast::{name}_backward", schema_of(_route_backward), backward, _fake_backward
    )
    gradients = functools.partial(_gradients, run_backward)
    schema = schema_of(_route)
    return register_op(f"moe_fast::{name}", schema, forward, _fake, _save_for_backward, gradients)


backends.register("route", "torch", implement("route", _route, _route_backward))
route_enforced = Operation(_route_enforced, _fake_enforced).implement(
    "route_enforced", _route_enforced
)
