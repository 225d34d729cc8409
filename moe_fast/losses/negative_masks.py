"""Masks pairs of a batch that must not be negatives: duplicates, other domains, groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_fast.losses.batch_features import text_ids

NEGATIVES_FROM = ("all", "same_domain")


def check_masks(columns: Sequence[Mapping[str, Any]], negatives_from: str) -> None:
    """Raise ``ValueError`` if ``negatives_from`` needs domain ids that are missing."""
    if negatives_from == "same_domain" and "domain_ids" not in columns[0]:
        raise ValueError(
            'negatives_from="same_domain" needs domain_ids in the features; got '
            f"{sorted(columns[0])}. Train with moe_fast.training.DomainDataCollator and a "
            "dataset that has a domain column."
        )


def batch_masks(
    columns: Sequence[Mapping[str, Any]], mask_duplicates: bool, negatives_from: str
) -> dict[str, Any]:
    """Return the ids from which :func:`moe_fast.ops.info_nce` makes its masks, by name.

    These are ``row_ids``, ``col_ids``, ``domain_ids`` and ``group_ids``. Ids that are not used, or
    not there, are ``None``.

    Args:
        columns: the features of anchor, positive and hard negatives.
        mask_duplicates: whether a text must never be a negative of itself.
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
    """Interleave G columns [B, ...] to [B * G, ...], row i's at ``i * G .. i * G + G - 1``.

    Raises:
        ValueError: the columns differ in shape.
    """
    shapes = {tuple(column.shape) for column in columns}
    if len(shapes) > 1:
        raise ValueError(f"the negative columns must have one shape; got {sorted(shapes)}.")
    return torch.stack(list(columns), dim=1).flatten(0, 1)
