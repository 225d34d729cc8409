"""info_nce: the contrastive loss of B pairs, with masks, groups, weights and hard negatives.

Every test runs on the dense reference and on the tiled form, its tiles so small that these few
rows fill several, the last ones ragged; with ``MOE_FAST_BACKEND=triton`` on that alone.
"""

from __future__ import annotations

import math
import os

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import moe_fast
from moe_fast import ops
from moe_fast.ops.info_nce import tiles as logit_tiles

from . import oracle
from .helpers import (
    DTYPES,
    assert_close,
    assert_gradients_close,
    gradients,
    leaves,
    opcheck_calls,
    property_test,
)

F64 = torch.float64
B, G, D = 6, 2, 5
ONE = torch.ones((), dtype=F64)
OP_NAMES = {"torch": "info_nce", "tiled": "info_nce_tiled", "triton": "info_nce"}
ONLY_TRITON = os.environ.get("MOE_FAST_BACKEND") == "triton"
BACKENDS = ["triton"] if ONLY_TRITON else ["torch", "tiled", "cpp"]


@pytest.fixture(autouse=True, params=BACKENDS[:2])  # cpp leaves float64 to them
def backend(request, monkeypatch):
    monkeypatch.setitem(logit_tiles.TILE_ROWS, "cpu", 4)
    with moe_fast.use_backend(request.param):
        yield request.param


def problem(*, num_rows=B, per_row=G, dtype=F64, scale=5.0) -> dict:
    """a, b, hard negatives and a learned scale."""
    negatives = torch.randn(num_rows * per_row, D) if per_row else None
    tensors = dict(a=torch.randn(num_rows, D), b=torch.randn(num_rows, D), negatives=negatives)
    tensors = {n: None if t is None else t.to(dtype) for n, t in tensors.items()}
    return leaves(**tensors, scale=torch.tensor(scale, dtype=F64 if dtype == F64 else None))


def ids(size: int, kinds: int = 4) -> torch.Tensor:
    """Hashes, some of them equal; large and negative like real ones."""
    return torch.randint(0, kinds, (size,)) * 2305843009213693951 - 4611686018427387904


# What may be combined with what; each masks, moves or weighs something.
OPTIONS = {
    "nothing": lambda n, m: {},
    "equal anchors": lambda n, m: dict(row_ids=ids(n), col_ids=torch.arange(m)),
    "equal candidates": lambda n, m: dict(row_ids=torch.arange(n) + 99, col_ids=ids(m, 6)),
    "row_ids, col_ids": lambda n, m: dict(row_ids=ids(n), col_ids=ids(m, 6)),
    "domain_ids": lambda n, m: dict(domain_ids=torch.randint(0, 2, (n,))),
    "group_ids": lambda n, m: dict(group_ids=torch.randint(0, 3, (n,))),
    "weights": lambda n, m: dict(weights=torch.rand(n, dtype=F64)),
    "label_smoothing": lambda n, m: dict(label_smoothing=0.3),
    "everything": lambda n, m: dict(
        row_ids=ids(n, 9),
        col_ids=ids(m, 12),
        domain_ids=torch.randint(0, 2, (n,)),
        group_ids=torch.randint(0, 4, (n,)),
        weights=torch.rand(n, dtype=F64),
        label_smoothing=0.2,
    ),
}


def assert_same(inputs: dict, tolerance=1e-10, **kwargs) -> None:
    """The loss, every gradient and the statistics."""
    loss, stats = ops.info_nce(**inputs, **kwargs, return_stats=True)
    expected = oracle.info_nce(**inputs, **kwargs)
    assert loss.shape == ()
    assert_close(loss, expected.loss, tolerance, "loss")
    assert_gradients_close(
        gradients([loss], [ONE], inputs), gradients([expected.loss], [ONE], inputs), tolerance
    )
    assert not stats.row_loss.requires_grad
    assert_close(stats.row_loss, expected.row_loss, tolerance, "row_loss")
    assert stats.rank.dtype == torch.int64
    assert torch.equal(stats.rank, expected.rank)
    assert math.isclose(float(stats.accuracy), expected.accuracy, rel_tol=1e-6)
    assert torch.equal(ops.info_nce(**inputs, **kwargs), loss)


