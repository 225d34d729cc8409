"""Builds a dataset of checked rows, in memory or streaming."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moe_fast.data.columns import Columns, ignored_note
from moe_fast.data.file_formats import Row
from moe_fast.data.lines import Refuse, refuse
from moe_fast.data.sources import Source, first_row, require_datasets
from moe_fast.messages import listed

if TYPE_CHECKING:
    from datasets import Dataset, Features, IterableDataset

logger = logging.getLogger(__name__)
LIST_VALUES = {"pos_scores": "float64", "neg_scores": "float64"}  # other lists hold text
BATCH_ROWS = 1000  # small enough that a batch of long texts stays below Arrow's 2 GB per column
SHOWN_PLACES = 10


def build_dataset(
    source: Source, wanted: Columns, *, streaming: bool = False, skip_invalid: bool = False
) -> Dataset | IterableDataset:
    """Make a dataset of the rows of a source, and check every row.

    The columns are found among those of the first row. A dataset in memory takes about the size of
    the texts as Arrow columns. There is no copy in a cache, which could be used after the file has
    changed. A streaming dataset holds a few rows at a time; the first row is checked at once, the
    others while they are read.

    Columns that are not read are named in one warning, and rows that were skipped in one at the
    end.

    Raises:
        ValueError: a row fails a check of `wanted`, or its columns or types differ from the first.
        ValueError: there are no rows.
    """
    where, row = first_row(source, skip_invalid)
    check = wanted.matched(row, where)
    if not streaming:
        return dataset_from_rows(checked_rows(source, check, skip_invalid))
    ignored = [name for name in row if name not in check.reads]
    _say_ignored(source, check, ignored)
    options: dict[str, Any] = {"source": source, "check": check, "skip_invalid": skip_invalid}
    options["said"] = frozenset(ignored)
    features = features_of(next(checked_rows(**options)))
    return require_datasets().IterableDataset.from_generator(
        checked_rows, features=features, gen_kwargs=options
    )


def checked_rows(
    source: Source,
    check: Columns,
    skip_invalid: bool = False,
    said: Collection[str] = frozenset(),
) -> Iterator[Row]:
    """Yield the checked columns of every row; all rows have the same columns and types.

    Args:
        source: the source of the rows.
        check: the columns to read.
        skip_invalid: leave out invalid rows, and warn how many there were and what is wrong with
            the first ten. By default the first invalid row is an error. Rows must have the columns
            and types of the first row; with `skip_invalid` those of the row with the most columns
            among the first `BATCH_ROWS`.
        said: columns that are not read, and that a warning has named before.

    Raises:
        ValueError: a row is invalid, unless such rows are skipped.
        ValueError: there are no rows, or no valid ones.
    """
    skipped = Skipped(str(source))
    invalid = skipped if skip_invalid else refuse
    rows = _read(source, check, invalid, said)
    head = list(itertools.islice(rows, BATCH_ROWS if skip_invalid else 1))
    if not head:
        raise ValueError(f"{source}: {skipped.summary() if skipped.count else 'no rows'}")
    like = _types(max((row for _, row in head), key=len))
    for where, row in itertools.chain(head, rows):
        if (types := _types(row)) == like:
            yield row
        else:
            invalid(ValueError(f"{where}: {_difference(types, like)}"))
    if skipped.count:
        logger.warning("%s: %s", source, skipped.summary())


def placed_rows(source: Source, check: Columns, skip_invalid: bool) -> Iterator[tuple[str, Row]]:
    """Yield (place, checked row) of every row; the columns may differ from row to row.

    Raises:
        ValueError: a row is invalid, unless such rows are skipped.
        ValueError: there are no rows.
    """
    skipped = Skipped(str(source))
    place = ""
    for place, row in _read(source, check, skipped if skip_invalid else refuse, ()):
        yield place, row
    if not place:
        raise ValueError(f"{source}: {skipped.summary() if skipped.count else 'no rows'}")
    if skipped.count:
        logger.warning("%s: %s", source, skipped.summary())


@dataclass
class Skipped:
    """Counts the invalid rows of a source, and keeps the errors of the first ones.

    Attributes:
        source: the name of the source; it is removed where an error begins with it.
        count: the number of invalid rows.
        first: the errors of the first `SHOWN_PLACES` of them.
    """

    source: str
    count: int = 0
    first: list[str] = field(default_factory=list)

    def __call__(self, error: ValueError) -> None:
        """Count a row, given its error."""
        self.count += 1
        if self.count <= SHOWN_PLACES:
            self.first.append(str(error).removeprefix(f"{self.source}, "))

    def summary(self) -> str:
        """Say how many rows were skipped, and what is wrong with the first ones."""
        more = ", the first" if self.count > SHOWN_PLACES else ""
        return f"{self.count:,} invalid rows skipped{more}: {'; '.join(self.first)}"


def _read(
    source: Source, check: Columns, invalid: Refuse, said: Collection[str]
) -> Iterator[tuple[str, Row]]:
    """Yield (place, checked row) of each valid row; warn at the end of columns that are not read.

    Columns in `said` were named in an earlier warning, and are not named again.
    """
    reads = {*check.reads, *said}
    ignored: dict[str, None] = {}
    for where, row in source.rows(invalid):
        if not row.keys() <= reads:
            ignored.update(dict.fromkeys(name for name in row if name not in reads))
        try:
            checked = check.read(row, where)
        except ValueError as error:
            invalid(error)
        else:
            yield where, checked
    _say_ignored(source, check, ignored)


def _say_ignored(source: Source, check: Columns, ignored: Collection[str]) -> None:
    if ignored:
        logger.warning("%s: %s", source, ignored_note(ignored, check.known))


def _types(row: Row) -> dict[str, type]:
    return {name: type(value) for name, value in row.items()}


def dataset_from_rows(rows: Iterable[Row]) -> Dataset:
    """Make a dataset in memory from rows with the same columns; there must be at least one row.

    `rows` may be an iterator; it is consumed once, `BATCH_ROWS` rows at a time.
    """
    datasets = require_datasets()
    import pyarrow as pa

    batches: list[pa.RecordBatch] = []
    rows = iter(rows)
    schema = None
    while batch := list(itertools.islice(rows, BATCH_ROWS)):
        schema = schema or features_of(batch[0]).arrow_schema
        batches.append(pa.RecordBatch.from_pylist(batch, schema=schema))
    return datasets.Dataset(datasets.table.InMemoryTable(pa.Table.from_batches(batches)))


def features_of(row: Row) -> Features:
    """Return the types of a row's columns: string, bool, int64, float64, or a list.

    A list holds float64 if its column is in `LIST_VALUES`, otherwise strings.
    """
    datasets = require_datasets()
    names = {str: "string", bool: "bool", int: "int64", float: "float64"}
    return datasets.Features(
        {
            name: datasets.List(datasets.Value(LIST_VALUES.get(name, "string")))
            if isinstance(value, list)
            else datasets.Value(names[type(value)])
            for name, value in row.items()
        }
    )


def _difference(types: Mapping[str, type], first: Mapping[str, type]) -> str:
    if types.keys() != first.keys():
        return (
            f"columns {listed(sorted(types))}, but the rows before have {listed(sorted(first))}; "
            "an optional column must be in every row or in none, and null is not there"
        )
    name = next(name for name in first if types[name] is not first[name])
    return (
        f"{name} is of type {types[name].__name__}, but {first[name].__name__} in the rows before"
    )
