"""Opens sources of training data: a file, a folder, a dataset, or a Hugging Face dataset id."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from moe_fast.data.file_formats import (
    FORMATS,
    Row,
    file_format,
    name_classes,
    read_rows,
    resolve_delimiter,
)
from moe_fast.data.lines import Refuse, check_file, refuse
from moe_fast.extras import require
from moe_fast.messages import reason


class Source(Protocol):
    """Rows that can be read from the start any number of times."""

    def __str__(self) -> str:
        """Return the name of the source for messages."""

    def rows(self, invalid: Refuse = refuse) -> Iterator[tuple[str, Row]]:
        """Yield (place, row); `invalid` is called with the error of a record that is unreadable."""


@dataclass(frozen=True)
class FileSource:
    """A JSONL, CSV or Parquet file; only CSV has a delimiter."""

    path: Path
    delimiter: str | None = None

    def __str__(self) -> str:
        return str(self.path)

    def rows(self, invalid: Refuse = refuse) -> Iterator[tuple[str, Row]]:
        """Yield (place, row); see `read_rows`."""
        return read_rows(self.path, delimiter=self.delimiter, invalid=invalid)


@dataclass(frozen=True)
class DatasetSource:
    """A dataset of the datasets library, loaded or streaming, or any other iterable of rows."""

    dataset: Any
    name: str

    def __str__(self) -> str:
        return self.name

    def rows(self, invalid: Refuse = refuse) -> Iterator[tuple[str, Row]]:
        """Yield (place, row), counted from 1, with class labels replaced by their names."""
        classes = class_names(self.dataset)
        for number, row in enumerate(self.dataset, start=1):
            where = f"{self.name}, row {number}"
            yield where, name_classes(row, classes, where)


AnySource: TypeAlias = "str | os.PathLike[str] | Source | Any"
"""What the readers accept: a path, a dataset id, or a ``Dataset`` or ``IterableDataset``."""


def class_names(dataset: Any) -> dict[str, list[str]]:
    """Return {column: the names of its classes} for the ``ClassLabel`` columns of a dataset."""
    features = getattr(dataset, "features", None)
    if not features:  # a stream may not know them, and plain rows have none
        return {}
    label = require_datasets().ClassLabel
    return {name: list(f.names) for name, f in features.items() if isinstance(f, label)}


def open_source(
    source: AnySource,
    *,
    split: str = "train",
    name: str | None = None,
    streaming: bool = False,
    delimiter: str | None = None,
) -> Source:
    """Find out what kind of source `source` is, check that it exists, and open it.

    Args:
        source: a file in one of `FORMATS`; a folder written by ``Dataset.save_to_disk`` or laid
            out as a dataset repository; as a str, the id of a Hugging Face dataset; a ``Dataset``
            or ``IterableDataset``; or the result of this function, which is returned unchanged.
        split: the split of a dataset; a file has no splits.
        name: the configuration of a dataset that has several.
        streaming: read a dataset's files directly, without converting them into a cache.
        delimiter: the character between the cells of a CSV file. By default it is a tab for
            ``.tsv``; for ``.csv`` it is guessed from the header.

    Raises:
        FileNotFoundError: there is nothing of that name, here or on the hub.
        ValueError: the format is unknown.
        ValueError: the split or configuration does not exist, or the source has none.
        ValueError: a delimiter is given for a source that is not CSV.
        ValueError: the dataset cannot be read.
        TypeError: `source` is none of these.
        ImportError: ``datasets`` is not installed.
    """
    if isinstance(source, FileSource | DatasetSource):
        return source
    if not isinstance(source, str | os.PathLike):
        return _given(source, split, name, delimiter)
    path = Path(source)
    is_file = isinstance(source, os.PathLike) or path.name.lower().endswith(FORMATS)
    if os.path.isdir(path) or not (is_file or os.path.exists(path)):
        _check_no_delimiter(delimiter, str(path))
        if os.path.isdir(path):
            return _open_folder(path, split, name, streaming)
        return _load(str(source), split, name, streaming)
    file_format(path)
    check_file(path)
    if split != "train" or name is not None:
        raise ValueError(
            f"split={split!r}, name={name!r}: {path} is a file, which has neither splits nor "
            "configurations"
        )
    return FileSource(path, resolve_delimiter(path, delimiter))


def first_row(source: Source, skip_invalid: bool = False) -> tuple[str, Row]:
    """Read (place, row) of the first row of a source, to find out its columns.

    Args:
        source: the source.
        skip_invalid: skip records that cannot be read.

    Raises:
        ValueError: there are no rows, or the source cannot be read.
    """
    for where, row in source.rows((lambda error: None) if skip_invalid else refuse):
        return where, row
    raise ValueError(f"{source}: no rows")


def split_domain(source: str) -> tuple[str | None, str]:
    """Split DOMAIN=FILE into (domain, path).

    The domain is None if there is no "=", or if a file exists whose own name has the "=".

    Raises:
        ValueError: there is nothing before or after the "=".
    """
    domain, equals, path = source.partition("=")
    if not equals or os.path.exists(source):
        return None, source
    if not domain.strip() or not path:
        raise ValueError(
            f"{source!r}: expected DOMAIN=FILE; the {'file' if domain else 'domain'} is missing"
        )
    return domain, path


def require_datasets() -> Any:
    """Import the datasets library.

    Raises:
        ImportError: it is not installed; the message names the extra.
    """
    return require("datasets", "train", "reading data")


def _given(source: Any, split: str, name: str | None, delimiter: str | None) -> Source:
    """Make a source of a dataset object; raise TypeError for any other object."""
    if not hasattr(source, "column_names") or isinstance(source, dict):
        kind = type(source).__name__
        splits = (
            f" with the splits {sorted(source)}; give one of them" if kind.endswith("Dict") else ""
        )
        raise TypeError(
            "source must be a path, the id of a dataset, a Dataset or an IterableDataset; got "
            f"{kind}{splits}"
        )
    if split != "train" or name is not None:
        raise ValueError(f"split={split!r}, name={name!r}: a dataset is one split already")
    _check_no_delimiter(delimiter, "a dataset")
    return DatasetSource(source, "the dataset")


def _check_no_delimiter(delimiter: str | None, source: str) -> None:
    if delimiter is not None:
        raise ValueError(f"delimiter={delimiter!r}: {source} is no CSV file")


def _open_folder(path: Path, split: str, name: str | None, streaming: bool) -> Source:
    saved = (path / "dataset_dict.json").exists() or (path / "state.json").exists()
    if not saved:
        return _load(str(path), split, name, streaming)
    if name is not None:
        raise ValueError(f"name={name!r}: {path} was saved without configurations")
    datasets = require_datasets()
    try:
        data = datasets.load_from_disk(str(path))
    except Exception as error:  # damaged folders raise many kinds of errors
        raise ValueError(f"{path}: not readable as a saved dataset ({reason(error)})") from error
    splits = data if isinstance(data, dict) else {str(data.split or split): data}
    if split not in splits:
        raise ValueError(f"{path}: no split {split!r}; splits present: {sorted(splits)}")
    return DatasetSource(splits[split], f"{path}, split {split}")


def _load(source: str, split: str, name: str | None, streaming: bool) -> Source:
    datasets = require_datasets()
    try:
        data = datasets.load_dataset(source, name, split=split, streaming=streaming)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"{source!r} is no file or folder with data here, and could not be loaded as the id "
            f"of a Hugging Face dataset: {error}"
        ) from error
    except Exception as error:  # damaged folders and invalid ids raise many kinds of errors
        cause = reason(error.__cause__ or error)
        raise ValueError(f"{source}: not readable ({cause})") from error
    return DatasetSource(data, f"{source}, split {split}")