# --------------------------------------------------------------------- agreement with the oracle


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("per_row", [0, 1, G])
@pytest.mark.parametrize("options", OPTIONS)
def test_values_and_gradients_equal_the_oracle(options, per_row, symmetric, similarity):
    kwargs = OPTIONS[options](B, B + B * per_row)
    inputs = problem(per_row=per_row, scale=5.0 if similarity == "cosine" else 0.7)
    assert_same(inputs, symmetric=symmetric, similarity=similarity, **kwargs)


@property_test
@given(
    num_rows=st.sampled_from([1, 2, 3, 5]),
    per_row=st.sampled_from([0, 1, 3]),
    symmetric=st.booleans(),
    options=st.sampled_from(list(OPTIONS)),
    scale=st.sampled_from([0.05, 1.0, 100.0]),
    seed=st.integers(0, 999),
)
def test_any_shape(num_rows, per_row, symmetric, options, scale, seed):
    assume(num_rows > 1 or per_row)
    torch.manual_seed(seed)
    kwargs = OPTIONS[options](num_rows, num_rows + num_rows * per_row)
    inputs = problem(num_rows=num_rows, per_row=per_row, scale=scale)
    loss = ops.info_nce(**inputs, symmetric=symmetric, **kwargs)
    expected = oracle.info_nce(**inputs, symmetric=symmetric, **kwargs).loss
    # Where a mask leaves the positive alone the loss is 0 up to rounding, and so are its gradients:
    # compare what is not.
    if expected.abs() < 1e-9:
        assert loss.abs() < 1e-9
    else:
        assert_close(loss, expected, 1e-9)
        actual, wanted = (gradients([o], [ONE], inputs) for o in (loss, expected))
        for name, gradient in wanted.items():
            assert (actual[name] - gradient).abs().max() < 1e-9 * max(1, gradient.abs().max())


def test_the_formula_in_torch():
    """Cross entropy of the scaled similarity matrix against the diagonal, both ways."""
    inputs = problem(per_row=0)
    a, b = (torch.nn.functional.normalize(inputs[n], dim=-1) for n in ("a", "b"))
    s = inputs["scale"] * a @ b.T
    one_way = torch.nn.functional.cross_entropy(s, torch.arange(B))
    other_way = torch.nn.functional.cross_entropy(s.T, torch.arange(B))
    assert_close(ops.info_nce(**inputs, symmetric=False), one_way)
    assert_close(ops.info_nce(**inputs), (one_way + other_way) / 2)


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_arithmetic_is_float32_in_lower_precision(dtype, similarity):
    """bf16 logits would cost a factor of 4 to 6 in the gradient: products are float32."""
    inputs = problem(dtype=dtype, scale=20.0 if similarity == "cosine" else 1.0)
    loss = ops.info_nce(**inputs, similarity=similarity)
    expected = oracle.info_nce(**inputs, similarity=similarity).loss
    assert loss.dtype == torch.float32
    assert_close(loss, expected, 1e-5)
    actual, wanted = (gradients([o], [ONE], inputs) for o in (loss, expected))
    assert all(actual[n].dtype == inputs[n].dtype for n in inputs)
    # What is left is the rounding of the gradients themselves to the inputs' dtype; triton rounds
    # those of the logits too.
    assert_gradients_close(actual, wanted, max(2e-5, 2 * torch.finfo(dtype).eps))


def test_float_and_tensor_scale_agree():
    inputs = problem(scale=7.0)
    loss = ops.info_nce(**inputs)
    for scale in (7.0, 7, torch.tensor([7.0], dtype=F64, requires_grad=True)):
        assert torch.equal(ops.info_nce(**inputs | {"scale": scale}), loss)
    (grad,) = torch.autograd.grad(ops.info_nce(**inputs | {"scale": scale}), scale)
    assert grad.shape == (1,)
    assert_close(grad[0], gradients([loss], [ONE], inputs)["scale"])


# ------------------------------------------------------------------------- what each option means


