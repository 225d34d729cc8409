"""load_balance, z_loss, expert_supervision: loops over tokens, padding simply not visited."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loss_checks import F64, assert_close, assert_same, property_test, randn
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from moe_fast.losses.functional import (
    domain_expert_joint,
    expert_supervision,
    load_balance,
    z_loss,
)


def softmax(logits) -> torch.Tensor:
    return (logits - logits.max()).exp() / (logits - logits.max()).exp().sum()


def problem(layers: int, tokens: int, experts: int, k: int, seed: int):
    """Logits [layers, T, E], routed ids [layers, T, K] with E for padding, the mask [T]."""
    logits = randn(layers, tokens, experts, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(tokens, generator=generator) < 0.7
    mask[0] = True
    index = logits.detach().topk(k, -1).indices
    return logits, torch.where(mask[:, None], index, experts), mask


def balance_oracle(logits, index) -> torch.Tensor:
    total = 0
    for layer, ids in zip(logits, index.tolist(), strict=True):
        experts = layer.shape[1]
        slots = [e for row in ids for e in row if e < experts]
        real = [t for t, row in enumerate(ids) if row[0] < experts]
        for e in range(experts):
            f = slots.count(e) / len(slots)
            p = sum(softmax(layer[t])[e] for t in real) / len(real)
            total = total + experts * f * p
    return total


def z_oracle(logits, mask) -> torch.Tensor:
    real = mask.nonzero().flatten().tolist()
    squares = [layer[t].exp().sum().log() ** 2 for layer in logits for t in real]
    return sum(squares) / len(real)


def supervision_oracle(logits, sentences, experts, mask) -> torch.Tensor:
    losses = []
    for sentence, expert in enumerate(experts.tolist()):
        tokens = [t for t, s in enumerate(sentences.tolist()) if s == sentence and mask[t]]
        if tokens:
            values = [layer[t] for layer in logits for t in tokens]
            mean = sum(values) / len(values)
            losses.append(-softmax(mean)[expert].log())
    return sum(losses) / len(losses)


SHAPES = dict(
    layers=st.integers(1, 3),
    tokens=st.integers(1, 9),
    experts=st.sampled_from([1, 2, 5]),
    k=st.integers(1, 2),
    seed=st.integers(0, 999),
)


@property_test
@given(**SHAPES)
def test_load_balance_is_the_definition(layers, tokens, experts, k, seed):
    logits, index, _ = problem(layers, tokens, max(experts, 2), k, seed)
    assert_close(load_balance(logits, index), balance_oracle(logits, index))
    # Not assert_same: the gradient is 0 where the experts share the slots evenly.
    ours, theirs = (
        torch.autograd.grad(f(logits, index), logits)[0] for f in (load_balance, balance_oracle)
    )
    assert_close(ours, theirs)


@property_test
@given(**SHAPES)
def test_z_loss_is_the_definition(layers, tokens, experts, k, seed):
    logits, _, mask = problem(layers, tokens, experts, 1, seed)
    assert_same(lambda: z_loss(logits, mask), lambda: z_oracle(logits, mask), logits)


@property_test
@given(**SHAPES)
def test_expert_supervision_is_the_definition(layers, tokens, experts, k, seed):
    logits, _, mask = problem(layers, tokens, max(experts, 2), 1, seed)
    generator = torch.Generator().manual_seed(seed)
    sentences = torch.randint(0, 4, (tokens,), generator=generator)
    targets = torch.randint(0, max(experts, 2), (4,), generator=generator)
    assert_same(
        lambda: expert_supervision(logits, sentences, targets, mask),
        lambda: supervision_oracle(logits, sentences, targets, mask),
        logits,
    )


def test_one_layer_may_come_without_its_dimension():
    logits, index, mask = problem(1, 6, 3, 2, 0)
    sentences, targets = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([2, 0, 1])
    assert torch.equal(load_balance(logits[0], index[0]), load_balance(logits, index))
    assert torch.equal(z_loss(logits[0], mask), z_loss(logits, mask))
    assert torch.equal(
        expert_supervision(logits[0], sentences, targets, mask),
        expert_supervision(logits, sentences, targets, mask),
    )
    assert torch.equal(z_loss(logits), z_loss(logits, torch.ones(6, dtype=torch.bool)))


@pytest.mark.parametrize("k", [1, 2])
def test_load_balance_is_transformers_over_k(k):
    """Theirs lets f sum to K over the experts; ours is the share of slots."""
    torch.manual_seed(0)
    logits = torch.randn(2 * 5, 4)
    attention_mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    index = logits.topk(k, -1).indices
    index = torch.where(attention_mask.reshape(-1, 1).bool(), index, 4)
    theirs = load_balancing_loss_func((logits,), 4, k, attention_mask)
    assert_close(k * load_balance(logits, index), theirs, 1e-6)


def test_load_balance_runs_from_one_to_the_number_of_experts():
    tokens, experts = 12, 4
    index = (torch.arange(tokens) % experts)[:, None]
    even = torch.nn.functional.one_hot(index[:, 0], experts).double() * 50
    assert load_balance(even, index).item() == pytest.approx(1.0)
    collapsed = torch.zeros(tokens, experts, dtype=F64)
    collapsed[:, 2] = 50
    assert load_balance(collapsed, torch.full((tokens, 1), 2)).item() == pytest.approx(4.0)


def test_sums_over_processes_are_the_global_batchs():
    """Each process's sums, added up, are those of one process with all tokens."""
    logits, index, mask = problem(2, 10, 3, 2, 1)
    sentences, targets = torch.arange(10) // 2, torch.tensor([0, 2, 1, 1, 0])
    halves = [slice(0, 4), slice(4, 10)]
    calls = {
        "balance": lambda s, **kw: load_balance(logits[:, s], index[:, s], **kw),
        "z": lambda s, **kw: z_loss(logits[:, s], mask[s], **kw),
        "supervision": lambda s, **kw: expert_supervision(
            logits[:, s], sentences[s], targets, mask[s], **kw
        ),
    }
    for name, call in calls.items():
        sums: list[torch.Tensor] = []
        call(halves[1], reduce=lambda t, sums=sums: sums.append(t) or t)
        total = call(halves[0], reduce=lambda t, sums=sums: t + sums[0])
        assert_close(total, call(slice(None)))
        mean_of_both = (call(halves[0]) + call(halves[1])) / 2
        assert (total - mean_of_both).abs() > 1e-4, name


