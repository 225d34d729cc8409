"""The tiled and the compiled form at sizes of a batch, in float32, against a dense one in float64.

``test_info_nce.py`` runs everything on tiny tiles; here are real tiles, ragged ones among them,
and the accuracy: relative L2 error of the loss and of every gradient.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_fast import ops
from moe_fast.ops.backends import available_backends
from moe_fast.ops.info_nce import tiles as logit_tiles

from .helpers import gradients, leaves

# Where losses are small they are exponentials of differences of logits, and so are the gradients:
# a logit's own rounding in float32, scale * 6e-8 and a few more for the product's, becomes a
# relative error. Measured largest: 0.4e-6 * scale. A term left out is an error of order 1, a tile's
# tail left out one of more than 1e-2.
ROUNDING = 1e-6  # of a logit, per scale
ONE = torch.ones(())


@pytest.fixture(params=["tiled", "cpp"])
def backend(request):
    if request.param not in available_backends("info_nce"):
        pytest.skip("the native library is not built")
    return request.param


def dense(
    a, b, negatives, scale, symmetric=True, similarity="cosine", excluded=None, positive=None
) -> Tensor:
    """The loss by its definition, on a matrix, in float64; masks are [B, N] bool."""
    batch = len(a)
    q, k = a.double(), torch.cat([b, *([] if negatives is None else [negatives])]).double()
    if similarity == "cosine":
        q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
    s = scale.double() * q @ k.T
    own = torch.eye(batch, len(k), dtype=torch.bool)
    positive = own if positive is None else positive
    if excluded is not None:
        s = s.masked_fill(excluded & ~positive, -torch.inf)
    loss = _rows(s, positive)
    return (loss + _rows(s[:, :batch].T, positive[:, :batch].T)) / 2 if symmetric else loss


def _rows(s: Tensor, positive: Tensor) -> Tensor:
    """Mean over rows of log sum_j exp(s_j - m), m the positives' mean; log1p: exact near zero."""
    mean = torch.where(positive, s, 0).sum(1, keepdim=True) / positive.sum(1, keepdim=True)
    weight = (s - mean).exp()
    negatives = torch.where(positive, 0, weight).sum(1)
    if (positive.sum(1) > 1).any():
        negatives = negatives + torch.where(positive, weight, 0).sum(1) - 1
    return torch.log1p(negatives).mean()


def l2_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def assert_accurate(loss: Tensor, expected: Tensor, inputs: dict) -> None:
    tolerance = ROUNDING * max(5.0, inputs["scale"].item())
    assert l2_error(loss, expected) <= tolerance
    actual, wanted = (gradients([o], [ONE], inputs) for o in (loss, expected))
    errors = {name: l2_error(actual[name], wanted[name]) for name in wanted}
    assert max(errors.values()) <= tolerance, errors


def problem(batch: int, dim: int, per_row: int, scale: float) -> dict:
    """Pairs that belong together somewhat, as in training."""
    a = torch.randn(batch, dim)
    b = a + torch.randn(batch, dim)
    negatives = torch.randn(batch * per_row, dim) if per_row else None
    return leaves(a=a, b=b, negatives=negatives, scale=torch.tensor(scale))


@pytest.mark.parametrize("scale", [1.0, 20.0, 100.0])
@pytest.mark.parametrize(("batch", "dim"), [(2, 3), (63, 384), (64, 1), (300, 65), (1000, 128)])
@pytest.mark.parametrize("per_row", [0, 2])
@pytest.mark.parametrize("symmetric", [True, False])
def test_sizes_and_scales(batch, dim, per_row, scale, symmetric, backend, monkeypatch):
    monkeypatch.setitem(logit_tiles.TILE_ROWS, "cpu", 128)
    inputs = problem(batch, dim, per_row, scale)
    loss = ops.info_nce(**inputs, symmetric=symmetric, backend=backend)
    expected = dense(**inputs, symmetric=symmetric)
    if dim == 1:  # cosines are 1 or -1: gradients are 0, up to rounding
        assert l2_error(loss, expected) <= ROUNDING * max(5.0, scale)
    else:
        assert_accurate(loss, expected, inputs)


