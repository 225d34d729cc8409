"""Reads and writes files of vectors with ids, in pieces.

A Parquet file has both, and so has a folder of Parquet files, which are read in the order of their
names. Quantised vectors, which Parquet alone holds, are read as floating-point numbers.

The ids of ``vectors.npy`` are in ``vectors.npy.ids.jsonl`` beside it, with a JSON string per line.
Vectors are never beside the ids of another run, even if a run is killed.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_fast.data.file_formats import read_lines
from moe_fast.files import atomic_write
from moe_fast.inference.precision import StoredPrecision, from_metadata

SUFFIXES = (".npy", ".parquet")
IDS_SUFFIX = ".ids.jsonl"
Pieces = Iterable[tuple[list[str], NDArray[np.floating]]]
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Vectors:
    """A file of vectors.

    Attributes:
        path: the file.
        rows, dimension: the shape [N, d] of the vectors.
        pieces: a function that returns an iterator over (n ids, float array [n, d]), from the
            start.
        has_ids: whether the file has ids; otherwise they are the row numbers from 0.
    """

    path: Path
    rows: int
    dimension: int
    pieces: Callable[[], Iterator[tuple[list[str], NDArray[np.floating]]]]
    has_ids: bool = True


def ids_path(path: Path) -> Path:
    """Return the path of the ids of a ``.npy`` file."""
    return path.with_name(path.name + IDS_SUFFIX)


def check_vector_format(path: Path, precision: str = "float32") -> None:
    """Raise ValueError unless the name of `path` ends in a format for vectors of this precision."""
    if path.suffix not in SUFFIXES:
        raise ValueError(
            f"{path}: vectors are kept in files of the formats {' and '.join(SUFFIXES)}; "
            f"got {path.suffix or 'a name without a suffix'!r}"
        )
    if path.suffix == ".npy" and not precision.startswith("float"):
        raise ValueError(
            f"{path}: precision={precision!r} needs a .parquet file, whose metadata say how to "
            "read it"
        )


def write_vectors(
    path: Path,
    pieces: Pieces,
    shape: tuple[int, int],
    stored: StoredPrecision | None = None,
    metadata: Mapping[bytes, bytes] | None = None,
) -> None:
    """Write vectors [N, d] piece by piece; the file gets its name when it is complete.

    Args:
        path: a ``.npy`` or ``.parquet`` file.
        pieces: (n ids, vectors [n, d]) of each piece, all with the same dtype. May be an iterator;
            it is consumed once.
        shape: (N, d).
        stored: what the vectors are stored as; None: as they are.
        metadata: further entries of a Parquet file's metadata.

    Raises:
        ValueError: the format is unknown or not for this precision, or the pieces do not have N
            rows together.
    """
    check_vector_format(path, "float32" if stored is None else stored.precision)
    if stored is not None:
        pieces = ((ids, stored.encode(vectors)) for ids, vectors in pieces)
        shape = (shape[0], stored.width)
        metadata = {**(metadata or {}), **stored.metadata()}
    if path.suffix == ".npy":
        _write_npy(path, pieces, shape)
    else:
        _write_parquet(path, pieces, shape[0], metadata)


def _check_rows(path: Path, rows: int, expected: int) -> None:
    if rows != expected:
        raise ValueError(f"{path}: expected {expected} rows, got {rows}; did the source change?")


def _write_npy(path: Path, pieces: Pieces, shape: tuple[int, int]) -> None:
    # A memory map is not used: on a full disk, writing to it kills the process by a signal.
    rows = 0
    with atomic_write(path) as temporary, atomic_write(ids_path(path)) as temporary_ids:
        with temporary.open("wb") as file, temporary_ids.open("w", encoding="utf-8") as id_file:
            for ids, vectors in pieces:
                if rows == 0:
                    description = np.lib.format.dtype_to_descr(vectors.dtype)
                    header = {"descr": description, "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(np.ascontiguousarray(vectors).data)
                id_file.writelines(f"{json.dumps(key)}\n" for key in ids)
                rows += len(vectors)
        _check_rows(path, rows, shape[0])
        # The ids get their name next, then the vectors. Old vectors are removed before, so that a
        # kill between the two cannot leave them beside the new ids.
        path.unlink(missing_ok=True)


def _write_parquet(
    path: Path, pieces: Pieces, expected: int, metadata: Mapping[bytes, bytes] | None
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows, writer = 0, None
    with atomic_write(path) as temporary:
        try:
            for ids, vectors in pieces:
                columns = {"id": pa.array(ids, pa.string()), "embedding": fixed_size_lists(vectors)}
                table = pa.table(columns, metadata=metadata)
                writer = writer or pq.ParquetWriter(temporary, table.schema)
                writer.write_table(table)
                rows += len(vectors)
        finally:
            if writer is not None:
                writer.close()
        _check_rows(path, rows, expected)


def fixed_size_lists(vectors: NDArray[Any]) -> Any:
    """Convert an array [n, d] to an Arrow array of n lists of d numbers."""
    import pyarrow as pa

    flat = pa.array(np.ascontiguousarray(vectors).ravel())
    return pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])


def open_vectors(path: str | os.PathLike[str]) -> Vectors:
    """Open a file of vectors, to read it piece by piece.

    Args:
        path: a ``.npy`` file of floating-point numbers [N, d], with the file of ids beside it that
            `write_vectors` makes; or a ``.parquet`` file with the columns ``embedding`` (lists of
            numbers, all of the same length) and ``id``; or a folder of such Parquet files. If there
            are no ids, they are the row numbers from 0.

    Raises:
        FileNotFoundError: there is no such file, or the folder has no Parquet file.
        ValueError: the format is unknown, or the file cannot be read.
        ValueError: the shape or dtype is wrong, or there is not one id per row.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    check_vector_format(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    return _open_npy(path) if path.suffix == ".npy" else _open_parquet(path)


def _open_folder(path: Path) -> Vectors:
    files = [_open_parquet(file) for file in sorted(path.glob("*.parquet"))]
    if not files:
        raise FileNotFoundError(f"the folder {path} has no file *.parquet")
    filled = [file for file in files if file.rows] or files[:1]
    for file in filled:
        if (file.dimension, file.has_ids) != (filled[0].dimension, filled[0].has_ids):
            raise ValueError(
                f"{file.path}: {_described(file)}, but {filled[0].path}: {_described(filled[0])}"
            )
    rows, has_ids = sum(file.rows for file in filled), filled[0].has_ids

    def pieces() -> Iterator[tuple[list[str], NDArray[np.floating]]]:
        numbers = map(str, itertools.count())
        for ids, vectors in itertools.chain.from_iterable(file.pieces() for file in filled):
            yield ids if has_ids else list(itertools.islice(numbers, len(vectors))), vectors

    return Vectors(path, rows, filled[0].dimension, pieces, has_ids)


def _described(file: Vectors) -> str:
    return f"dimension {file.dimension}, {'with' if file.has_ids else 'without'} ids"


def _open_npy(path: Path) -> Vectors:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path}: not readable as .npy ({error})") from error
    if array.ndim != 2 or not array.shape[1] or not np.issubdtype(array.dtype, np.floating):
        raise ValueError(
            f"{path}: must hold floating numbers [N, d], d of at least 1; got {array.dtype}, shape "
            f"{array.shape}"
        )

    path_of_ids = ids_path(path)
    has_ids = path_of_ids.is_file()
    if has_ids:
        found = sum(1 for _ in _read_ids(path_of_ids))
        if found != len(array):
            raise ValueError(
                f"{path_of_ids}: {found} ids, but {path} has {len(array)} rows; the two do not "
                "belong together. Without the file of ids the row numbers are taken."
            )

    def pieces() -> Iterator[tuple[list[str], NDArray[np.floating]]]:
        keys = _read_ids(path_of_ids) if has_ids else map(str, range(len(array)))
        for start in range(0, len(array), _ROWS_AT_ONCE):
            # a mapping for each piece: pages that were read would count as this process's memory
            mapped = np.load(path, mmap_mode="r", allow_pickle=False)
            rows = np.array(mapped[start : start + _ROWS_AT_ONCE])
            yield list(itertools.islice(keys, len(rows))), rows

    return Vectors(path, array.shape[0], array.shape[1], pieces, has_ids)


