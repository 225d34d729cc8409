"""sigmoid_loss against loops over the pairs, and against transformers' SigLIP."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from loss_checks import F64, assert_close, assert_same, property_test, randn
from transformers import SiglipConfig, SiglipModel

from moe_fast.losses.functional import row_blocks, sigmoid_loss


def oracle(a, b, negatives, scale, bias, positive=None, masked=lambda i, j: False) -> torch.Tensor:
    """``positive(i, j)`` and ``masked(i, j)``: j counts the positives, then the hard negatives."""
    positive = positive or (lambda i, j: i == j)
    unit = lambda x: x / (x @ x).sqrt()  # noqa: E731
    candidates = [*b, *([] if negatives is None else negatives)]
    total = 0
    for i, anchor in enumerate(a):
        for j, candidate in enumerate(candidates):
            if masked(i, j) and not positive(i, j):
                continue
            logit = scale * (unit(anchor) @ unit(candidate)) + bias
            p = torch.sigmoid(logit)
            total = total - torch.log(p if positive(i, j) else 1 - p)
    return total / len(a)


@property_test
@given(
    rows=st.integers(1, 5),
    per_row=st.sampled_from([0, 1, 3]),
    dim=st.sampled_from([2, 5]),
    seed=st.integers(0, 999),
)
def test_is_the_definition(rows, per_row, dim, seed):
    a, b = randn(rows, dim, seed=seed), randn(rows, dim, seed=seed + 1000)
    negatives = randn(rows * per_row, dim, seed=seed + 2000) if per_row else None
    scale = torch.tensor(3.0, dtype=F64, requires_grad=True)
    bias = torch.tensor(-2.0, dtype=F64, requires_grad=True)
    leaves = [a, b, scale, bias] + ([] if negatives is None else [negatives])
    assert_same(
        lambda: sigmoid_loss(a, b, negatives, scale=scale, bias=bias),
        lambda: oracle(a, b, negatives, scale, bias),
        *leaves,
    )


def test_masks_and_groups():
    """Rows 0 and 2 are one group; row 1's positive is row 3's text; two domains."""
    a, b, negatives = randn(4, 5), randn(4, 5, seed=1), randn(4, 5, seed=2)
    domains = torch.tensor([0, 0, 0, 1])
    groups = torch.tensor([7, 8, 7, 9])
    row_ids, col_ids = torch.arange(4), torch.tensor([10, 11, 12, 11, 20, 21, 22, 10])

    def masked(i: int, j: int) -> bool:
        row = j % 4
        same_text = (i, j) in {(1, 3), (3, 1), (0, 7)}
        return same_text or domains[i] != domains[row]

    assert_same(
        lambda: sigmoid_loss(
            a,
            b,
            negatives,
            scale=4.0,
            bias=-1.0,
            row_ids=row_ids,
            col_ids=col_ids,
            domain_ids=domains,
            group_ids=groups,
        ),
        lambda: oracle(
            a,
            b,
            negatives,
            4.0,
            -1.0,
            lambda i, j: i == j or (j < 4 and bool(groups[i] == groups[j])),
            masked,
        ),
        a,
        b,
        negatives,
    )


def test_is_transformers_siglip():
    torch.manual_seed(0)
    sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    text = sizes | dict(vocab_size=20, max_position_embeddings=6, projection_size=8)
    vision = sizes | dict(image_size=4, patch_size=2)
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).double().eval()
    output = model(
        input_ids=torch.randint(0, 20, (5, 6)),
        pixel_values=torch.randn(5, 3, 4, 4, dtype=F64),
        return_loss=True,
    )
    ours = sigmoid_loss(
        output.text_embeds,
        output.image_embeds,
        scale=model.logit_scale.exp(),
        bias=model.logit_bias,
    )
    assert_close(ours, output.loss, 1e-12)


def test_dot_products_are_not_normalised():
    a, b = randn(3, 4), randn(3, 4, seed=1)
    logits = 2.0 * (a @ b.t()) - 1.0
    signs = 2 * torch.eye(3, dtype=F64) - 1
    expected = -F.logsigmoid(signs * logits).sum() / 3
    assert_close(sigmoid_loss(a, b, scale=2.0, bias=-1.0, similarity="dot"), expected)


def test_a_solved_batch_has_a_loss_near_zero_and_no_nan():
    a = torch.eye(4, dtype=torch.float32).requires_grad_()
    loss, metrics = sigmoid_loss(a, a.detach(), scale=100.0, bias=-50.0, return_metrics=True)
    loss.backward()
    assert 0 < loss.item() < 1e-20
    assert a.grad.isfinite().all()
    assert metrics["in_batch_accuracy"].item() == 1.0


def test_low_precision_inputs_have_float32_logits_under_autocast_too():
    a, b = randn(6, 8, dtype=torch.bfloat16), randn(6, 8, seed=1, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = sigmoid_loss(a, b, scale=10.0, bias=-10.0)
    assert loss.dtype == torch.float32
    assert_close(loss, oracle(a.double(), b.double(), None, 10.0, -10.0), 1e-6)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"scale": -1.0}, "scale must be greater than 0"),
        ({"scale": torch.tensor(-1.0)}, "scale must be greater than 0"),
        ({"bias": float("nan")}, "bias must be finite; got nan"),
        ({"bias": torch.tensor(torch.inf)}, "bias must be finite; got inf"),
        ({"bias": torch.zeros(2)}, r"bias must have one element; got shape \[2\]"),
        ({"similarity": "l2"}, "similarity must be one of"),
        ({"row_ids": torch.arange(2)}, "row_ids and col_ids go together"),
        ({"negatives": randn(3, 3)}, "negatives must hold G rows"),
        (
            {"negatives": torch.full((4, 3), torch.inf, dtype=F64)},
            "negatives must be finite; row 0",
        ),
    ],
)
def test_bad_input_is_named(kwargs, message):
    settings = {"scale": 1.0, "bias": 0.0} | kwargs
    with pytest.raises(ValueError, match=message):
        sigmoid_loss(randn(2, 3), randn(2, 3), **settings)


def test_blocks_of_rows_are_one_matrix(monkeypatch):
    """Value, gradients and accuracy, masks and groups included; blocks of 2, 2 and 1 rows."""
    a, b, negatives = randn(5, 4), randn(5, 4, seed=1), randn(10, 4, seed=2)
    scale = torch.tensor(3.0, dtype=F64, requires_grad=True)
    ids = dict(
        row_ids=torch.tensor([1, 2, 1, 4, 5]),
        col_ids=torch.tensor([2, 11, 12, 11, 14, *range(20, 30)]),
        domain_ids=torch.tensor([0, 0, 1, 1, 0]),
        group_ids=torch.tensor([0, 1, 2, 1, 3]),
    )

    def both() -> tuple:
        loss, metrics = sigmoid_loss(
            a, b, negatives, scale=scale, bias=-1.0, return_metrics=True, **ids
        )
        return loss, *torch.autograd.grad(loss, [a, b, negatives, scale]), *metrics.values()

    whole = both()
    monkeypatch.setattr(row_blocks, "BLOCK_LOGITS", 2 * 15 + 3)
    for one, other in zip(both(), whole, strict=True):
        assert_close(one, other, 1e-12)
    assert len(row_blocks.row_blocks(5, 15)) == 3