def test_the_real_tile_and_a_ragged_one(backend):
    inputs = problem(1030, 32, 1, 20.0)
    assert_accurate(ops.info_nce(**inputs, backend=backend), dense(**inputs), inputs)


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_masks_and_groups_across_tiles(similarity, backend, monkeypatch):
    monkeypatch.setitem(logit_tiles.TILE_ROWS, "cpu", 64)
    batch = 200
    inputs = problem(batch, 16, 1, 20.0 if similarity == "cosine" else 0.5)
    row_ids, col_ids = torch.randint(0, 150, (batch,)), torch.randint(100, 300, (2 * batch,))
    domain_ids, group_ids = torch.randint(0, 3, (batch,)), torch.randint(0, 120, (batch,))
    texts = (row_ids[:, None], col_ids[:batch, None])
    excluded = (texts[0] == col_ids) | (texts[1] == col_ids)
    excluded[:, :batch] |= (texts[0] == row_ids) | (texts[1] == row_ids)
    excluded |= domain_ids[:, None] != domain_ids.repeat(2)
    positive = torch.zeros(batch, 2 * batch, dtype=torch.bool)
    positive[:, :batch] = group_ids[:, None] == group_ids
    ids = dict(row_ids=row_ids, col_ids=col_ids, domain_ids=domain_ids)
    for groups, own in [(None, None), (group_ids, positive)]:
        loss = ops.info_nce(
            **inputs, **ids, group_ids=groups, similarity=similarity, backend=backend
        )
        expected = dense(**inputs, similarity=similarity, excluded=excluded, positive=own)
        assert_accurate(loss, expected, inputs)


@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("scale", [20.0, 60.0])
def test_losses_near_zero_keep_their_relative_accuracy(scale, groups, backend):
    """Pairs told apart so well that lse - s_ii in float32 would be 0, or rounding alone."""
    a = torch.randn(100, 256)
    inputs = leaves(a=a, b=a + 0.01 * torch.randn(100, 256), scale=torch.tensor(scale))
    group_ids = torch.arange(100) if groups else None
    loss = ops.info_nce(**inputs, group_ids=group_ids, backend=backend)
    expected = dense(**inputs, negatives=None)
    assert 0 < expected < 1e-5
    assert_accurate(loss, expected, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_lose_no_more_than_their_own_rounding(dtype, backend):
    full = problem(300, 64, 1, 20.0)
    inputs = leaves(**{n: t if n == "scale" else t.detach().to(dtype) for n, t in full.items()})
    loss = ops.info_nce(**inputs, backend=backend)
    assert loss.dtype == torch.float32
    expected = dense(**inputs)
    assert l2_error(loss, expected) <= 20 * ROUNDING
    actual, wanted = (gradients([o], [ONE], inputs) for o in (loss, expected))
    for name, gradient in wanted.items():
        assert actual[name].dtype == inputs[name].dtype
        # Both are rounded to the inputs' dtype once; a float16 gradient may be subnormal.
        bound = max(20 * ROUNDING, 2 * torch.finfo(inputs[name].dtype).eps)
        assert l2_error(actual[name], gradient) <= 8 * bound, name


def test_memory_does_not_grow_with_the_square_of_the_batch(monkeypatch):
    """No tensor that the op makes is larger than a tile, or than its inputs."""
    from torch.utils._python_dispatch import TorchDispatchMode

    monkeypatch.setitem(logit_tiles.TILE_ROWS, "cpu", 64)
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in torch.utils._pytree.tree_leaves(out):
                if isinstance(t, Tensor):
                    largest = max(largest, t.numel())
            return out

    inputs = problem(1000, 8, 1, 20.0)
    ids = dict(row_ids=torch.arange(1000) % 900, col_ids=torch.arange(2000))
    args = (*inputs.values(), ids["row_ids"], ids["col_ids"], None, None, None, 0.1, True, True)
    from moe_fast.ops.info_nce import tiled as info_nce_tiled

    with Largest(), torch.no_grad():  # inside the op, where modes do not look
        sums = info_nce_tiled._info_nce_tiled(*args)[3:]
        info_nce_tiled._info_nce_tiled_backward(ONE, *args[:9], *sums, *args[9:])
    assert 0 < largest <= 2 * 1000 * 8  # negatives, and the gradient of them