def test_nothing_but_padding_has_no_loss():
    logits, mask = randn(2, 3, 4), torch.zeros(3, dtype=torch.bool)
    index = torch.full((2, 3, 1), 4)
    sentences, targets = torch.zeros(3, dtype=torch.int64), torch.tensor([1])
    for loss in (
        load_balance(logits, index),
        z_loss(logits, mask),
        expert_supervision(logits, sentences, targets, mask),
    ):
        assert loss.item() == 0.0
        assert torch.autograd.grad(loss, logits)[0].abs().max() == 0.0


def test_what_stands_in_padding_reaches_neither_value_nor_gradient():
    """Not even NaN, which a factor of 0 would let through."""
    logits, index, mask = problem(2, 8, 3, 2, 3)
    sentences, targets = torch.arange(8) // 2, torch.tensor([0, 2, 1, 1])
    assert 0 < mask.sum() < 8

    def losses(x):
        return {
            "balance": load_balance(x, index),
            "z": z_loss(x, mask),
            "supervision": expert_supervision(x, sentences, targets, mask),
            "joint": domain_expert_joint(x, sentences, 4, mask).square().sum(),
        }

    dirty = torch.where(mask[:, None], logits.detach(), torch.nan).requires_grad_()
    for name, expected in losses(logits).items():
        loss = losses(dirty)[name]
        assert_close(loss, expected)
        ours, theirs = torch.autograd.grad(loss, dirty)[0], torch.autograd.grad(expected, logits)[0]
        assert_close(ours, theirs)


def test_large_logits_do_not_overflow():
    logits = torch.tensor([[1000.0, -1000.0]], requires_grad=True)
    loss = z_loss(logits) + load_balance(logits, torch.tensor([[0]]))
    loss.backward()
    assert loss.item() == pytest.approx(1e6 + 2)
    assert logits.grad.isfinite().all()


def test_low_precision_logits_are_computed_in_float32():
    logits, index, mask = problem(1, 6, 3, 1, 0)
    low = logits.detach().bfloat16()
    assert load_balance(low, index).dtype == torch.float32
    assert_close(load_balance(low, index), balance_oracle(low.double(), index), 1e-6)
    assert_close(z_loss(low, mask), z_oracle(low.double(), mask), 1e-6)


def test_uniform_supervision_is_log_e():
    loss = expert_supervision(torch.zeros(4, 5), torch.arange(4), torch.tensor([0, 1, 2, 3]))
    assert loss.item() == pytest.approx(math.log(5))


LOGITS = torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: z_loss(torch.zeros(3)), ValueError, r"router_logits must be \[T, E\]"),
        (lambda: z_loss(LOGITS.long()), TypeError, "router_logits must be floating-point"),
        (lambda: z_loss(LOGITS, torch.ones(2).bool()), ValueError, "token_mask must have shape"),
        (lambda: z_loss(LOGITS, torch.ones(3)), TypeError, "token_mask must have dtype bool"),
        (
            lambda: load_balance(LOGITS, torch.zeros(2, 1).long()),
            ValueError,
            "top_k_index must have shape",
        ),
        (lambda: load_balance(LOGITS, torch.zeros(3, 1)), TypeError, "top_k_index must have dtype"),
        (
            lambda: expert_supervision(LOGITS, torch.arange(2), torch.arange(3)),
            ValueError,
            "sentence_ids must have shape",
        ),
        (
            lambda: expert_supervision(LOGITS, torch.arange(3), torch.ones(3)),
            TypeError,
            "expert_ids must have dtype",
        ),
        (
            lambda: expert_supervision(LOGITS, torch.arange(3), torch.tensor([0, -100, 1])),
            ValueError,
            r"expert_ids must lie in \[0, E\) = \[0, 4\); got -100",
        ),
        (
            lambda: expert_supervision(LOGITS, torch.arange(3), torch.tensor([0, 4, 1])),
            ValueError,
            "got 4",
        ),
        (
            lambda: expert_supervision(LOGITS, torch.arange(3), torch.tensor([0, 1])),
            ValueError,
            r"sentence_ids must lie in \[0, B\) = \[0, 2\); got 2",
        ),
        (
            lambda: load_balance(LOGITS, torch.tensor([[0], [-1], [1]])),
            ValueError,
            "top_k_index must be at least 0; got -1",
        ),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
