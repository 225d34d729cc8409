"""Reads training data as pairs, triplets or FlagEmbedding rows, depending on its columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moe_fast.data import flag_rows
from moe_fast.data.columns import SPELLINGS, match_columns, match_negatives
from moe_fast.data.file_formats import Row
from moe_fast.data.flag_rows import read_flag_rows
from moe_fast.data.pairs import read_pairs
from moe_fast.data.sources import AnySource, first_row, open_source
from moe_fast.data.triplets import read_triplets
from moe_fast.messages import listed, simplified

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

FLAG_NAMES = {*flag_rows.REQUIRED, *flag_rows.OPTIONAL} - {"domain"}  # which pairs do not have


def read_training_data(
    source: AnySource,
    *,
    columns: Mapping[str, str] | None = None,
    keep: Sequence[str] = (),
    split: str = "train",
    name: str | None = None,
    streaming: bool = False,
    delimiter: str | None = None,
    skip_invalid: bool = False,
) -> Dataset | IterableDataset:
    """Read pairs, triplets or FlagEmbedding rows, depending on the columns of the first row.

    Args:
        source, columns, keep, split, name, streaming, delimiter, skip_invalid: see `read_pairs`.

    Returns:
        The result of `read_flag_rows` if there is a column ``pos``, or a pair with a list of
        positives or negatives; of `read_triplets` if there are ``a``, ``b`` and a numbered negative
        such as ``negative_1``; otherwise of `read_pairs`. The columns may have other names, see
        `moe_fast.data.columns.SPELLINGS`.

    Raises:
        FileNotFoundError, ValueError, TypeError, ImportError: as these functions.
        ValueError: the columns fit none of the three.
    """
    opened = open_source(source, split=split, name=name, streaming=streaming, delimiter=delimiter)
    where, row = first_row(opened, skip_invalid)
    read, columns = _layout(row, dict(columns or {}), where)
    return read(opened, columns=columns, keep=keep, streaming=streaming, skip_invalid=skip_invalid)


def _layout(
    row: Row, columns: dict[str, str], where: str
) -> tuple[Callable[..., Any], dict[str, str]]:
    """Return the reader for the layout of the first row, and its argument `columns`.

    Raises:
        ValueError: the columns fit no reader.
    """
    pair_is_named = "a" in columns or "b" in columns
    if FLAG_NAMES & columns.keys() or ("pos" in row and not pair_is_named):
        return read_flag_rows, columns
    pair = match_columns(
        row, ("a", "b"), {ours: its for ours, its in columns.items() if ours in ("a", "b")}, where
    )
    if len(pair) < 2:
        raise ValueError(
            f"{where}: columns must be a and b (pairs), a, b and negative_1, ... (triplets), or "
            "query, pos and neg (FlagEmbedding rows), or as sentence-transformers calls them; "
            'columns={"a": ..., "b": ...} or --columns a=...,b=... says which they are; columns '
            f"present: {listed(sorted(row))}"
        )
    free = [name for name in row if name not in columns.values() and name not in pair.values()]
    lists = [name for name in (pair["b"], *free) if isinstance(row.get(name), list)]
    if any(name == pair["b"] or simplified(name) in ("neg", *SPELLINGS["neg"]) for name in lists):
        others = {ours: its for ours, its in columns.items() if ours not in pair}
        return read_flag_rows, {"query": pair["a"], "pos": pair["b"], **others}
    return read_triplets if match_negatives(free, columns, where) else read_pairs, columns
