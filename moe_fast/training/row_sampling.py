"""Samples passages of a row as a function of the seed, the epoch and the row alone.

They depend on nothing else: not on the order of the batches, the number of workers or processes,
or on whether the run was interrupted. A row is known by its texts, not by its number, so that
streamed, filtered and joined datasets need no numbering; equal rows are drawn alike.
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
    """Tells whether these are the columns of FlagEmbedding rows: a query and lists of passages."""
    return QUERY in columns and POSITIVES in columns and NEGATIVES in columns


def flag_row_columns(num_negatives: int, negative_queries: bool) -> list[str]:
    """Returns the text columns that :func:`draw_passages` makes, in order."""
    numbers = range(1, num_negatives + 1)
    columns = [QUERY, "positive", *(f"negative_{g}" for g in numbers)]
    if negative_queries:
        columns += [f"negative_query_{g}" for g in numbers]
    return columns


def draw_passages(
    row: Mapping[str, Any], num_negatives: int, seed: int = 0, epoch: int | None = None
) -> dict[str, Any]:
    """Samples one positive and ``num_negatives`` negatives of a FlagEmbedding row.

    Args:
        row: ``query`` (str), ``pos`` and ``neg`` (lists of str); optionally ``neg_q`` (for each
            negative a query that it answers), ``pos_scores`` and ``neg_scores`` (a teacher's).
        num_negatives: G >= 0. Where a row has fewer, each is taken equally often, give or take
            one; FlagEmbedding repeats them as well.
        seed, epoch: of the draw; without an epoch (evaluation) the first ones are taken.

    Returns:
        ``query``, ``positive``, ``negative_1 .. negative_G``; with ``neg_q`` also
        ``negative_query_1 .. negative_query_G``, each beside its negative; with scores ``label``,
        the 1 + G scores of the positive and the negatives. Other columns stay.

    Raises:
        ValueError: no positive, no negative where some are wanted, or lists that do not match.
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
    """Tells whether this epoch takes the pair (a, b) as (b, a), as it does for half of the rows."""
    return bool(stable_hash(repr((seed, epoch, "swap", first, second))) & 1)


def check_flag_row(lengths: Mapping[str, int | None], num_negatives: int, place: str) -> None:
    """Raises for lists of passages that are empty or of lengths that do not fit.

    Args:
        lengths: of the row's list columns; ``None`` for a missing list.
        num_negatives: how many negatives are to be drawn.
        place: what the message calls the row.

    Raises:
        ValueError: naming the columns and their lengths.
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
    """Samples ``wanted`` of ``available`` indices, without repetition as long as possible."""
    if not wanted:
        return []
    rounds, rest = divmod(wanted, available)
    last = rng.sample(range(available), rest) if rng else list(range(rest))
    return rounds * list(range(available)) + last
