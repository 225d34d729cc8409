"""distillation: the student learns a teacher's ranking of each query's candidates.

    loss = mean_i KL(softmax(teacher_i) || softmax(student_i))

Row i holds the logits of query i's own candidates. Source: Lin et al., arXiv 2010.11386.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_fast.ops.checks import (
    FLOAT_DTYPES,
    check_dtype,
    check_shape,
    checks_values,
    compute_dtype,
)


def distillation(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Compute the mean KL divergence over B rows of C candidates.

    Both kinds of logits must already be divided by their temperatures.

    Args:
        student_logits: [B, C], B >= 1, C >= 2.
        teacher_logits: [B, C] float, finite; it gets no gradient.

    Returns:
        [] float32 (float64 for a float64 student).

    Raises:
        ValueError: a shape does not fit, or (if values are checked) a teacher's score is NaN or
            infinite.
        TypeError: a dtype does not fit.
    """
    check_dtype("student_logits", student_logits, FLOAT_DTYPES)
    check_shape("student_logits", student_logits, (None, None), "[B, C]")
    if len(student_logits) < 1 or student_logits.shape[1] < 2:
        raise ValueError(
            "student_logits must hold at least one row of two candidates (over one, the softmax "
            f"is constant); got {list(student_logits.shape)}."
        )
    check_dtype("teacher_logits", teacher_logits, FLOAT_DTYPES)
    check_shape("teacher_logits", teacher_logits, tuple(student_logits.shape), "[B, C]")
    if checks_values(teacher_logits.device) and not teacher_logits.isfinite().all():
        row = int((~teacher_logits.isfinite()).any(1).nonzero()[0])
        raise ValueError(
            f"teacher_logits must be finite; got {teacher_logits[row].tolist()} in row {row}."
        )
    dtype = compute_dtype(student_logits.dtype)
    with torch.autocast(student_logits.device.type, enabled=False):
        student = student_logits.to(dtype).log_softmax(1)
        teacher = teacher_logits.detach().to(dtype).log_softmax(1)
        return F.kl_div(student, teacher, log_target=True, reduction="batchmean")
