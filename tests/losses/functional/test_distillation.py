"""distillation: KL of the teacher's softmax against the student's, as scipy computes it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loss_checks import assert_close, assert_same, property_test, randn

from moe_fast.losses.functional import distillation


def oracle(student, teacher) -> torch.Tensor:
    total = 0
    for s, t in zip(student, teacher.detach(), strict=True):
        p, q = t.exp() / t.exp().sum(), s.exp() / s.exp().sum()
        total = total + sum(p[c] * (p[c].log() - q[c].log()) for c in range(len(p)))
    return total / len(student)


@property_test
@given(rows=st.integers(1, 6), candidates=st.integers(2, 7), seed=st.integers(0, 999))
def test_is_the_definition(rows, candidates, seed):
    student, teacher = randn(rows, candidates, seed=seed), randn(rows, candidates, seed=seed + 9999)
    assert_same(
        lambda: distillation(student, teacher), lambda: oracle(student, teacher), student, teacher
    )


def test_is_scipys_relative_entropy():
    special = pytest.importorskip("scipy.special")
    student, teacher = randn(5, 4), randn(5, 4, seed=1)
    p, q = (special.softmax(x.detach().numpy(), axis=1) for x in (teacher, student))
    expected = special.rel_entr(p, q).sum(1).mean()
    assert distillation(student, teacher).item() == pytest.approx(expected, rel=1e-12)


def test_is_zero_where_the_student_agrees_and_keeps_its_gradient_out_of_the_teacher():
    teacher = randn(3, 4)
    loss = distillation((teacher + 5).detach().requires_grad_(), teacher)
    assert loss.item() == pytest.approx(0.0, abs=1e-15)
    loss.backward()
    assert teacher.grad is None


def test_scores_far_apart_do_not_give_nan():
    student = torch.zeros(1, 3, requires_grad=True)
    loss = distillation(student, torch.tensor([[1e4, 0.0, -1e4]]))
    loss.backward()
    assert loss.item() == pytest.approx(torch.log(torch.tensor(3.0)).item())
    assert student.grad.isfinite().all()


def test_low_precision_students_are_computed_in_float32():
    student, teacher = randn(4, 3, dtype=torch.bfloat16), randn(4, 3, seed=1, dtype=torch.float32)
    loss = distillation(student, teacher)
    assert loss.dtype == torch.float32
    assert_close(loss, oracle(student.double(), teacher.double()), 1e-6)


@pytest.mark.parametrize(
    ("student", "teacher", "error", "message"),
    [
        (randn(2, 1), randn(2, 1), ValueError, "at least one row of two candidates"),
        (randn(2, 3), randn(2, 4), ValueError, r"teacher_logits must have shape .*got \[2, 4\]"),
        (randn(2, 3), torch.ones(2, 3).long(), TypeError, "teacher_logits must have dtype"),
        (randn(1, 2), torch.tensor([[1.0, float("nan")]]), ValueError, "must be finite; .* row 0"),
    ],
)
def test_bad_input_is_named(student, teacher, error, message):
    with pytest.raises(error, match=message):
        distillation(student, teacher)
