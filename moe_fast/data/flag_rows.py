"""Reads FlagEmbedding rows: a query with lists of positives and negatives.

A row is ``{"query": str, "pos": [str, ...], "neg": [str, ...]}``. Optional columns are ``"neg_q"``
(for each negative a query that it answers), ``"pos_scores"`` and ``"neg_scores"`` (the scores that
a teacher model gives to the positives and negatives) and ``"domain"``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from moe_fast.data import checks
from moe_fast.data.columns import Columns, Value
from moe_fast.data.file_formats import Row
from moe_fast.data.sources import AnySource, open_source
from moe_fast.data.tables import build_dataset
from moe_fast.messages import shown

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

REQUIRED: dict[str, Value] = {"query": checks.text, "pos": checks.texts}
OPTIONAL: dict[str, Value] = {
    "neg": partial(checks.texts, allow_none=True),
    "neg_q": partial(checks.texts, allow_none=True),
    "pos_scores": checks.numbers,
    "neg_scores": checks.numbers,
    "domain": checks.text,
}
PARALLEL = {"neg_q": "neg", "pos_scores": "pos", "neg_scores": "neg"}  # must be of equal length


def read_flag_rows(
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
    """Read FlagEmbedding rows, from a CSV file with at most one positive and one negative each.

    Args:
        source, columns, keep, split, name, streaming, delimiter, skip_invalid: see `read_pairs`.

    Returns:
        A dataset with the columns ``query`` (str), ``pos`` and ``neg`` (lists of str). If the
        source has them, also ``neg_q`` (list of str, as long as ``neg``), ``pos_scores`` and
        ``neg_scores`` (lists of float64, as long as ``pos`` and ``neg``) and ``domain`` (str).
        ``neg`` is an empty list in rows without negatives, for which they can be mined. A text in
        place of a list counts as a list of one text.

    Raises:
        FileNotFoundError, ValueError, TypeError, ImportError: as `read_pairs`.
        ValueError: ``pos`` is empty.
        ValueError: ``neg_q`` or the scores are not as long as the texts they belong to.
        ValueError: a score is not finite, or ``pos_scores`` or ``neg_scores`` is there alone.
        ValueError: a text is both in ``pos`` and in ``neg`` of a row.
    """
    wanted = FlagRowColumns(REQUIRED, OPTIONAL, columns or {}, keep)
    opened = open_source(source, split=split, name=name, streaming=streaming, delimiter=delimiter)
    return build_dataset(opened, wanted, streaming=streaming, skip_invalid=skip_invalid)


class FlagRowColumns(Columns):
    """The columns of FlagEmbedding rows, checked against each other."""

    def read(self, row: Mapping[str, Any], where: str) -> Row:
        """Check the columns of a row and their lengths; a missing ``neg`` becomes an empty list.

        Raises:
            ValueError: as `read_flag_rows`; the error names the place.
        """
        read = super().read(row, where)
        read.setdefault("neg", [])
        for name, other in PARALLEL.items():
            if name in read and len(read[name]) != len(read[other]):
                raise ValueError(
                    f"{where}: {name} has {len(read[name])} entries for {len(read[other])} of "
                    f"{other}"
                )
        if ("pos_scores" in read) != ("neg_scores" in read):
            raise ValueError(f"{where}: pos_scores and neg_scores must be given together")
        if both := set(read["pos"]).intersection(read["neg"]):
            raise ValueError(f"{where}: a text is in pos and in neg: {shown(min(both))}")
        return read
