"""From checked rows to a dataset: in memory, or streaming."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from moe_fast.data.rows import Row
from moe_fast.data.sources import Source, require_datasets

if TYPE_CHECKING:
    from datasets import Dataset, Features, IterableDataset

# A row of the file and its place in, the wanted columns out; ValueError with the place if it cannot
# be. Known to datasets' streaming, so it must be picklable.
Check = Callable[[Mapping[str, Any], str], Row]

LIST_VALUES = {"pos_scores": "float64", "neg_scores": "float64"}  # other lists hold text
BATCH_ROWS = 1000  # small enough that a batch of long texts stays below Arrow's 2 GB per column


def build_dataset(source: Source, check: Check, *, streaming: bool) -> Dataset | IterableDataset:
    """The rows of a source, every one checked.

    In memory the rows become Arrow columns batch by batch: about the size of the texts, without a
    copy in a cache that could outlive a change of the file. Streaming holds a few rows at a time;
    the first is checked at once, the others as they are read.

    Raises:
        ValueError: from `check`; a row with other columns or types than the first; no rows.
    """
    rows = checked_rows(source, check)
    if not streaming:
        return dataset_from_rows(rows)
    features = features_of(next(rows))
    return require_datasets().IterableDataset.from_generator(
        checked_rows, features=features, gen_kwargs={"source": source, "check": check}
    )


def checked_rows(source: Source, check: Check) -> Iterator[Row]:
    """Yield `check` of every row, all with the columns and types of the first."""
    first: dict[str, type] = {}
    for where, row in source.rows():
        checked = check(row, where)
        types = {name: type(value) for name, value in checked.items()}
        first = first or types
        if types != first:
            raise ValueError(f"{where}: {_difference(types, first)}")
        yield checked
    if not first:
        raise ValueError(f"{source}: no rows")


def dataset_from_rows(rows: Iterable[Row]) -> Dataset:
    """A dataset in memory, from rows with the same columns, of which there must be one.

    The rows are consumed once, `BATCH_ROWS` at a time.
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
    """The types of a row's columns: text, truth values, int64, float64 and lists of these."""
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
            f"columns {sorted(types)}, but the rows before have {sorted(first)}; an optional "
            "column must be in every row or in none"
        )
    name = next(name for name in first if types[name] is not first[name])
    return (
        f"{name} is of type {types[name].__name__}, but {first[name].__name__} in the rows before"
    )