def masked_pairs(**kwargs) -> set[tuple[int, int]]:
    """The (row, candidate) pairs that have no influence on the loss, found by looking.

    With one-hot vectors each similarity is an entry of ``b`` or of ``negatives`` alone.
    """
    size = 4
    a = torch.eye(size, dtype=F64)
    b = torch.zeros(size, size, dtype=F64, requires_grad=True)
    negatives = torch.zeros(size, size, dtype=F64, requires_grad=True)
    loss = ops.info_nce(a, b, negatives, scale=1.0, similarity="dot", symmetric=False, **kwargs)
    grads = torch.cat(torch.autograd.grad(loss, [b, negatives]))  # [candidate, row]
    return {(i, j) for j in range(2 * size) for i in range(size) if grads[j, i] == 0}


def test_nothing_is_masked_by_default():
    assert masked_pairs() == set()
    assert masked_pairs(row_ids=torch.arange(4), col_ids=torch.arange(8) + 10) == set()


def test_equal_anchors_are_no_negatives_of_each_other():
    row_ids, col_ids = torch.tensor([7, 8, 7, 9]), torch.arange(20, 28)
    assert masked_pairs(row_ids=row_ids, col_ids=col_ids) == {(0, 2), (2, 0)}


def test_equal_positives_are_no_negatives_of_each_other():
    row_ids, col_ids = torch.arange(20, 24), torch.tensor([5, 6, 7, 6, 0, 1, 2, 3])
    assert masked_pairs(row_ids=row_ids, col_ids=col_ids) == {(1, 3), (3, 1)}


def test_a_candidate_equal_to_the_anchor_is_no_negative():
    """Row 0's positive is row 1's anchor: masked both ways, the pair meets in both directions."""
    row_ids, col_ids = torch.tensor([0, 1, 2, 3]), torch.tensor([1, 11, 12, 13, 20, 21, 22, 23])
    assert masked_pairs(row_ids=row_ids, col_ids=col_ids) == {(1, 0), (0, 1)}


def test_an_own_positive_is_never_masked():
    """Not even where a text is paired with itself."""
    same = torch.tensor([3, 3, 4, 5])
    cols = torch.cat([same, torch.arange(10, 14)])
    assert masked_pairs(row_ids=same, col_ids=cols) == {(0, 1), (1, 0)}


def test_a_hard_negative_equal_to_a_positive_or_an_anchor_is_no_negative_there():
    """Negative 4 (row 0's) is row 2's positive, negative 7 (row 3's) is row 1's anchor."""
    row_ids = torch.tensor([0, 1, 2, 3])
    col_ids = torch.tensor([10, 11, 12, 13, 12, 15, 16, 1])
    assert masked_pairs(row_ids=row_ids, col_ids=col_ids) == {(2, 4), (1, 7)}


def test_negatives_come_from_the_same_domain():
    """A hard negative has the domain of its row: candidates 4..7 belong to rows 0..3."""
    masked = masked_pairs(domain_ids=torch.tensor([0, 0, 1, 1]))
    across = {(i, j) for i in range(4) for j in range(8) if (i < 2) != (j % 4 < 2)}
    assert masked == across


def test_rows_of_a_group_are_positives_of_each_other():
    """Even where ids or domains would mask them: a positive is never masked."""
    inputs = problem(per_row=0)
    group_ids = torch.tensor([0, 1, 0, 2, 3, 1])
    loss = ops.info_nce(**inputs, group_ids=group_ids, symmetric=False)
    a, b = (torch.nn.functional.normalize(inputs[n], dim=-1) for n in ("a", "b"))
    target = (group_ids[:, None] == group_ids).to(F64)
    target = target / target.sum(1, keepdim=True)
    s = inputs["scale"] * a @ b.T
    assert_close(loss, torch.nn.functional.cross_entropy(s, target))
    same = ops.info_nce(
        **inputs, group_ids=group_ids, row_ids=group_ids, col_ids=group_ids + 50, symmetric=False
    )
    assert_close(same, loss)
    apart = dict(group_ids=group_ids, domain_ids=torch.tensor([0, 0, 1, 0, 0, 0]))
    assert_same(problem(), **apart)


