"""route: which experts each token visits, and with which weights.

    logits = x . Wr^T                      [T, E], in at least float32, autocast off
    index  = the K largest logits          [T, K], equal logits in order of expert id
    weight = f(logits, index)              [T, K]

``mode`` says what chooses:

    token_topk       each token, by its own logits
    sentence_topk    each sentence, by the mean of its real tokens' logits
    sentence_switch  the same with K = 1
    enforced         nobody: expert ids are given, per sentence or per token; weight 1
    dense            every token visits all E experts (K = E), weights softmax(logits)

``weight_mode`` says with which weight, p being softmax over all E logits:

    renormalize       softmax over the K chosen logits (the default for K >= 2)
    probability       the K chosen entries of p
    straight_through  forward exactly 1, gradient of log p: ``p / p.detach()`` (default, K = 1)
    one               the constant 1: the router gets no gradient from the task

Padding (``token_mask`` False) is never routed: its ids are E ("skip"), its weights and logits 0,
and its rows of ``x`` are never read, so they may hold anything.

Sources: Hallee et al., arXiv 2401.15713 (sentence and enforced routing, probability, one); Yu,
arXiv 2412.17364 (renormalize).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_fast.ops import backends
from moe_fast.ops.checks import (
    FLOAT_DTYPES,
    INTEGER_DTYPES,
    check_choice,
    check_count,
    check_dtype,
    check_like,
    check_shape,
    check_starts,
    check_tensor,
    checks_values,
    compute_dtype,
    without_autocast,
)

MODES = ("token_topk", "sentence_topk", "sentence_switch", "enforced", "dense")
CHOOSING_MODES = ("token_topk", "sentence_topk", "sentence_switch")
SENTENCE_MODES = ("sentence_topk", "sentence_switch")
WEIGHT_MODES = ("auto", "renormalize", "probability", "straight_through", "one")


@dataclass(frozen=True)
class Routing:
    """The route of T tokens to K of E experts each.

    Attributes:
        top_k_index: [T, K] int64. An id >= E means "skip, contributes 0" (padding has id E).
        top_k_weights: [T, K] float32, or float64 where the input is.
        router_logits: [T, E] of the same dtype, each token's own, also in the sentence modes;
            0 for padding. ``None`` when routing is enforced.
        tokens_per_expert: [E] int64, how many (token, slot) pairs each expert got.
    """

    top_k_index: Tensor
    top_k_weights: Tensor
    router_logits: Tensor | None
    tokens_per_expert: Tensor


def resolve_weight_mode(
    mode: str, weight_mode: str, num_experts_per_tok: int, mode_name: str = "mode"
) -> str:
    """The concrete weight mode behind ``"auto"``, checking that mode and weights go together.

    Args:
        mode_name: what the caller's argument is called, for the messages.

    Raises:
        ValueError: for an unknown name, or a weight mode that ``mode`` does not have.
    """
    check_choice(mode_name, mode, MODES)
    check_choice("weight_mode", weight_mode, WEIGHT_MODES)
    if mode == "enforced":
        check_choice(f"weight_mode with {mode_name}='enforced'", weight_mode, ("auto", "one"))
        return "one"
    if mode == "dense":
        allowed = ("auto", "probability")
        check_choice(f"weight_mode with {mode_name}='dense'", weight_mode, allowed)
        return "probability"
    if weight_mode == "auto":
        return "straight_through" if num_experts_per_tok == 1 else "renormalize"
    return weight_mode


def check_experts_per_tok(
    mode: str, num_experts_per_tok: int, num_experts: int, mode_name: str = "mode"
) -> None:
    """Raise ``ValueError`` or ``TypeError`` unless E, K and ``mode`` go together."""
    check_count("num_experts", num_experts)
    check_count("num_experts_per_tok", num_experts_per_tok, at_least=None)
    if not 1 <= num_experts_per_tok <= num_experts:
        raise ValueError(
            f"num_experts_per_tok must lie in 1 .. num_experts = {num_experts}; "
            f"got {num_experts_per_tok}."
        )
    if mode in ("enforced", "sentence_switch") and num_experts_per_tok != 1:
        raise ValueError(
            f"num_experts_per_tok must be 1 with {mode_name}={mode!r}; got {num_experts_per_tok}."
        )


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
        num_experts_per_tok: K, 1 <= K <= E. ``mode="dense"`` visits all E whatever K says.
        mode, weight_mode: see above.
        expert_ids: with ``mode="enforced"`` only, int64 or int32, in [0, E): [B] (one a sentence)
            or [B, L] beside a [B, L, D] input; [T], or [B] together with ``cu_seqlens``, beside
            a [T, D] input. Ids of padding are not looked at.
        token_mask: bool, True for real tokens: [B, L] or [T]. ``None``: all are real.
        cu_seqlens: [B + 1] int32 or int64, where sentences start in a packed [T, D] input
            (0 = first, T = last). The sentence modes need it there.
        num_experts: E where ``router_weight`` is ``None``.
        backend: see :func:`moe_fast.use_backend`.

    Returns:
        A :class:`Routing`; ``top_k_weights`` and ``router_logits`` carry gradients to ``x`` and
        ``router_weight``.

    Raises:
        ValueError, TypeError: for shapes, dtypes, devices or names that do not fit. On the CPU
            (elsewhere with ``MOE_FAST_CHECK=1``) also for ids out of range and NaN logits.
    """
    num_experts = _check_experts(mode, router_weight, num_experts)
    weight_mode = resolve_weight_mode(mode, weight_mode, num_experts_per_tok)
    check_experts_per_tok(mode, num_experts_per_tok, num_experts)
    tokens, mask, starts = _flatten(x, token_mask, cu_seqlens)
    if starts is None and x.dim() == 3 and mode not in ("token_topk", "dense"):
        starts = torch.arange(x.shape[0] + 1, device=x.device) * x.shape[1]
    if mode == "enforced":
        ids = _check_expert_ids(expert_ids, x, starts)
        dtype = compute_dtype(x.dtype)
        index, weights, counts = _enforced_op(
            ids, tokens.shape[0], starts, mask, num_experts, dtype
        )
        return Routing(index, weights, None, counts)
    if expert_ids is not None:
        raise ValueError(f"expert_ids go with mode='enforced'; got them with mode={mode!r}.")
    assert router_weight is not None  # _check_experts
    check_shape("router_weight", router_weight, (num_experts, tokens.shape[1]), "[E, D]")
    check_dtype("router_weight", router_weight, FLOAT_DTYPES)
    check_like("x", x, router_weight=router_weight)
    if mode in SENTENCE_MODES and starts is None:
        raise ValueError(
            f"mode={mode!r} needs sentences: give x as [B, L, D], or cu_seqlens beside [T, D]; "
            f"got x {list(x.shape)} and no cu_seqlens."
        )
    computed_in = compute_dtype(torch.promote_types(x.dtype, router_weight.dtype))
    run = backends.select("route", backend, x.device, computed_in)
    weights, logits, index, counts = run(
        tokens, router_weight, num_experts_per_tok, mode, weight_mode, mask, starts
    )
    return Routing(index, weights, logits, counts)


