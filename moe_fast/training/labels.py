"""Checks the labels of pairs for losses that treat every pair as a positive."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from sentence_transformers.sentence_transformer import losses as stock
from torch import Tensor, nn

from moe_fast import losses as ours

_NO_LABELS = (  # losses that treat all pairs of a batch as positives, whatever their label
    ours.InfoNCELoss,
    ours.MultipleNegativesRankingPlusLoss,
    ours.SigmoidLoss,
    stock.MultipleNegativesRankingLoss,
    stock.CachedMultipleNegativesRankingLoss,
    stock.MultipleNegativesSymmetricRankingLoss,
    stock.CachedMultipleNegativesSymmetricRankingLoss,
    stock.GISTEmbedLoss,
    stock.CachedGISTEmbedLoss,
    stock.MegaBatchMarginLoss,
)
_POSITIVE_NAMES = {"1", "true", "yes", "positive", "pos"}


def ignores_labels(loss: nn.Module) -> bool:
    """Return whether a loss, or the one that it wraps, treats every pair as a positive."""
    inner: Any = loss
    while inner is not None:
        if isinstance(inner, _NO_LABELS):
            return True
        inner = getattr(inner, "loss", None)
    return False


def check_labels(
    datasets: Mapping[str, Any],
    losses: nn.Module | Mapping[str, nn.Module],
    names: Sequence[str],
) -> None:
    """Raise an error for labels other than 1 if the loss treats every pair as a positive.

    The label 1 may also be 1.0, true, or a class named "1", "true", "yes", "positive" or "pos".
    Streamed datasets are checked batch by batch, see :func:`check_label_batch`.

    Args:
        datasets: {name: dataset}; one of several parts is named ``{name}.{part}``.
        losses: one loss for all datasets, or {part: loss}.
        names: the columns that may hold labels; as in sentence-transformers, the first one counts.

    Raises:
        ValueError: a row has another label; the error names the dataset and the column, and says
            how many rows do.
    """
    for name, data in datasets.items():
        # sentence-transformers takes the first of the names
        column = next((name for name in names if name in data.column_names), None)
        if column is None or not hasattr(data, "__len__"):
            continue
        loss = losses.get(name.partition(".")[2]) if isinstance(losses, Mapping) else losses
        if loss is None or not ignores_labels(loss):
            continue
        classes = getattr((data.features or {}).get(column), "names", None)
        counts = _others(data.with_format(None)[column], classes)
        if counts:
            raise ValueError(_message(loss, f"the {name} dataset", column, counts, len(data)))


def check_label_batch(loss: nn.Module, labels: Any) -> None:
    """Raise an error for labels other than 1 in a batch, as :func:`check_labels` does for datasets.

    Raises:
        ValueError: the loss treats every pair as a positive, and a label is not 1.
    """
    if not isinstance(labels, Tensor) or labels.dim() != 1 or not ignores_labels(loss):
        return
    if not bool(torch.all(labels == 1)):
        counts = _others(labels.tolist(), None)
        raise ValueError(_message(loss, "a batch of the data", "label", counts, len(labels)))


def _others(values: Iterable[Any], classes: Sequence[str] | None) -> dict[str, int]:
    """Count each label other than 1."""
    counts: dict[str, int] = {}
    for value in values:
        if classes is not None and value is not None:
            name = classes[value] if 0 <= value < len(classes) else str(value)
            positive = name.strip().lower() in _POSITIVE_NAMES
        else:
            name, positive = repr(value), isinstance(value, (int, float)) and value == 1
        if not positive:
            counts[name] = counts.get(name, 0) + 1
    return counts


def _message(loss: nn.Module, what: str, column: str, counts: dict[str, int], rows: int) -> str:
    shown = ", ".join(f"{name} ({count})" for name, count in list(counts.items())[:5])
    return (
        f"{what} has the label column {column!r}, and {sum(counts.values())} of {rows} pairs have "
        f"another label than 1: {shown}{', ...' if len(counts) > 5 else ''}. "
        f"{type(loss).__name__} takes every pair for a positive one. Keep the positive pairs, "
        f"dataset.filter(lambda row: row[{column!r}] == 1), remove the column where it means "
        f"something else, dataset.remove_columns({column!r}), or use a loss of labelled pairs."
    )
