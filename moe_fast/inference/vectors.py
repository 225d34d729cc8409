"""Files of vectors with ids, read and written in pieces.

Parquet holds both. The ids of ``vectors.npy`` lie beside it in ``vectors.npy.ids.jsonl``: a line
per row, each a JSON string. The two appear together: at no moment do ids lie beside the vectors of
another run.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_fast.data.file_formats import read_lines
from moe_fast.files import atomic_write

SUFFIXES = (".npy", ".parquet")
IDS_SUFFIX = ".ids.jsonl"
Pieces = Iterable[tuple[list[str], NDArray[np.floating]]]
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Vectors:
    """A file of vectors.

    Attributes:
        path: the file.
        rows, dimension: its shape [N, d].
        pieces: call it to iterate over (ids, float array [n, d]) from the start.
        has_ids: whether it brings ids; otherwise they are the row numbers, from 0.
    """

    path: Path
    rows: int
    dimension: int
    pieces: Callable[[], Iterator[tuple[list[str], NDArray[np.floating]]]]
    has_ids: bool = True


def ids_path(path: Path) -> Path:
    """Where the ids of a ``.npy`` file are."""
    return path.with_name(path.name + IDS_SUFFIX)


def check_vector_format(path: Path) -> None:
    """Raise unless the name of `path` says a format that vectors can have."""
    if path.suffix not in SUFFIXES:
        raise ValueError(
            f"{path}: vectors are kept in files of the formats {' and '.join(SUFFIXES)}; "
            f"got {path.suffix or 'a name without a suffix'!r}"
        )


def write_vectors(path: Path, pieces: Pieces, shape: tuple[int, int]) -> None:
    """Write [N, d] vectors piece by piece; the file appears, with its ids, when it is whole.

    Args:
        path: ``.npy`` or ``.parquet``.
        pieces: (n ids, [n, d]), all of one dtype.
        shape: (N, d).

    Raises:
        ValueError: an unknown format; pieces that do not add up to `shape`.
    """
    check_vector_format(path)
    write = _write_npy if path.suffix == ".npy" else _write_parquet
    write(path, pieces, shape)


def _check_rows(path: Path, rows: int, expected: int) -> None:
    if rows != expected:
        raise ValueError(f"{path}: expected {expected} rows, got {rows}; did the source change?")


def _write_npy(path: Path, pieces: Pieces, shape: tuple[int, int]) -> None:
    # Not a memory map: on a full disk writing to one ends the process with a signal.
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
        # Now the ids take their place, then the vectors. Old vectors go first: a kill between the
        # two must not leave them with the new ids.
        path.unlink(missing_ok=True)


def _write_parquet(path: Path, pieces: Pieces, shape: tuple[int, int]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows, writer = 0, None
    with atomic_write(path) as temporary:
        try:
            for ids, vectors in pieces:
                embedding = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), shape[1])
                table = pa.table({"id": pa.array(ids, pa.string()), "embedding": embedding})
                writer = writer or pq.ParquetWriter(temporary, table.schema)
                writer.write_table(table)
                rows += len(vectors)
        finally:
            if writer is not None:
                writer.close()
        _check_rows(path, rows, shape[0])


def open_vectors(path: str | os.PathLike[str]) -> Vectors:
    """A file of vectors, read piece by piece.

    Args:
        path: ``.npy`` [N, d] of floating numbers, its ids beside it as `write_vectors` leaves
            them, or ``.parquet`` with a column ``embedding`` (lists of numbers, all of one length)
            and ``id``. Without ids they are the row numbers from 0.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an unknown format, a file that cannot be read, another shape or dtype; ids that
            are not one per row.
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
            rows = np.asarray(array[start : start + _ROWS_AT_ONCE])
            yield list(itertools.islice(keys, len(rows))), rows

    return Vectors(path, array.shape[0], array.shape[1], pieces, has_ids)


def _read_ids(path: Path) -> Iterator[str]:
    """The ids in a file of JSON strings, one per line."""
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

    return Vectors(path, rows, dimension, pieces, "id" in names)


def _batches(file: Any, columns: list[str], path: Path) -> Iterator[Any]:
    import pyarrow as pa

    try:
        yield from file.iter_batches(_ROWS_AT_ONCE, columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not readable as Parquet ({error})") from error


def _matrix(column: Any, path: Path) -> NDArray[np.floating]:
    """A column of lists as [n, d]."""
    import pyarrow.compute as pc
    import pyarrow.types as kinds

    kind = column.type
    is_list = kinds.is_list(kind) or kinds.is_large_list(kind) or kinds.is_fixed_size_list(kind)
    is_matrix = is_list and kinds.is_floating(kind.value_type)
    lengths = set(pc.list_value_length(column).to_pylist()) if is_matrix else set()
    if len(lengths) != 1 or lengths <= {None, 0}:
        raise ValueError(
            f"{path}: column 'embedding' must hold lists of floating numbers, all of one length, "
            f"none empty; got {kind}, lengths {sorted(map(str, lengths))[:5]}"
        )
    flat = column.flatten()
    if flat.null_count:
        raise ValueError(f"{path}: column 'embedding' must hold numbers alone; got null in a list")
    return flat.to_numpy(zero_copy_only=False).reshape(len(column), lengths.pop())
