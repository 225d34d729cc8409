"""Training data of any layout, told by its columns."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moe_fast.data.flag_rows import read_flag_rows
from moe_fast.data.pairs import read_pairs
from moe_fast.data.sources import open_source
from moe_fast.data.triplets import read_triplets

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

# What tells a layout, the most demanding first: triplets are pairs with more columns.
LAYOUTS = (
    (("query", "pos"), read_flag_rows),
    (("a", "b", "negative_1"), read_triplets),
    (("a", "b"), read_pairs),
)


def read_training_data(
    source: str | os.PathLike[str],
    *,
    columns: Mapping[str, str] | None = None,
    keep: Sequence[str] = (),
    split: str = "train",
    name: str | None = None,
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """Read pairs, triplets or FlagEmbedding rows, whichever the first row's columns say.

    Args:
        source, columns, keep, split, name, streaming: see `read_pairs`.

    Returns:
        What `read_flag_rows` gives where there are ``query`` and ``pos``, `read_triplets` where
        there are ``a``, ``b`` and ``negative_1``, `read_pairs` where there are ``a`` and ``b``.

    Raises:
        FileNotFoundError, ValueError, ImportError: as these; and ValueError where none of the three
            fits.
    """
    options: dict[str, Any] = {"split": split, "name": name, "streaming": streaming}
    opened = open_source(source, **options)
    where, row = next(opened.rows(), ("", None))
    if row is None:
        raise ValueError(f"{opened}: no rows")
    ours = {*row, *(columns or {})}
    for required, read in LAYOUTS:
        if ours.issuperset(required):
            return read(source, columns=columns, keep=keep, **options)
    raise ValueError(
        f"{where}: columns must be a and b (pairs), a, b and negative_1, ... (triplets), or query, "
        f"pos and neg (FlagEmbedding rows); columns present: {sorted(row)}"
    )
