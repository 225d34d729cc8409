"""Checks and prepares the arguments of contrastive losses."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from moe_fast.ops.checks import (
    FLOAT_DTYPES,
    INTEGER_DTYPES,
    check_choice,
    check_dtype,
    check_like,
    check_shape,
    checks_values,
    compute_dtype,
)
from moe_fast.ops.info_nce.tiles import inverse_norm

SIMILARITIES = ("cosine", "dot")


def check_arguments(
    a: Tensor,
    b: Tensor,
    negatives: Tensor | None,
    similarity: str,
    label_smoothing: float,
    weights: Tensor | None,
    col_ids: Tensor | None,
    **row_values: Tensor | None,
) -> None:
    """Raise unless the arguments are those that :func:`info_nce` takes.

    A single pair without negatives passes; :func:`check_not_alone` refuses it.
    """
    check_choice("similarity", similarity, SIMILARITIES)
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must lie in [0, 1); got {label_smoothing}.")
    check_pairs(a, b, negatives, weights, col_ids, **row_values)


def check_not_alone(a: Tensor, negatives: Tensor | None) -> None:
    """Raise ``ValueError`` for a single pair without hard negatives."""
    if a.shape[0] == 1 and (negatives is None or negatives.shape[0] == 0):
        raise ValueError(
            "info_nce needs negatives: one pair alone has none and a loss of 0 whatever its "
            "embeddings are; got B = 1 and no hard negatives. Give hard negatives or more pairs, "
            "or drop a last batch of one row (dataloader_drop_last=True)."
        )


def queries_and_keys(
    a: Tensor, b: Tensor, negatives: Tensor | None, similarity: str
) -> tuple[Tensor, Tensor]:
    """Return q [B, d] and k [N, d], whose products are the similarities, in at least float32."""
    dtype = compute_dtype(a.dtype)
    candidates = b if negatives is None else torch.cat((b, negatives))
    q, k = a.to(dtype), candidates.to(dtype)
    if similarity == "cosine":
        q, k = (x * inverse_norm(x)[:, None] for x in (q, k))
    return q, k


def as_scale(scale: float | Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return ``scale`` as a [] tensor.

    Raises:
        ValueError: it is a tensor with more than one element, or a number that is not positive and
            finite.
        TypeError: it is neither a number nor a tensor.
    """
    if isinstance(scale, Tensor):
        if scale.numel() != 1:
            raise ValueError(f"scale must have one element; got shape {list(scale.shape)}.")
        return scale.reshape(()).to(device=device, dtype=dtype)
    if not isinstance(scale, (Real, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"scale must be a number or a tensor; got {scale!r}.")
    if not 0 < scale < math.inf:
        raise ValueError(
            f"scale must be greater than 0 and finite (it is 1 / temperature); got {scale}."
        )
    return torch.full((), scale, device=device, dtype=dtype)


def row_weights(weights: Tensor | None, a: Tensor) -> Tensor:
    """Return the weights [B], divided by their sum, in the dtype of the logits of anchors ``a``.

    Without ``weights`` all rows weigh the same. Raises ``ValueError`` for weights that are negative
    or all 0, if values are checked.
    """
    dtype = compute_dtype(a.dtype)
    if weights is None:
        return a.new_full((a.shape[0],), 1 / a.shape[0], dtype=dtype)
    weights = weights.to(dtype)
    if not check_weights(weights):
        raise ValueError(f"weights must be >= 0 and not all 0; got {weights.tolist()}.")
    return weights / weights.sum()


def check_weights(weights: Tensor | None) -> bool:
    """Whether any row has a weight above 0; True if values are not checked or weights are absent.

    Raises ``ValueError`` for a weight that is negative, NaN or infinite.
    """
    if weights is None or not checks_values(weights.device):
        return True
    if not ((weights >= 0).all() and weights.sum().isfinite()):
        raise ValueError(f"weights must be >= 0 and finite; got {weights.tolist()}.")
    return bool(weights.any())


def check_scale(scale: Tensor) -> None:
    """Raise ``ValueError`` unless the scale [] is positive and finite, if values are checked."""
    if checks_values(scale.device) and not 0 < scale.item() < math.inf:
        raise ValueError(f"scale must be greater than 0 and finite; got {scale.item()}.")


def check_pairs(
    a: Tensor,
    b: Tensor,
    negatives: Tensor | None,
    weights: Tensor | None,
    col_ids: Tensor | None,
    **row_values: Tensor | None,
) -> None:
    """Raise unless shapes, dtypes and devices are those that :func:`info_nce` takes."""
    check_dtype("a", a, FLOAT_DTYPES)
    check_shape("a", a, (None, None), "[B, d]")
    batch, dim = a.shape
    if batch == 0:
        raise ValueError("a must hold at least one row: the mean over no rows is undefined.")
    check_shape("b", b, (batch, dim), "[B, d]")
    num_candidates = batch
    if negatives is not None:
        check_shape("negatives", negatives, (None, dim), "[B * G, d]")
        if negatives.shape[0] % batch:
            raise ValueError(
                f"negatives must hold G rows for each of the B = {batch} anchors; "
                f"got {negatives.shape[0]} rows."
            )
        num_candidates += negatives.shape[0]
    check_like("a", a, b=b, negatives=negatives)
    if (row_values.get("row_ids") is None) != (col_ids is None):
        given, missing = ("row_ids", "col_ids") if col_ids is None else ("col_ids", "row_ids")
        raise ValueError(f"row_ids and col_ids go together; got {given} without {missing}.")
    for name, values in row_values.items():
        if values is not None:
            check_shape(name, values, (batch,), "[B]")
            check_dtype(name, values, INTEGER_DTYPES)
    if col_ids is not None:
        check_shape("col_ids", col_ids, (num_candidates,), "[B + B * G]")
        check_dtype("col_ids", col_ids, INTEGER_DTYPES)
    if weights is not None:
        check_shape("weights", weights, (batch,), "[B]")
        check_dtype("weights", weights, FLOAT_DTYPES)
    check_like("a", a, dtype=False, weights=weights, col_ids=col_ids, **row_values)
