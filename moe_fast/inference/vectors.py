"""Files of vectors, read and written in pieces: ``.npy``, and Parquet, which has ids as well."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_fast.files import atomic_write

SUFFIXES = (".npy", ".parquet")
Pieces = Iterable[tuple[list[str], NDArray[np.floating]]]
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Vectors:
    """A file of vectors.

    Attributes:
        path: the file.
        rows, dimension: its shape [N, d].
        pieces: call it to iterate over (ids, float array [n, d]) from the start.
    """

    path: Path
    rows: int
    dimension: int
    pieces: Callable[[], Iterator[tuple[list[str], NDArray[np.floating]]]]


def check_vector_format(path: Path) -> None:
    """Raise unless the name of `path` says a format that vectors can have."""
    if path.suffix not in SUFFIXES:
        raise ValueError(
            f"{path}: vectors are kept in files of the formats {' and '.join(SUFFIXES)}; "
            f"got {path.suffix or 'a name without a suffix'!r}"
        )


def write_vectors(path: Path, pieces: Pieces, shape: tuple[int, int]) -> None:
    """Write [N, d] vectors piece by piece; the file appears when it is whole.

    Args:
        path: ``.npy`` or ``.parquet``.
        pieces: (n ids, [n, d]), all of one dtype; the ids go into Parquet alone.
        shape: (N, d).

    Raises:
        ValueError: an unknown format; pieces that do not add up to `shape`.
    """
    check_vector_format(path)
    write = _write_npy if path.suffix == ".npy" else _write_parquet
    with atomic_write(path) as temporary:
        rows = write(temporary, pieces, shape)
        if rows != shape[0]:
            raise ValueError(
                f"{path}: expected {shape[0]} rows, got {rows}; did the source change?"
            )


def _write_npy(path: Path, pieces: Pieces, shape: tuple[int, int]) -> int:
    # Not a memory map: on a full disk writing to one ends the process with a signal.
    rows = 0
    with path.open("wb") as file:
        for _, vectors in pieces:
            if rows == 0:
                description = np.lib.format.dtype_to_descr(vectors.dtype)
                header = {"descr": description, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
            file.write(np.ascontiguousarray(vectors).data)
            rows += len(vectors)
    return rows


def _write_parquet(path: Path, pieces: Pieces, shape: tuple[int, int]) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows, writer = 0, None
    try:
        for ids, vectors in pieces:
            embedding = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), shape[1])
            table = pa.table({"id": pa.array(ids, pa.string()), "embedding": embedding})
            writer = writer or pq.ParquetWriter(path, table.schema)
            writer.write_table(table)
            rows += len(vectors)
    finally:
        if writer is not None:
            writer.close()
    return rows


def open_vectors(path: str | os.PathLike[str]) -> Vectors:
    """A file of vectors, read piece by piece.

    Args:
        path: ``.npy`` [N, d] of floating numbers, or ``.parquet`` with a column ``embedding``
            (lists of numbers, all of one length) and, for other ids than row numbers, ``id``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an unknown format, a file that cannot be read, another shape or dtype.
    """
    path = Path(path)
    check_vector_format(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    return _open_npy(path) if path.suffix == ".npy" else _open_parquet(path)


def _open_npy(path: Path) -> Vectors:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path}: not readable as .npy ({error})") from error
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.floating):
        raise ValueError(
            f"{path}: must hold floating numbers [N, d]; got {array.dtype}, shape {array.shape}"
        )

    def pieces() -> Iterator[tuple[list[str], NDArray[np.floating]]]:
        for start in range(0, len(array), _ROWS_AT_ONCE):
            rows = np.asarray(array[start : start + _ROWS_AT_ONCE])
            yield [str(i) for i in range(start, start + len(rows))], rows

    return Vectors(path, array.shape[0], array.shape[1], pieces)


def _open_parquet(path: Path) -> Vectors:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names, rows = file.schema_arrow.names, file.metadata.num_rows
            if "embedding" not in names:
                raise ValueError(f"{path}: column 'embedding' is missing; columns present: {names}")
            first = next(file.iter_batches(1, columns=["embedding"]), None)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not readable as Parquet ({error})") from error
    dimension = _matrix(first.column("embedding"), path).shape[1] if first is not None else 0

    def pieces() -> Iterator[tuple[list[str], NDArray[np.floating]]]:
        start = 0
        columns = [name for name in ("id", "embedding") if name in names]
        with pq.ParquetFile(path) as file:
            for batch in _batches(file, columns, path):
                ids = (
                    batch.column("id").to_pylist()
                    if "id" in names
                    else range(start, start + len(batch))
                )
                start += len(batch)
                yield [str(key) for key in ids], _matrix(batch.column("embedding"), path)

    return Vectors(path, rows, dimension, pieces)


def _batches(file: Any, columns: list[str], path: Path) -> Iterator[Any]:
    import pyarrow as pa

    try:
        yield from file.iter_batches(_ROWS_AT_ONCE, columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not readable as Parquet ({error})") from error


def _matrix(column: Any, path: Path) -> NDArray[np.floating]:
    """A column of lists as [n, d]."""
    import pyarrow.compute as pc

    lengths = set(pc.list_value_length(column).to_pylist())
    flat = column.flatten()
    values = flat.to_numpy(zero_copy_only=False)
    if flat.null_count:
        raise ValueError(f"{path}: column 'embedding' must hold numbers alone; got null in a list")
    if len(lengths) != 1 or None in lengths or not np.issubdtype(values.dtype, np.floating):
        raise ValueError(
            f"{path}: column 'embedding' must hold lists of floating numbers, all of one length; "
            f"got {column.type}, lengths {sorted(map(str, lengths))[:5]}"
        )
    return values.reshape(len(column), lengths.pop())
