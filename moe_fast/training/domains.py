"""From what a dataset's domain column holds to the domain ids that the model takes."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def to_domain_ids(values: Sequence[Any], domains: Sequence[str]) -> Tensor:
    """[B] int64, from names or from integer ids.

    Raises:
        ValueError: for a name that is not in ``domains`` (which are listed) or an id out of range.
        TypeError: for a value that is neither a name nor an integer.
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
