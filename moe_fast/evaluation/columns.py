"""Reads the columns of a data set as lists, and checks them before anything is encoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_fast.data import checks
from moe_fast.data.columns import match_columns
from moe_fast.data.sources import class_names


def read_columns(
    dataset: Any,
    required: Sequence[str],
    optional: Sequence[str] = (),
    argument: str = "dataset",
) -> dict[str, list[Any]]:
    """Read columns of a data set.

    Args:
        dataset: a ``datasets.Dataset`` or ``IterableDataset`` (which is consumed once), or a
            mapping from names to sequences of the same length.
        required, optional: the columns to read, by our names; the data set may use the names in
            `moe_fast.data.columns.SPELLINGS`, such as ``sentence1`` for ``a``. ``a``, ``b`` and
            ``domain`` must hold strings that are not blank.
        argument: the name of the data set in error messages.

    Returns:
        {our name: values} of the required columns and of the optional ones that exist. Labels are
        0 or 1.

    Raises:
        ValueError: a required column is missing, or two columns fit one of our names.
        ValueError: there are no rows, or the columns have different lengths.
        ValueError: a text or a domain is blank or not a string.
        ValueError: `moe_fast.data.checks.label` refuses a label.
    """
    columns = _columns(dataset)
    places = match_columns(columns, (*required, *optional), where=argument)
    checks.present(columns, [name for name in required if name not in places], argument)
    wanted = [name for name in (*required, *optional) if name in places]
    chosen = {name: list(columns[places[name]]) for name in wanted}
    if "label" in chosen:
        chosen["label"] = _labels(dataset, places["label"], chosen["label"], argument)
    lengths = {name: len(values) for name, values in chosen.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{argument}: columns must have one length; got {lengths}")
    if not any(lengths.values()):
        raise ValueError(f"{argument} has no rows")
    for name in {"a", "b", "domain"} & chosen.keys():
        _check_strings(chosen[name], f"{argument}, row {{}}: {name}")
    return chosen


def _columns(dataset: Any) -> Mapping[str, Any]:
    if isinstance(dataset, Mapping):
        return dataset
    if hasattr(dataset, "__len__"):
        return {name: dataset[name] for name in dataset.column_names}
    rows = list(dataset)
    names = rows[0].keys() if rows else ()
    return {name: [row[name] for row in rows] for name in names}


def _labels(dataset: Any, column: str, values: list[Any], argument: str) -> list[int]:
    """Convert labels to 0 or 1; class labels are converted by their names, not their numbers."""
    if hasattr(dataset, "features"):
        names = class_names(dataset).get(column)
        values = [names[v] if names and isinstance(v, int) and v >= 0 else v for v in values]
    plain = [value.item() if isinstance(value, np.generic) else value for value in values]
    return [checks.label(value, "label", f"{argument}, row {i}") for i, value in enumerate(plain)]


def _check_strings(values: Sequence[Any], where: str) -> None:
    for row, value in enumerate(values):
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{where.format(row)} must be a text; got {value!r}")
