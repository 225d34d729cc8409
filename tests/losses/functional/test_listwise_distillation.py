"""listwise_distillation: each passage against the batch, as FlagEmbedding's loop computes it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loss_checks import F64, assert_close, assert_same, property_test, randn

from moe_fast.losses.functional import distillation, listwise_distillation, row_blocks


def oracle(a, passages, teacher, scale, similarity="cosine", excluded=lambda r, q, j: False):
    """One logit at a time. Passage i of row r leaves out the row's passages before it."""
    total = torch.zeros((), dtype=F64)
    batch, own, _ = passages.shape

    def similar(x, y):
        dot = (x * y).sum()
        if similarity == "dot":
            return dot
        return dot / torch.sqrt((x * x).sum()) / torch.sqrt((y * y).sum())

    for r in range(batch):
        share = teacher[r].detach().double().softmax(0)
        for i in range(own):
            terms = [scale * similar(a[r], passages[r, j]) for j in range(i, own)]
            for q in (q for q in range(batch) if q != r):
                for j in range(own):
                    if not excluded(r, q, j):
                        terms.append(scale * similar(a[r], passages[q, j]))
            total = total + share[i] * (torch.stack(terms).logsumexp(0) - terms[0])
    return total / batch


def problem(rows, own, seed=0, size=4):
    return (
        randn(rows, size, seed=seed),
        randn(rows, own, size, seed=seed + 1),
        randn(rows, own, seed=seed + 2),
    )


@property_test
@given(
    rows=st.integers(1, 4),
    own=st.integers(1, 4),
    similarity=st.sampled_from(["cosine", "dot"]),
    seed=st.integers(0, 999),
)
def test_is_the_definition(rows, own, similarity, seed):
    a, passages, teacher = problem(rows, own, seed)
    scale = torch.tensor(3.0, dtype=F64, requires_grad=True)
    if rows * own == 1:
        assert listwise_distillation(a, passages, teacher, scale=scale).item() == pytest.approx(0)
        return
    assert_same(
        lambda: listwise_distillation(a, passages, teacher, scale=scale, similarity=similarity),
        lambda: oracle(a, passages, teacher, scale, similarity),
        a,
        passages,
        scale,
    )


def test_is_what_flag_embeddings_loop_gives():
    """Its ``m3_kd_loss`` in plain PyTorch: the logits of all passages, masked one by one."""
    a, passages, teacher = problem(3, 4)
    queries, keys = (torch.nn.functional.normalize(x, dim=-1) for x in (a, passages.flatten(0, 1)))
    scores = 5.0 * queries @ keys.t()
    labels, mask = torch.arange(3) * 4, torch.zeros_like(scores)
    total = 0.0
    for i in range(4):
        target = labels + i
        loss = torch.nn.functional.cross_entropy(scores + mask, target, reduction="none")
        total = total + (teacher.softmax(1)[:, i] * loss).mean()
        mask = torch.scatter(mask, -1, target[:, None], torch.finfo(scores.dtype).min)
    assert_close(listwise_distillation(a, passages, teacher, scale=5.0), total)


def test_masks():
    a, passages, teacher = problem(3, 2)
    row_ids = torch.tensor([7, 8, 9])
    col_ids = torch.tensor([[1, 2], [3, 2], [7, 4]])  # 2 twice; the first query is a passage, 7
    domain_ids = torch.tensor([0, 0, 1])

    def copies(r, q, j):
        return int(col_ids[q, j]) in [*col_ids[r].tolist(), int(row_ids[r])]

    def other_domain(r, q, j):
        return bool(domain_ids[r] != domain_ids[q])

    ids = {"row_ids": row_ids, "col_ids": col_ids}
    for settings, excluded in (
        (ids, copies),
        ({"domain_ids": domain_ids}, other_domain),
        ({**ids, "domain_ids": domain_ids}, lambda *at: copies(*at) or other_domain(*at)),
    ):
        assert_same(
            lambda s=settings: listwise_distillation(a, passages, teacher, scale=4.0, **s),
            lambda e=excluded: oracle(a, passages, teacher, 4.0, excluded=e),
            a,
            passages,
        )


def test_blocks_of_rows_change_nothing(monkeypatch):
    a, passages, teacher = problem(7, 3)
    want = listwise_distillation(a, passages, teacher, scale=4.0)
    grads = torch.autograd.grad(want, (a, passages))
    monkeypatch.setattr(row_blocks, "BLOCK_LOGITS", 50)  # two rows at a time
    got = listwise_distillation(a, passages, teacher, scale=4.0)
    assert_close(got, want)
    for mine, other in zip(torch.autograd.grad(got, (a, passages)), grads, strict=True):
        assert_close(mine, other)


def test_without_others_it_is_plackett_luce_not_the_divergence():
    a, passages, teacher = problem(1, 3)
    loss = listwise_distillation(a, passages, teacher, scale=2.0)
    assert_close(loss, oracle(a, passages, teacher, 2.0))
    student = 2.0 * torch.cosine_similarity(a[:, None], passages, dim=-1)
    assert abs(loss - distillation(student, teacher)) > 1e-3
    assert teacher.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_computed_in_float32(dtype):
    a, passages, teacher = (x.detach().to(dtype) for x in problem(3, 2))
    loss = listwise_distillation(a, passages, teacher, scale=50.0)
    assert loss.dtype == torch.float32
    assert_close(loss, oracle(a.double(), passages.double(), teacher.double(), 50.0), 1e-5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"passages": torch.zeros(2, 3, 4, dtype=F64)}, "passages must have shape"),
        ({"teacher_logits": torch.zeros(3, 3, dtype=F64)}, "teacher_logits must have shape"),
        ({"teacher_logits": torch.full((3, 2), torch.nan)}, "teacher_logits must be finite"),
        ({"row_ids": torch.arange(3)}, "col_ids must be given with row_ids"),
        ({"domain_ids": torch.arange(2)}, "domain_ids must have shape"),
        ({"similarity": "l2"}, "similarity must be one of"),
    ],
)
def test_bad_input(change, said):
    a, passages, teacher = problem(3, 2)
    given_ = {"a": a, "passages": passages, "teacher_logits": teacher, "scale": 1.0}
    with pytest.raises((ValueError, TypeError), match=said):
        listwise_distillation(**{**given_, **change})
