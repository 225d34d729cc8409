"""Samples passages of a row as a function of the seed, the epoch and the row alone.

The samples do not depend on the order of batches, the number of workers or processes, or on
interruptions. A row is identified by its texts and not by its number, so that streamed, filtered
and joined datasets need no numbering. Equal rows get equal samples.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from moe_fast.data.flag_rows import PARALLEL
from moe_fast.training.hashing import stable_hash

QUERY, POSITIVES, NEGATIVES = "query", "pos", "neg"
NEGATIVE_QUERIES, POSITIVE_SCORES, NEGATIVE_SCORES = "neg_q", "pos_scores", "neg_scores"
FLAG_COLUMNS = (
    QUERY,
    POSITIVES,
    NEGATIVES,
    NEGATIVE_QUERIES,
    POSITIVE_SCORES,
    NEGATIVE_SCORES,
)


def has_flag_columns(columns: Sequence[str] | Mapping[str, Any]) -> bool:
    """Return whether these are columns of FlagEmbedding rows: a query and lists of passages."""
    return QUERY in columns and POSITIVES in columns and NEGATIVES in columns


def flag_row_columns(num_negatives: int, negative_queries: bool) -> list[str]:
    """Return the text columns that :func:`draw_passages` makes, in order."""
    numbers = range(1, num_negatives + 1)
    columns = [QUERY, "positive", *(f"negative_{g}" for g in numbers)]
    if negative_queries:
        columns += [f"negative_query_{g}" for g in numbers]
    return columns


def draw_passages(
    row: Mapping[str, Any], num_negatives: int, seed: int = 0, epoch: int | None = None
) -> dict[str, Any]:
    """Sample one positive and ``num_negatives`` negatives of a FlagEmbedding row.

    Args:
        row: ``query`` (str), ``pos`` and ``neg`` (lists of str); optionally ``neg_q`` (for each
            negative a query that it answers), ``pos_scores`` and ``neg_scores`` (the scores that a
            teacher model gives).
        num_negatives: the number of negatives G >= 0. If a row has fewer, they are repeated, all
            equally often or one time more; FlagEmbedding repeats them as well.
        seed, epoch: they determine the draw. Without an epoch, for evaluation, the first passages
            are taken.

    Returns:
        ``query``, ``positive``, ``negative_1 .. negative_G``. With ``neg_q`` there are also
        ``negative_query_1 .. negative_query_G``, the queries of these negatives; with scores there
        is ``label``, the 1 + G scores of the positive and the negatives. Columns that are not
        FlagEmbedding's are kept.

    Raises:
        ValueError: as :func:`check_flag_row`.
    """
    lengths = {name: _length(row[name]) for name in FLAG_COLUMNS[1:] if name in row}
    check_flag_row(lengths, num_negatives, f"the row of query {row[QUERY]!r}")
    positives, negatives = row[POSITIVES], row[NEGATIVES]
    rng = None
    if epoch is not None:
        rng = random.Random(stable_hash(repr((seed, epoch, row[QUERY], list(positives)))))
    positive = rng.randrange(len(positives)) if rng else 0
    chosen = _choose(len(negatives), num_negatives, rng)

    drawn = {QUERY: row[QUERY], "positive": positives[positive]}
    drawn |= {f"negative_{g}": negatives[j] for g, j in enumerate(chosen, 1)}
    if NEGATIVE_QUERIES in row:
        queries = row[NEGATIVE_QUERIES]
        drawn |= {f"negative_query_{g}": queries[j] for g, j in enumerate(chosen, 1)}
    if POSITIVE_SCORES in row:
        scores = [row[NEGATIVE_SCORES][j] for j in chosen]
        drawn["label"] = [float(score) for score in (row[POSITIVE_SCORES][positive], *scores)]
    return drawn | {name: value for name, value in row.items() if name not in FLAG_COLUMNS}


def is_swapped(first: str, second: str, seed: int, epoch: int) -> bool:
    """Return whether this epoch uses the pair (a, b) as (b, a), as it does for half of the rows."""
    return bool(stable_hash(repr((seed, epoch, "swap", first, second))) & 1)


def check_flag_row(lengths: Mapping[str, int | None], num_negatives: int, place: str) -> None:
    """Raise an error if passages cannot be drawn from the lists of a FlagEmbedding row.

    Args:
        lengths: {list column: length of its list}; ``None`` for a missing list.
        num_negatives: the number of negatives to draw.
        place: the name of the row in the error message.

    Raises:
        ValueError: only one of ``pos_scores`` and ``neg_scores`` is there.
        ValueError: a list is missing, ``pos`` is empty, or ``neg`` is empty and negatives are to
            be drawn.
        ValueError: ``neg_q`` or the scores are not as long as the list of their passages.
    """
    if (POSITIVE_SCORES in lengths) != (NEGATIVE_SCORES in lengths):
        raise ValueError(
            f"{place}: {POSITIVE_SCORES!r} and {NEGATIVE_SCORES!r} go together; one is missing."
        )
    absent = [name for name, length in lengths.items() if length is None]
    if absent:
        raise ValueError(f"{place}: {absent} must each hold a list; they hold nothing.")
    for name, wanted in ((POSITIVES, 1), (NEGATIVES, num_negatives)):
        if wanted and not lengths[name]:
            raise ValueError(f"{place}: {name!r} is empty, nothing can be drawn from it.")
    for name, of in PARALLEL.items():
        if name in lengths and lengths[name] != lengths[of]:
            raise ValueError(
                f"{place}: {name!r} must have one entry for each of {of!r}; it has "
                f"{lengths[name]} for {lengths[of]}."
            )


def _length(values: Any) -> int | None:
    return None if values is None else len(values)


def _choose(available: int, wanted: int, rng: random.Random | None) -> list[int]:
    """Sample ``wanted`` of ``available`` indices; none is repeated before all were taken."""
    if not wanted:
        return []
    rounds, rest = divmod(wanted, available)
    last = rng.sample(range(available), rest) if rng else list(range(rest))
    return rounds * list(range(available)) + last