def _read_ids(path: Path) -> Iterator[str]:
    """Yield the ids in a file of JSON strings, one per line; raise ValueError for other lines."""
    for line, text in read_lines(path):
        try:
            key = json.loads(text)
        except (ValueError, RecursionError):
            key = None
        if not isinstance(key, str) or not key:
            raise ValueError(
                f"{path}, line {line}: must be an id as a JSON string; got {text[:60].strip()!r}"
            )
        yield key


def _open_parquet(path: Path) -> Vectors:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names, rows = file.schema_arrow.names, file.metadata.num_rows
            if "embedding" not in names:
                raise ValueError(f"{path}: column 'embedding' is missing; columns present: {names}")
            stored = _stored_precision(file.schema_arrow.metadata, path)
            first = next(file.iter_batches(1, columns=["embedding"]), None)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not readable as Parquet ({error})") from error

    def vectors_of(batch: Any) -> NDArray[np.floating]:
        return _matrix(batch.column("embedding"), path, stored)

    dimension = vectors_of(first).shape[1] if first is not None else 0

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
                yield [str(key) for key in ids], vectors_of(batch)

    return Vectors(path, rows, dimension, pieces, "id" in names)


def _batches(file: Any, columns: list[str], path: Path) -> Iterator[Any]:
    import pyarrow as pa

    try:
        yield from file.iter_batches(_ROWS_AT_ONCE, columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not readable as Parquet ({error})") from error


def _stored_precision(metadata: Mapping[bytes, bytes] | None, path: Path) -> StoredPrecision | None:
    try:
        return from_metadata(metadata)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _matrix(column: Any, path: Path, stored: StoredPrecision | None) -> NDArray[np.floating]:
    """Convert a column of n lists of d numbers to an array [n, d]; raise ValueError if it is not.

    Args:
        column: the column, from Arrow.
        path: the file, for the error.
        stored: what the file's metadata say; None: floating-point numbers.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.types as kinds

    kind = column.type
    is_list = kinds.is_list(kind) or kinds.is_large_list(kind) or kinds.is_fixed_size_list(kind)
    if stored is None:
        wanted, fits = "floating numbers", is_list and kinds.is_floating(kind.value_type)
    else:
        element = pa.from_numpy_dtype(np.dtype(stored.dtype))
        wanted = f"{stored.width} numbers of type {element} (precision {stored.precision})"
        fits = is_list and kind.value_type == element
    lengths = set(pc.list_value_length(column).to_pylist()) if fits else set()
    if len(lengths) != 1 or lengths <= {None, 0} or (stored and lengths != {stored.width}):
        raise ValueError(
            f"{path}: column 'embedding' must hold lists of {wanted}, all of one length, "
            f"none empty; got {kind}, lengths {sorted(map(str, lengths))[:5]}"
        )
    flat = column.flatten()
    if flat.null_count:
        raise ValueError(f"{path}: column 'embedding' must hold numbers alone; got null in a list")
    array = flat.to_numpy(zero_copy_only=False).reshape(len(column), lengths.pop())
    return array if stored is None else stored.decode(array)
