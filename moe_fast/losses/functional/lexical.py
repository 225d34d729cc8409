"""lexical_scores: the sparse score of every query against every document.

With the weights w_t >= 0 of a text's tokens, a vocabulary id i has the largest weight of the tokens
that have it, w[i], and

    score(q, p) = sum over the ids i that both texts have of w_q[i] w_p[i]

Only ids that occur on both sides are computed. The entries are sorted by vocabulary id; a group of
neighbouring ids is one dense product [Q, ids] x [ids, P], in the forward pass and twice in the
backward pass. So memory is that of one group and of the scores, whatever the size of the
vocabulary, and there is no [B, L, V] tensor.

Source: Chen et al., arXiv 2402.03216, section 3.2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_fast.ops.checks import compute_dtype

_GROUP_ENTRIES = 2**22  # of the two dense matrices of a group together


@dataclass(frozen=True)
class LexicalEntries:
    """The positive weights of N texts, one entry per text and vocabulary id.

    Attributes:
        texts: [U] int64.
        ids: [U] int64.
        weights: [U] float, > 0.
        num_texts: N.
    """

    texts: Tensor
    ids: Tensor
    weights: Tensor
    num_texts: int


def lexical_entries(logits: Tensor, ids: Tensor, starts: Tensor) -> LexicalEntries:
    """Take the positive part of the tokens' logits, and its maximum per text and id.

    Args:
        logits: [T]; the entries' weights carry its gradient, which goes to one of equal maxima.
        ids: [T] int64, vocabulary ids.
        starts: [N + 1] int64, where each text's tokens begin.
    """
    num_texts = len(starts) - 1
    texts = torch.arange(num_texts, device=starts.device)
    texts = texts.repeat_interleave(starts.diff(), output_size=len(ids))
    order = logits.detach().argsort(descending=True, stable=True)
    stride = int(ids.max()) + 1 if len(ids) else 1
    keys = (texts * stride + ids)[order]
    keys, by_key = keys.sort(stable=True)  # the largest logit of each key comes first
    first = torch.ones_like(keys, dtype=torch.bool)
    first[1:] = keys[1:] != keys[:-1]
    chosen = order[by_key][first]
    chosen = chosen[logits.detach()[chosen] > 0]  # others have neither a score nor a gradient
    weights = logits[chosen].to(compute_dtype(logits.dtype))
    return LexicalEntries(texts[chosen], ids[chosen], weights, num_texts)


def lexical_scores(queries: LexicalEntries, documents: LexicalEntries) -> Tensor:
    """Compute the scores [Q, P]; gradients reach the weights of both sides."""
    return _LexicalScores.apply(queries.weights, documents.weights, _Groups(queries, documents))


def score_gradients(
    grad: Tensor, queries: LexicalEntries, documents: LexicalEntries
) -> tuple[Tensor, Tensor]:
    """Return the gradients of both sides' weights, given that of the scores [Q, P]."""
    return _Groups(queries, documents).gradients(grad, queries.weights, documents.weights)


class _LexicalScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, groups: _Groups) -> Tensor:
        ctx.save_for_backward(left, right)
        ctx.groups = groups
        return groups.scores(left, right)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return *ctx.groups.gradients(grad, *ctx.saved_tensors), None


class _Groups:
    """The entries of both sides that share ids, sorted by id and cut into groups of ids."""

    def __init__(self, queries: LexicalEntries, documents: LexicalEntries) -> None:
        self.shape = queries.num_texts, documents.num_texts
        sides = (queries, documents)
        known = torch.cat([side.ids.unique() for side in sides])
        shared, counts = known.unique(return_counts=True)
        shared = shared[counts == 2]
        self.size = max(1, _GROUP_ENTRIES // max(sum(self.shape), 1))
        self.num_ids = len(shared)
        self.sides = [self._sorted(side, shared) for side in sides]

    def _sorted(self, side: LexicalEntries, shared: Tensor) -> tuple[Tensor, Tensor, Tensor, list]:
        """Return (entries, their texts, their ids' places in ``shared``, where groups begin)."""
        if not len(shared):
            return side.ids[:0], side.ids[:0], side.ids[:0], [0]
        place = torch.searchsorted(shared, side.ids).clamp(max=len(shared) - 1)
        entries = (shared[place] == side.ids).nonzero()[:, 0]
        entries = entries[place[entries].argsort(stable=True)]
        place = place[entries]
        bounds = torch.arange(0, len(shared) + self.size, self.size, device=place.device)
        return entries, side.texts[entries], place, torch.searchsorted(place, bounds).tolist()

    def _blocks(self, *weights: Tensor) -> Iterator[list[tuple[Tensor, Tensor, Tensor, Tensor]]]:
        """Yield, for each group, of both sides (entries, texts, columns, dense [N, ids])."""
        for group, low in enumerate(range(0, self.num_ids, self.size)):
            width = min(self.size, self.num_ids - low)
            both = []
            for side, values, count in zip(self.sides, weights, self.shape, strict=True):
                here = slice(side[3][group], side[3][group + 1])
                entries, texts, columns = side[0][here], side[1][here], side[2][here] - low
                block = values.new_zeros(count, width)
                block[texts, columns] = values[entries]
                both.append((entries, texts, columns, block))
            yield both

    def scores(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the scores [Q, P]."""
        total = left.new_zeros(self.shape)
        with torch.autocast(left.device.type, enabled=False):
            for (*_, x), (*_, y) in self._blocks(left, right):
                total.addmm_(x, y.t())
        return total

    def gradients(self, grad: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of both sides' weights."""
        grads = torch.zeros_like(left), torch.zeros_like(right)
        with torch.autocast(left.device.type, enabled=False):
            for first, second in self._blocks(left, right):
                pairs = ((first, grad @ second[3]), (second, grad.t() @ first[3]))
                for out, (side, product) in zip(grads, pairs, strict=True):
                    entries, texts, columns, _ = side
                    out[entries] = product[texts, columns]
        return grads