def test_hard_negatives_are_the_rows_own_and_everyones_candidates_one_way_only():
    inputs = problem()
    with_, without = ops.info_nce(**inputs), ops.info_nce(**inputs | {"negatives": None})
    one_way = ops.info_nce(**inputs, symmetric=False)
    one_way_without = ops.info_nce(**inputs | {"negatives": None}, symmetric=False)
    # The b-to-a half is the same with hard negatives and without.
    assert_close(2 * with_ - one_way, 2 * without - one_way_without)
    assert one_way > one_way_without


def test_weights_are_a_weighted_mean():
    inputs = problem()
    _, stats = ops.info_nce(**inputs, return_stats=True)
    weights = torch.tensor([1.0, 0.0, 2.0, 0.5, 0.0, 1.0], dtype=F64)
    loss = ops.info_nce(**inputs, weights=weights)
    assert_close(loss, (weights * stats.row_loss).sum() / weights.sum())
    assert_close(ops.info_nce(**inputs, weights=3 * weights), loss)
    assert_close(ops.info_nce(**inputs, weights=torch.ones(B, dtype=F64)), ops.info_nce(**inputs))


def test_label_smoothing_leaves_masked_candidates_out():
    inputs = problem(per_row=0)
    a, b = (torch.nn.functional.normalize(inputs[n], dim=-1) for n in ("a", "b"))
    s = inputs["scale"] * a @ b.T
    smooth = dict(label_smoothing=0.25, symmetric=False)
    expected = torch.nn.functional.cross_entropy(s, torch.arange(B), label_smoothing=0.25)
    assert_close(ops.info_nce(**inputs, **smooth), expected)
    # Two domains are two losses side by side: nothing of one is in the other.
    halves = [
        ops.info_nce(inputs["a"][h], inputs["b"][h], scale=inputs["scale"], **smooth)
        for h in (slice(0, 3), slice(3, 6))
    ]
    both = ops.info_nce(**inputs, domain_ids=torch.tensor([0, 0, 0, 1, 1, 1]), **smooth)
    assert_close(both, (halves[0] + halves[1]) / 2)


def test_ties_count_against_the_row():
    """A collapsed encoder, all embeddings equal, has rank B, not 1."""
    same = torch.ones(4, D)
    _, stats = ops.info_nce(same, same, scale=1.0, similarity="dot", return_stats=True)
    assert stats.rank.tolist() == [4] * 4
    assert float(stats.accuracy) == 0.0


def test_masked_candidates_and_further_positives_have_no_rank():
    same = torch.ones(4, D)
    kwargs = dict(scale=1.0, similarity="dot", return_stats=True)
    _, stats = ops.info_nce(same, same, group_ids=torch.tensor([0, 0, 1, 2]), **kwargs)
    assert stats.rank.tolist() == [3, 3, 4, 4]
    _, stats = ops.info_nce(same, same, domain_ids=torch.tensor([0, 0, 0, 1]), **kwargs)
    assert stats.rank.tolist() == [3, 3, 3, 1]
    assert float(stats.accuracy) == 0.25


# ------------------------------------------------------------------------------- hard cases


@pytest.mark.parametrize("scale", [100.0, 1e4])
def test_large_scales(scale):
    """log(sum(exp)) without its maximum overflows at 89."""
    for dtype in (torch.float32, F64):
        inputs = problem(dtype=dtype, scale=scale)
        loss = ops.info_nce(**inputs)
        expected = oracle.info_nce(**inputs).loss
        tolerance = 1e-10 if dtype == F64 else 1e-4  # logits of 1e4 have 1e-3 of float32
        assert_close(loss, expected, tolerance)
        grads = gradients([loss], [ONE], inputs)
        assert all(g.isfinite().all() for g in grads.values())


def test_a_loss_near_zero_keeps_its_relative_accuracy():
    """Rows far apart: the loss is about 1e-8, its gradients too, and both are right in float64."""
    inputs = problem(num_rows=4, per_row=0, scale=20.0)
    eye = torch.eye(4, D, dtype=F64) + 0.01 * torch.randn(4, D, dtype=F64)
    inputs |= leaves(a=eye, b=eye + 0.01 * torch.randn(4, D, dtype=F64))
    loss, expected = ops.info_nce(**inputs), oracle.info_nce(**inputs).loss
    assert 1e-10 < expected < 1e-7
    assert_close(loss, expected, 1e-6)
    assert_gradients_close(
        gradients([loss], [ONE], inputs), gradients([expected], [ONE], inputs), 1e-6
    )


