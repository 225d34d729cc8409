"""Where training data comes from: a file, a folder, or a Hugging Face dataset id."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from moe_fast.data.rows import FORMATS, Row, file_format, read_rows


class Source(Protocol):
    """Something that can be read from its start any number of times."""

    def __str__(self) -> str:
        """As a message names it."""

    def rows(self) -> Iterator[tuple[str, Row]]:
        """Yield (place, row)."""


@dataclass(frozen=True)
class FileSource:
    """A JSONL, CSV or Parquet file."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def rows(self) -> Iterator[tuple[str, Row]]:
        """Yield (place, row); see `read_rows`."""
        return read_rows(self.path)


@dataclass(frozen=True)
class DatasetSource:
    """A dataset of the datasets library, already loaded or streaming."""

    dataset: Any
    name: str

    def __str__(self) -> str:
        return self.name

    def rows(self) -> Iterator[tuple[str, Row]]:
        """Yield (place, row), rows counted from 1."""
        for number, row in enumerate(self.dataset, start=1):
            yield f"{self.name}, row {number}", row


def open_source(
    source: str | os.PathLike[str],
    *,
    split: str = "train",
    name: str | None = None,
    streaming: bool = False,
) -> Source:
    """Find out what `source` is, and that it is there.

    Args:
        source: a file in one of `FORMATS`; a folder written by ``Dataset.save_to_disk`` or laid
            out as a dataset repository; or, as a str, the id of a Hugging Face dataset.
        split: of a dataset; a file has none.
        name: of a dataset's configuration, where it has several.
        streaming: read a dataset's files as they are, without converting them into a cache.

    Raises:
        FileNotFoundError: nothing of that name, here or on the hub.
        ValueError: unknown format; a split or configuration that is not there or that is asked of
            a file; a dataset that cannot be read.
        ImportError: ``datasets`` is not installed.
    """
    path = Path(source)
    if path.is_dir():
        return _open_folder(path, split, name, streaming)
    if path.exists() or isinstance(source, os.PathLike) or path.name.lower().endswith(FORMATS):
        file_format(path)
        if not path.exists():
            raise FileNotFoundError(f"no such file: {path}")
        if split != "train" or name is not None:
            raise ValueError(
                f"split={split!r}, name={name!r}: {path} is a file, which has neither splits nor "
                "configurations"
            )
        return FileSource(path)
    return _load(source, split, name, streaming)


def split_domain(source: str) -> tuple[str | None, str]:
    """(domain, path) of DOMAIN=FILE; a file whose own name has a "=" is taken as it is.

    Raises:
        ValueError: nothing before or behind the "=".
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
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            "reading data needs datasets, which is not installed: pip install 'moe-fast[train]'"
        ) from error
    return datasets


def _open_folder(path: Path, split: str, name: str | None, streaming: bool) -> Source:
    saved = (path / "dataset_dict.json").exists() or (path / "state.json").exists()
    if not saved:
        return _load(str(path), split, name, streaming)
    if name is not None:
        raise ValueError(f"name={name!r}: {path} was saved without configurations")
    data = require_datasets().load_from_disk(str(path))
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
    except datasets.exceptions.DatasetGenerationError as error:
        raise ValueError(f"{source}: not readable ({error.__cause__ or error})") from error
    return DatasetSource(data, f"{source}, split {split}")
