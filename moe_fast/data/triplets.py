"""Reads triplets: a pair and hard negatives of its first text, one column for each negative."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from moe_fast.data import checks
from moe_fast.data.columns import Columns, match_negatives, numbered
from moe_fast.data.file_formats import Row
from moe_fast.data.sources import AnySource, first_row, open_source
from moe_fast.data.tables import build_dataset
from moe_fast.messages import listed, shown

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


def read_triplets(
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
    """Read triplets: ``a``, ``b`` and ``negative_1`` .. ``negative_G``, the same G in every row.

    Args:
        source, keep, split, name, streaming, delimiter, skip_invalid: see `read_pairs`.
        columns: {our name: the source's name} where they differ, such as
            ``{"a": "title", "negative_1": "wrong"}``. ``anchor``, ``positive``, ``negative`` and
            other names in `moe_fast.data.columns.SPELLINGS` are found without it.

    Returns:
        A dataset with the columns ``a``, ``b``, ``negative_1`` .. ``negative_G`` (str), and
        ``domain`` (str) if the source has it. Other columns are left out, and named in one warning.

    Raises:
        FileNotFoundError, ValueError, TypeError, ImportError: as `read_pairs`.
        ValueError: there are no negatives, or they are not numbered 1 .. G.
        ValueError: a row has more negatives than the first.
        ValueError: a negative has the same text as ``b``.
    """
    columns = dict(columns or {})
    opened = open_source(source, split=split, name=name, streaming=streaming, delimiter=delimiter)
    where, row = first_row(opened, skip_invalid)
    others = {source: name for name, source in columns.items() if numbered(name) is None}
    negatives = match_negatives((name for name in row if name not in others), columns, where)
    if not negatives or list(negatives) != [f"negative_{g + 1}" for g in range(len(negatives))]:
        raise ValueError(
            f"{where}: negatives must be numbered negative_1, negative_2, ...; got "
            f"{listed(list(negatives))}; columns present: {listed(sorted(row))}"
        )
    required = dict.fromkeys(("a", "b", *negatives), checks.text)
    wanted = _Triplets(required, {"domain": checks.text}, {**columns, **negatives}, keep)
    return build_dataset(opened, wanted, streaming=streaming, skip_invalid=skip_invalid)


class _Triplets(Columns):
    @cached_property
    def negatives(self) -> list[str]:
        return [name for name in self.required if numbered(name) is not None]

    def read(self, row: Mapping[str, Any], where: str) -> Row:
        for name in row.keys() - self.reads:
            if (numbered(name) or 0) > len(self.negatives):
                raise ValueError(
                    f"{where}: column {shown(name)}, but the first row has {len(self.negatives)} "
                    "negatives; all rows must have as many"
                )
        triplet = super().read(row, where)
        for column in self.negatives:
            if triplet[column] == triplet["b"]:
                raise ValueError(f"{where}: {column} is the same text as b: {shown(triplet['b'])}")
        return triplet