@pytest.mark.parametrize("name", ["a", "b", "negatives"])
def test_a_zero_embedding_has_no_direction(name):
    """Its cosines are 0 and it gets no gradient: not NaN, and not 1e12 times the others'."""
    inputs = problem()
    inputs |= leaves(**{name: inputs[name].detach().index_fill(0, torch.tensor([2]), 0.0)})
    loss = ops.info_nce(**inputs)
    grads = gradients([loss], [ONE], inputs)
    assert grads[name][2].abs().max() == 0
    # As that of a direction at right angles to all others.
    padded = {n: torch.nn.functional.pad(t, (0, 1)) for n, t in inputs.items() if t.dim()}
    padded[name][2, D] = 1.0
    expected = oracle.info_nce(**padded, scale=inputs["scale"]).loss
    assert_close(loss, expected)
    expected_grads = gradients([expected], [ONE], inputs)
    expected_grads[name][2] = 0
    assert_gradients_close(grads, expected_grads)


def test_a_row_whose_negatives_are_all_masked_has_no_loss():
    inputs = problem()
    kwargs = dict(domain_ids=torch.tensor([0, 0, 0, 0, 0, 1]))
    inputs |= leaves(negatives=None)
    loss, stats = ops.info_nce(**inputs, **kwargs, return_stats=True)
    assert stats.row_loss[5] == 0
    assert stats.rank[5] == 1
    grads = gradients([loss], [ONE], inputs)
    assert grads["a"][5].abs().max() == grads["b"][5].abs().max() == 0
    assert_same(inputs, **kwargs)


@pytest.mark.parametrize("dim", [1, 7])
def test_any_dimension(dim):
    inputs = leaves(**{n: torch.randn(B, dim, dtype=F64) for n in ("a", "b")}, scale=ONE)
    assert_same(inputs, similarity="dot")


def test_rows_that_are_all_the_same():
    """The loss is log B both ways, and no direction is better than another (d = 4: exactly)."""
    inputs = leaves(**{n: torch.ones(B, 4, dtype=F64) for n in ("a", "b")}, scale=5 * ONE)
    loss, stats = ops.info_nce(**inputs, return_stats=True)
    assert loss.item() == pytest.approx(math.log(B), rel=1e-12)
    assert stats.rank.tolist() == [B] * B
    grads = gradients([loss], [ONE], inputs)
    assert all(g.abs().max() < 1e-14 for g in grads.values())


def test_the_length_of_a_cosine_embedding_does_not_matter():
    inputs = problem()
    longer = inputs | {"a": inputs["a"] * 3.0, "b": inputs["b"] * 0.01}
    assert_close(ops.info_nce(**longer), ops.info_nce(**inputs))


def test_the_order_of_pairs_does_not_matter():
    inputs = problem()
    order = torch.randperm(B)
    shuffled = inputs | dict(
        a=inputs["a"][order],
        b=inputs["b"][order],
        negatives=inputs["negatives"].reshape(B, G, D)[order].flatten(0, 1),
    )
    for symmetric in (True, False):
        assert_close(
            ops.info_nce(**shuffled, symmetric=symmetric),
            ops.info_nce(**inputs, symmetric=symmetric),
        )


def test_non_contiguous_and_expanded_inputs():
    inputs = {
        n: t if t.dim() == 0 else t.detach().T.contiguous().T.requires_grad_()
        for n, t in problem().items()
    }
    assert_same(inputs)
    one = torch.randn(1, D, dtype=F64)
    inputs["b"] = one.expand(B, D).requires_grad_()
    inputs["a"] = torch.randn(B, 2 * D, dtype=F64)[:, ::2].requires_grad_()
    assert_same(inputs, weights=torch.rand(1, dtype=F64).expand(B), similarity="dot")


def test_the_upstream_gradient_is_used():
    inputs = problem()
    loss = ops.info_nce(**inputs)
    once, thrice = (gradients([loss], [c * ONE], inputs) for c in (1.0, 3.0))
    assert_gradients_close(thrice, {n: 3.0 * g for n, g in once.items()})


