"""Lists the row groups of a corpus of Parquet files, and embeds one of them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_fast.data.texts import TextRow, read_texts_of_row_group
from moe_fast.distributed.embedder import Embedder
from moe_fast.distributed.parts import Part, PartFolder
from moe_fast.encoding.lengths import counted_truncation
from moe_fast.inference.precision import StoredPrecision, ranges_of
from moe_fast.messages import listed
from moe_fast.ops.backends import use_backend

_MOST_DEATHS = 5  # of workers at one row group


@dataclass(frozen=True)
class RowGroup(Part):
    """A row group of a Parquet file, with rows in it.

    Attributes:
        path: the file.
        group: the number of the row group in its file, from 0.
        first_row: how many rows of the file come before it.
        first_number: how many rows of the corpus come before it.
    """

    path: str
    group: int
    first_row: int
    first_number: int


@dataclass(frozen=True)
class Reading:
    """Which columns are read, as in :func:`moe_fast.data.read_texts`."""

    columns: tuple[str, ...] = ("text",)
    domain_column: str | None = None
    id_column: str | None = None


def list_row_groups(source: Path, reading: Reading) -> tuple[list[RowGroup], str]:
    """List the row groups of a Parquet file, or of all in a folder and its subfolders.

    The files are taken in the order of their paths. Those whose names, or folders, begin with "."
    or "_" are left out, as Spark and Arrow do.

    Returns:
        The row groups, and a hash of the files' paths, sizes, times and rows.

    Raises:
        FileNotFoundError: there is no such file or folder, or no Parquet file in it.
        ValueError: a file is not Parquet or lacks a column, or there are no rows.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    found: list[RowGroup] = []
    files = []
    rows = 0
    for path in _files(source):
        try:
            with pq.ParquetFile(path) as file:
                names, metadata = file.schema_arrow.names, file.metadata
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path}: not readable as Parquet ({error})") from error
        _check_columns(path, names, reading)
        about, first_row = path.stat(), 0
        for group in range(metadata.num_row_groups):
            count = metadata.row_group(group).num_rows
            if count:
                found.append(RowGroup(len(found), count, str(path), group, first_row, rows))
            first_row += count
            rows += count
        files.append([str(path.relative_to(source)), about.st_size, about.st_mtime_ns, first_row])
    if not found:
        raise ValueError(f"{source}: no texts in this corpus")
    return found, hashlib.sha256(json.dumps(files).encode()).hexdigest()


def _files(source: Path) -> list[Path]:
    if source.is_dir():
        paths = sorted(source.rglob("*.parquet"))
        files = [p for p in paths if p.is_file() and not _is_hidden(p.relative_to(source))]
        if not files:
            raise FileNotFoundError(f"the folder {source} has no file *.parquet")
        return files
    if not source.is_file():
        raise FileNotFoundError(f"there is no file or folder {source}")
    if source.suffix != ".parquet":
        raise ValueError(
            f"{source}: a cluster reads .parquet files, or a folder of them; got "
            f"{source.suffix or 'a name without a suffix'!r}. --engine local reads other formats."
        )
    return [source]


def _is_hidden(path: Path) -> bool:
    return any(part.startswith((".", "_")) for part in path.parts)


def _check_columns(path: Path, names: list[str], reading: Reading) -> None:
    wanted = [*reading.columns, reading.domain_column, reading.id_column]
    lacking = [name for name in wanted if name is not None and name not in names]
    if lacking:
        raise ValueError(
            f"{path}: there is no column {listed(lacking)}; columns present: {listed(names)}"
        )


@dataclass(frozen=True)
class EmbedJob:
    """Embeds row groups and writes the vectors of each to a file; picklable.

    Attributes:
        embedder: computes the vectors.
        reading: the columns to read.
        folder: where the files are written.
        with_ranges: whether each file keeps the ranges of its vectors.
        chunk_size: the number of texts that are tokenized together.
        backend: the backend of the operations, see :func:`moe_fast.use_backend`.
    """

    embedder: Embedder
    reading: Reading
    folder: PartFolder
    with_ranges: bool
    chunk_size: int
    backend: str

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """Embed a row group, given as a dict, unless its file is there.

        Returns:
            ``number`` and ``rows`` of the row group; ``long`` and ``limit``, how many texts had
            more tokens than how many; ``error``, what is wrong with a text, else an empty string.
        """
        group = RowGroup(**item)
        result = {"number": group.number, "rows": group.rows, "long": 0, "limit": 0, "error": ""}
        if self.folder.holds(group):  # a worker died after it had written the file
            return result
        if self.folder.begin(group) > _MOST_DEATHS:
            error = f"{group.path}, row group {group.group}: {_MOST_DEATHS} workers died at it"
            return {**result, "error": f"{error} (out of memory? smaller row groups need less)"}
        try:
            with counted_truncation() as truncated, use_backend(self.backend):
                ids, vectors = self._vectors(group)
        except ValueError as error:
            return {**result, "error": str(error)}
        ranges = ranges_of([vectors]) if self.with_ranges else None
        stored = StoredPrecision(self.embedder.precision, vectors.shape[1])
        self.folder.write(group, ids, vectors, stored, ranges)
        return {**result, "long": truncated.num_long, "limit": truncated.limit or 0}

    def _vectors(self, group: RowGroup) -> tuple[list[str], np.ndarray]:
        rows = list(
            read_texts_of_row_group(
                group.path,
                group.group,
                first_row=group.first_row,
                first_number=group.first_number,
                **asdict(self.reading),
            )
        )
        found = []
        for start in range(0, len(rows), self.chunk_size):
            chunk = rows[start : start + self.chunk_size]
            try:
                found.append(self._embed(chunk))
            except ValueError as error:
                raise ValueError(
                    f"in the {len(chunk)} texts from {chunk[0].where}: {error}"
                ) from error
        return [row.id for row in rows], np.concatenate(found)

    def _embed(self, rows: list[TextRow]) -> np.ndarray:
        texts = [row.text for row in rows]
        if self.reading.domain_column is None:
            return self.embedder.embed(texts, self.embedder.domain)
        return self.embedder.embed(texts, [row.domain for row in rows])


@dataclass(frozen=True)
class QuantizeJob:
    """Quantises the files of row groups with the ranges of all vectors; picklable.

    Attributes:
        source: the folder of float32 files.
        folder: where the quantised files are written.
        stored: the precision, with the ranges.
    """

    source: PartFolder
    folder: PartFolder
    stored: StoredPrecision

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """Quantise the file of a row group, given as a dict, unless it is there.

        Returns:
            ``number`` and ``rows`` of the row group.
        """
        group = RowGroup(**item)
        if not self.folder.holds(group):
            ids, vectors = self.source.read(group)
            self.folder.write(group, ids, vectors, self.stored, None)
        return {"number": group.number, "rows": group.rows}
