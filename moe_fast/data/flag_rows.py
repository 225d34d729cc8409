"""Reads FlagEmbedding rows: a query with lists of positives and negatives.

``{"query": str, "pos": [str, ...], "neg": [str, ...]}``, and optionally ``"neg_q"`` (for each
negative a query that it does answer), ``"pos_scores"`` and ``"neg_scores"`` (a teacher's score of
each) and ``"domain"``.
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
    """Read FlagEmbedding rows; a CSV file holds one positive and one negative each at the most.

    Args:
        source, columns, keep, split, name, streaming, delimiter, skip_invalid: see `read_pairs`.

    Returns:
        A dataset with the columns ``query`` (str), ``pos`` and ``neg`` (lists of str), and where
        the source has them ``neg_q`` (list of str, as long as ``neg``), ``pos_scores`` and
        ``neg_scores`` (lists of float64, as long as ``pos`` and ``neg``) and ``domain`` (str).
        ``neg`` is the empty list where a row has none: such rows wait to be mined. A text in place
        of a list is a list of one.

    Raises:
        FileNotFoundError, ValueError, ImportError: as `read_pairs`; and ValueError for an empty
            ``pos``, lists of different lengths, scores that are not finite or that only one of
            ``pos`` and ``neg`` has, and a text that is in ``pos`` and in ``neg`` of one row.
    """
    wanted = FlagRowColumns(REQUIRED, OPTIONAL, columns or {}, keep)
    opened = open_source(source, split=split, name=name, streaming=streaming, delimiter=delimiter)
    return build_dataset(opened, wanted, streaming=streaming, skip_invalid=skip_invalid)


class FlagRowColumns(Columns):
    """Columns, and what they must be to each other."""

    def read(self, row: Mapping[str, Any], where: str) -> Row:
        """The row's columns, checked; ValueError with the place otherwise."""
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
