"""The choice of a router: the columns with the highest scores in each row, and their weights.

Of equal scores the lower expert id comes first. Scores are the logits of a token, or the mean
logits of the real tokens of a sentence.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from .numerics import SMALLEST_DOT

TOKENS, DIM = 32, 64  # tile of the router's products


@dataclass(frozen=True)
class RouteSettings:
    """The settings of the kernels.

    Attributes:
        k: experts per token; E where ``dense``.
        weight_mode: "renormalize", "probability", "straight_through" or "one".
        sentences: choose by sentence means.
        dense: visit all experts in order.
    """

    k: int
    weight_mode: str
    sentences: bool
    dense: bool

    def meta(self, num_experts: int) -> dict:
        """As constexpr arguments of the kernels."""
        return dict(
            K=self.k,
            WEIGHT_MODE=self.weight_mode,
            DENSE=self.dense,
            E_BLOCK=max(SMALLEST_DOT, triton.next_power_of_2(num_experts)),
        )


@triton.jit
def kth(scores, available, column, k, DENSE: tl.constexpr):
    """[R] the available column with the highest score, the lowest of equal ones; dense: ``k``.

    If all available scores are NaN it is the lowest available column, so always an expert's id.
    """
    if DENSE:
        return tl.zeros((scores.shape[0],), tl.int32) + k
    NONE: tl.constexpr = 1 << 30
    top = tl.max(tl.where(available, scores, float("-inf")), 1)
    best = available & (scores == top[:, None])
    found = tl.min(tl.where(best, column, NONE), 1)
    return tl.where(found < NONE, found, tl.min(tl.where(available, column, NONE), 1))


@triton.jit
def expert_columns(scores, E):
    """The column of each entry of [R, E_BLOCK], and whether the column belongs to an expert."""
    column = tl.zeros(scores.shape, tl.int32) + tl.arange(0, scores.shape[1])[None, :]
    return column, column < E


@triton.jit
def chosen_by(scores, E, K: tl.constexpr, DENSE: tl.constexpr):
    """[R, E_BLOCK] whether each row chose the column's expert."""
    column, expert = expert_columns(scores, E)
    available = expert
    for k in range(K):
        available = available & (column != kth(scores, available, column, k, DENSE)[:, None])
    return expert & (available == 0)


@triton.jit
def softmax(scores, mask):
    """Softmax of each row over the columns in ``mask``, 0 elsewhere."""
    top = tl.max(tl.where(mask, scores, float("-inf")), 1)
    weight = tl.where(mask, tl.exp(scores - top[:, None]), 0.0)
    return weight / tl.sum(weight, 1)[:, None]


@triton.jit
def weights_of(scores, chosen, E, WEIGHT_MODE: tl.constexpr):
    """[R, E_BLOCK] the weight each expert has if it is chosen."""
    _, expert = expert_columns(scores, E)
    if WEIGHT_MODE == "renormalize":
        return softmax(scores, chosen)
    if WEIGHT_MODE == "probability":
        return softmax(scores, expert)
    return tl.zeros_like(scores) + 1.0  # straight_through, one


@triton.jit
def sentence_bounds(starts_ptr, T, B):
    """First and end token of this program's sentence, clamped to [0, T]."""
    sentence = tl.program_id(0)
    first = tl.minimum(tl.maximum(tl.load(starts_ptr + sentence), 0), T)
    end = tl.minimum(tl.maximum(tl.load(starts_ptr + sentence + 1), 0), T)
    return first, tl.where(sentence == B - 1, T, end)


@triton.jit
def real_tokens(mask_ptr, token, end, HAS_MASK: tl.constexpr):
    """Whether each token is before ``end`` and not padding."""
    real = token < end
    if HAS_MASK:
        real = real & (tl.load(mask_ptr + token, mask=token < end, other=0) != 0)
    return real


@triton.jit
def sentence_scores(
    logits_ptr, mask_ptr, first, end, E, HAS_MASK: tl.constexpr, E_BLOCK: tl.constexpr, ROWS
):
    """[1, E_BLOCK] mean logits of the sentence's real tokens, and the number of these tokens."""
    ACC: tl.constexpr = logits_ptr.dtype.element_ty
    column = tl.arange(0, E_BLOCK)
    total = tl.zeros((E_BLOCK,), ACC)
    count = tl.zeros((), tl.int64)
    for start in range(first, end, ROWS):
        token = start + tl.arange(0, ROWS)
        real = real_tokens(mask_ptr, token, end, HAS_MASK)
        logits = logits_ptr + token[:, None] * E + column[None, :]
        mask = real[:, None] & (column < E)[None, :]
        total += tl.sum(tl.load(logits, mask=mask, other=0), 0)
        count += tl.sum(real.to(tl.int64), 0)
    return (total / tl.maximum(count, 1).to(ACC))[None, :], count