def test_the_same_tensor_on_both_sides():
    """SimCSE without dropout: both sides' gradients add up."""
    x = torch.randn(B, D, dtype=F64, requires_grad=True)
    (grad,) = torch.autograd.grad(ops.info_nce(x, x, scale=5.0), x)
    (expected,) = torch.autograd.grad(oracle.info_nce(x, x, scale=5.0).loss, x)
    assert_close(grad, expected)


def test_only_the_gradients_that_are_wanted():
    inputs = problem()
    expected = gradients([oracle.info_nce(**inputs).loss], [ONE], inputs)
    for name in inputs:
        frozen = {n: t.detach().requires_grad_(n == name) for n, t in inputs.items()}
        ops.info_nce(**frozen).backward()
        assert_close(frozen[name].grad, expected[name])


def test_two_runs_are_bitwise_equal():
    inputs = problem(num_rows=40, dtype=torch.float32)

    def once():
        loss = ops.info_nce(**inputs)
        return [loss, *gradients([loss], [torch.ones(())], inputs).values()]

    assert all(torch.equal(p, q) for p, q in zip(once(), once(), strict=True))


# ------------------------------------------------------------------- autocast, autograd, compiler


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_autocast_does_not_touch_the_loss(similarity, dtype):
    inputs = problem(dtype=dtype)
    results = []
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = ops.info_nce(**inputs, similarity=similarity)
        results.append([loss, *gradients([loss], [torch.ones(())], inputs).values()])
    for inside, outside in zip(*results, strict=True):
        assert inside.dtype == outside.dtype
        assert torch.equal(inside, outside)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("options", ["nothing", "everything"])
def test_gradcheck(options, symmetric):
    inputs = problem(num_rows=3, per_row=1)
    kwargs = OPTIONS[options](3, 6)

    def function(a, b, negatives, scale):
        return ops.info_nce(a, b, negatives, scale=scale, symmetric=symmetric, **kwargs)

    assert torch.autograd.gradcheck(function, tuple(inputs.values()))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("options", ["nothing", "everything"])
def test_opcheck(options, symmetric, backend):
    inputs = problem()
    kwargs = OPTIONS[options](B, B + B * G)

    def call():
        ops.info_nce(**inputs, symmetric=symmetric, **kwargs).backward()

    op = OP_NAMES[backend]
    opcheck_calls(call, {op, f"{op}_backward"})


def test_compiles_as_one_graph():
    torch.compiler.reset()

    def function(a, b, negatives, scale, domain_ids):
        loss, stats = ops.info_nce(
            a, b, negatives, scale=scale, domain_ids=domain_ids, return_stats=True
        )
        return loss, stats.row_loss, stats.rank, stats.accuracy

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for num_rows in (B, 9):
        inputs = problem(num_rows=num_rows)
        domain_ids = torch.randint(0, 2, (num_rows,))
        expected, actual = (f(**inputs, domain_ids=domain_ids) for f in (function, compiled))
        for p, q in zip(actual, expected, strict=True):
            assert_close(p, q, 1e-14)
        assert_gradients_close(
            gradients([actual[0]], [ONE], inputs, retain_graph=False),
            gradients([expected[0]], [ONE], inputs),
            1e-14,
        )


# ----------------------------------------------------------------------------------------- peers


@pytest.mark.parametrize("per_row", [0, G])
@pytest.mark.parametrize("symmetric", [True, False])
def test_equals_sentence_transformers(symmetric, per_row):
    """MultipleNegativesRankingLoss; its hard negatives are columns, ours rows i*G .. i*G+G-1."""
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    how = dict(directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction")
    peer = losses.MultipleNegativesRankingLoss(None, scale=20.0, **(how if symmetric else {}))

    inputs = problem(per_row=per_row)
    del inputs["scale"]
    columns = [inputs["a"], inputs["b"]]
    if per_row:
        columns += list(inputs["negatives"].reshape(B, G, D).unbind(1))
    expected = peer.compute_loss_from_embeddings(columns, None)
    loss = ops.info_nce(**inputs, scale=20.0, symmetric=symmetric)
    assert_close(loss, expected)
    assert_gradients_close(gradients([loss], [ONE], inputs), gradients([expected], [ONE], inputs))
