"""Which pairs of a batch are each other's negatives: duplicates, domains, groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_fast.losses.batch_features import text_ids

NEGATIVES_FROM = ("all", "same_domain")


def check_masks(columns: Sequence[Mapping[str, Any]], negatives_from: str) -> None:
    """Raise ``ValueError`` where ``negatives_from`` needs domain ids that are not there."""
    if negatives_from == "same_domain" and "domain_ids" not in columns[0]:
        raise ValueError(
            'negatives_from="same_domain" needs domain_ids in the features; got '
            f"{sorted(columns[0])}. Train with moe_fast.training.DomainDataCollator and a "
            "dataset that has a domain column."
        )


def batch_masks(
    columns: Sequence[Mapping[str, Any]], mask_duplicates: bool, negatives_from: str
) -> dict[str, Any]:
    """``row_ids``, ``col_ids``, ``domain_ids`` and ``group_ids`` for :func:`moe_fast.ops.info_nce`.

    Args:
        columns: the features of anchor, positive and hard negatives.
        mask_duplicates: whether the same text is never its own negative.
        negatives_from: one of :data:`NEGATIVES_FROM`.
    """
    row_ids = col_ids = None
    ids = text_ids(columns) if mask_duplicates else None
    if ids is not None:
        hard = [interleave(ids[2:])] if len(ids) > 2 else []
        row_ids, col_ids = ids[0], torch.cat([ids[1], *hard])
    return {
        "row_ids": row_ids,
        "col_ids": col_ids,
        "domain_ids": columns[0]["domain_ids"] if negatives_from == "same_domain" else None,
        "group_ids": columns[0].get("group_ids"),
    }


def interleave(columns: Sequence[Tensor]) -> Tensor:
    """G columns [B, ...] to [B * G, ...]: row i's are at ``i * G .. i * G + G - 1``."""
    shapes = {tuple(column.shape) for column in columns}
    if len(shapes) > 1:
        raise ValueError(f"the negative columns must have one shape; got {sorted(shapes)}.")
    return torch.stack(list(columns), dim=1).flatten(0, 1)