def chosen_weights(
    router_logits: Tensor,
    top_k_index: Tensor,
    *,
    mode: str,
    weight_mode: str = "auto",
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The weights that :func:`route` gives to a choice of experts, with their gradient.

    For a choice that is to be made again, whatever the logits say by now (a second forward whose
    rounding differs). Given the choice that :func:`route` made of the same logits, its weights.

    Args:
        router_logits: [T, E], as :func:`route` returns them.
        top_k_index: [T, K] int64; an id >= E is padding, whose weights are 0.
        mode, weight_mode: as in :func:`route`; a mode that chooses.
        cu_seqlens: [B + 1], where sentences start; needed by the sentence modes.

    Returns:
        [T, K] in the dtype of the logits, differentiable in them.

    Raises:
        ValueError, TypeError: for settings or shapes that do not fit.
    """
    check_choice("mode", mode, CHOOSING_MODES)
    check_dtype("top_k_index", top_k_index, INTEGER_DTYPES)
    check_shape("top_k_index", top_k_index, (router_logits.shape[0], None), "[T, K]")
    if mode in SENTENCE_MODES and cu_seqlens is None:
        raise ValueError(f"mode={mode!r} needs cu_seqlens; got None.")
    weight_mode = resolve_weight_mode(mode, weight_mode, top_k_index.shape[1])
    real = top_k_index < router_logits.shape[1]
    index = torch.where(real, top_k_index, 0)
    choice = _Choice(router_logits, mode, real[:, 0], cu_seqlens)
    logits = choice.to_tokens(choice.logits)
    if weight_mode == "straight_through":
        log_p = logits.log_softmax(-1).gather(1, index)
        weights = (log_p - log_p.detach()).exp()
    else:
        weights = _weights(logits, index, weight_mode)
    return torch.where(real, weights, 0)


# --- what comes in -------------------------------------------------------------------------------


def _check_experts(mode: str, router_weight: Tensor | None, num_experts: int | None) -> int:
    """E, from the router's weight or, when enforced, from the argument."""
    check_choice("mode", mode, MODES)
    if router_weight is None:
        if mode != "enforced":
            raise ValueError(f"router_weight must be given with mode={mode!r}; got None.")
        if num_experts is None:
            raise ValueError("num_experts must be given where router_weight is None; got None.")
        return num_experts
    if router_weight.dim() != 2:
        raise ValueError(f"router_weight must be [E, D]; got {list(router_weight.shape)}.")
    if num_experts is not None and num_experts != router_weight.shape[0]:
        raise ValueError(
            f"num_experts must equal router_weight's E = {router_weight.shape[0]}; "
            f"got {num_experts}."
        )
    return router_weight.shape[0]


def _flatten(
    x: Tensor, token_mask: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x as [T, D], the mask as [T], and the starts of packed sentences, [B + 1] int64."""
    check_dtype("x", x, FLOAT_DTYPES)
    if x.dim() not in (2, 3):
        raise ValueError(f"x must be [T, D] or [B, L, D]; got {list(x.shape)}.")
    check_like("x", x, dtype=False, token_mask=token_mask, cu_seqlens=cu_seqlens)
    if token_mask is not None:
        check_dtype("token_mask", token_mask, (torch.bool,))
        check_shape("token_mask", token_mask, tuple(x.shape[:-1]), "of x without D")
        token_mask = token_mask.reshape(-1)
    if x.dim() == 2:
        if cu_seqlens is not None:
            check_dtype("cu_seqlens", cu_seqlens, INTEGER_DTYPES)
            check_shape("cu_seqlens", cu_seqlens, (None,), "[B + 1]")
            cu_seqlens = cu_seqlens.to(torch.int64)
        return x, token_mask, cu_seqlens
    if cu_seqlens is not None:
        raise ValueError(f"cu_seqlens go with a packed x [T, D]; got them with x {list(x.shape)}.")
    return x.flatten(0, 1), token_mask, None


def _check_expert_ids(expert_ids: Tensor | None, x: Tensor, starts: Tensor | None) -> Tensor:
    """Enforced ids as [T] or [B], int64; the op spreads [B] over the sentences' tokens."""
    if expert_ids is None:
        raise ValueError("expert_ids must be given with mode='enforced'; got None.")
    check_tensor("expert_ids", expert_ids)
    check_dtype("expert_ids", expert_ids, INTEGER_DTYPES)
    check_like("x", x, dtype=False, expert_ids=expert_ids)
    allowed = [list(x.shape[:-1])] + ([] if starts is None else [[starts.shape[0] - 1]])
    if list(expert_ids.shape) not in allowed:
        per_sentence = "[B] with cu_seqlens" if starts is None else str(allowed[-1])
        raise ValueError(
            f"expert_ids must have shape {allowed[0]} (one per token) or {per_sentence} (one per "
            f"sentence) for x {list(x.shape)}; got {list(expert_ids.shape)}."
        )
    return expert_ids.reshape(-1).to(torch.int64)


# --- the reference -------------------------------------------------------------------------------


def top_k_by_logit(logits: Tensor, k: int) -> Tensor:
    """Ids of the ``k`` largest logits per row, equal logits in order of id: [N, E] -> [N, k].

    ``torch.topk`` promises no order among equals; a stable sort does.
    """
    return torch.sort(logits, dim=-1, descending=True, stable=True).indices[:, :k]


def sentence_of_token(starts: Tensor, num_tokens: int) -> Tensor:
    """The sentence each token belongs to: [B + 1] starts -> [T] int64.

    Always an index into the B sentences, also where unchecked starts end before the tokens do.
    """
    positions = torch.arange(num_tokens, device=starts.device)
    sentence = torch.searchsorted(starts[1:], positions, right=True)
    return sentence.clamp(max=starts.shape[0] - 2)


class NonFiniteLogitsError(ValueError):
    """Router logits are NaN or infinite."""

    START = "router logits must not be NaN or infinite"  # of the message, in C++ too


def check_logits(logits: Tensor) -> None:
    """Raise `NonFiniteLogitsError` for logits that are not finite, where values are checked."""
    if checks_values(logits.device) and not logits.isfinite().all():
        row = int((~logits.isfinite()).any(-1).nonzero()[0])
        raise NonFiniteLogitsError(
            f"{NonFiniteLogitsError.START}; got {logits[row].tolist()} for token {row}: x or "
            "router_weight holds such values."
        )


class _Choice:
    """What the choice is made on: token logits, or sentence means, and the way back to tokens."""

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
        return values if self.sentence is None else values[self.sentence]

    def sum_over_tokens(self, values: Tensor) -> Tensor:
        """The adjoint of ``to_tokens``."""
        if self.sentence is None:
            return values
        return values.new_zeros(self.logits.shape[0], values.shape[1]).index_add_(
            0, self.sentence, values
        )

    def logits_gradient(self, grad: Tensor) -> Tensor:
        """From the gradient of ``self.logits`` to that of the tokens' logits, [T, E]."""
        return grad if self.sentence is None else grad[self.sentence] * self.share


def _real_rows(x: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x in ``dtype``, padding zeroed: its rows may hold anything, NaN included."""
    x = x.to(dtype)
    return x if mask is None else torch.where(mask[:, None], x, 0)


def _router_logits(x: Tensor, weight: Tensor, mask: Tensor | None) -> Tensor:
    dtype = compute_dtype(torch.promote_types(x.dtype, weight.dtype))
    return _real_rows(x, mask, dtype) @ weight.to(dtype).t()


def _chosen(logits: Tensor, k: int, mode: str) -> Tensor:
    if mode == "dense":
        return torch.arange(logits.shape[1], device=logits.device).repeat(logits.shape[0], 1)
    return top_k_by_logit(logits, k)


def _weights(logits: Tensor, index: Tensor, weight_mode: str) -> Tensor:
    if weight_mode == "renormalize":
        return logits.gather(1, index).softmax(-1)
    if weight_mode == "probability":
        return logits.softmax(-1).gather(1, index)
    return torch.ones_like(logits.gather(1, index))  # straight_through, one


def _weights_gradient(logits: Tensor, index: Tensor, weight_mode: str, grad: Tensor) -> Tensor:
    """The gradient of ``logits`` [N, E] from that of the weights, ``grad`` [N, K]."""
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
    """Give padding id E and weight 0; count what each expert got."""
    if mask is not None:
        index = torch.where(mask[:, None], index, num_experts)
        weights = torch.where(mask[:, None], weights, 0)
    counts = torch.bincount(index.reshape(-1), minlength=num_experts + 1)[:num_experts]
    return index.contiguous(), weights.contiguous(), counts.clone()


# --- the registered ops --------------------------------------------------------------------------


@torch.library.custom_op("moe_fast::route", mutates_args=())
@without_autocast
def _route_op(
    x: Tensor,
    router_weight: Tensor,
    num_experts_per_tok: int,
    mode: str,
    weight_mode: str,
    token_mask: Tensor | None,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_starts(starts, x.shape[0])
    logits = _router_logits(x, router_weight, token_mask)
    check_logits(logits)
    choice = _Choice(logits, mode, token_mask, starts)
    index = _chosen(choice.logits, num_experts_per_tok, mode)
    weights = _weights(choice.logits, index, weight_mode)
    index, weights, counts = _skip_padding(
        choice.to_tokens(index), choice.to_tokens(weights), token_mask, logits.shape[1]
    )
    return weights, logits, index, counts


@_route_op.register_fake
def fake(x, router_weight, num_experts_per_tok, mode, weight_mode, token_mask, starts):
    """Shapes of the forward op's results, on every backend."""
    num_tokens, num_experts = x.shape[0], router_weight.shape[0]
    k = num_experts if mode == "dense" else num_experts_per_tok
    dtype = compute_dtype(torch.promote_types(x.dtype, router_weight.dtype))
    return (
        x.new_empty((num_tokens, k), dtype=dtype),
        x.new_empty((num_tokens, num_experts), dtype=dtype),
        x.new_empty((num_tokens, k), dtype=torch.int64),
        x.new_empty((num_experts,), dtype=torch.int64),
    )


@torch.library.custom_op("moe_fast::route_backward", mutates_args=())
@without_autocast
def _route_backward_op(
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
    choice = _Choice(logits, mode, token_mask, starts)
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


@_route_backward_op.register_fake
def fake_backward(grad_weights, grad_logits, x, router_weight, *rest):
    """Shapes of the backward op's results, on every backend."""
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(
        router_weight, memory_format=torch.contiguous_format
    )


def save_for_backward(ctx, inputs, output):
    """Keep the op's tensors and the logits."""
    x, router_weight, k, mode, weight_mode, token_mask, starts = inputs
    _, logits, index, counts = output
    ctx.save_for_backward(x, router_weight, logits, token_mask, starts)
    ctx.settings = (k, mode, weight_mode)
    ctx.mark_non_differentiable(index, counts)


def backward(op, ctx, grad_weights, grad_logits, _index, _counts):
    """The gradients of the forward op's inputs, by the backward op ``op``."""
    x, router_weight, logits, token_mask, starts = ctx.saved_tensors
    grads = op(
        grad_weights, grad_logits, x, router_weight, logits, *ctx.settings, token_mask, starts
    )
    return *grads, None, None, None, None, None


_route_op.register_autograd(
    functools.partial(backward, _route_backward_op), setup_context=save_for_backward
)


@torch.library.custom_op("moe_fast::route_enforced", mutates_args=())
def _enforced_op(
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


@_enforced_op.register_fake
def _(expert_ids, num_tokens, starts, token_mask, num_experts, dtype):
    return (
        expert_ids.new_empty((num_tokens, 1)),
        expert_ids.new_empty((num_tokens, 1), dtype=dtype),
        expert_ids.new_empty((num_experts,)),
    )


backends.register("route", "torch", _route_op)
