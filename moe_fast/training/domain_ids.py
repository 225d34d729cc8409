"""Converts the values of a dataset's domain column to the domain ids that the model takes."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def with_domain_names(dataset: Any, column: str) -> Any:
    """Replace the class labels in a dataset's domain column by their names.

    The number of a ``ClassLabel`` is an index into the dataset's list of names, which may differ
    from the model's; domains are therefore matched by name. A mapping of datasets gives a mapping.
    A dataset without class labels in this column is returned unchanged.
    """
    if isinstance(dataset, Mapping):
        like: Any = type(dataset)  # a DatasetDict gives a DatasetDict
        return like({k: with_domain_names(part, column) for k, part in dataset.items()})
    features = getattr(dataset, "features", None) or {}
    names = getattr(features.get(column), "names", None)
    if names is None:
        return dataset
    from datasets import Value

    def named(row: dict[str, Any]) -> dict[str, Any]:
        return {column: None if row[column] is None else names[row[column]]}

    if not hasattr(dataset, "__len__"):
        described = type(features)({**features, column: Value("string")})
        return dataset.map(named, features=described)
    values = [None if v is None else names[v] for v in dataset.with_format(None)[column]]
    return dataset.remove_columns(column).add_column(column, values)


def to_domain_ids(values: Sequence[Any], domains: Sequence[str]) -> Tensor:
    """Return the domain ids, [B] int64, of B names or integer ids.

    Raises:
        ValueError: a name is not in ``domains``, which the error lists, or an id is out of range.
        TypeError: a value is neither a name nor an integer.
    """
    index = {name: i for i, name in enumerate(domains)}
    return torch.tensor([_to_domain_id(value, index) for value in values], dtype=torch.int64)


def _to_domain_id(value: Any, index: dict[str, int]) -> int:
    if isinstance(value, str):
        if value not in index:
            raise ValueError(f"unknown domain {value!r}; the known ones are {list(index)}.")
        return index[value]
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_floating_point():
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(
            f"a domain must be a name or an integer id; got {value!r} ({type(value).__name__})."
        )
    domain_id = int(value)
    if not 0 <= domain_id < len(index):
        raise ValueError(
            f"domain id {domain_id} is out of range: ids must lie in [0, {len(index)}), "
            f"for the domains {list(index)}."
        )
    return domain_id
