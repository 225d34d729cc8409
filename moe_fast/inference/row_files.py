"""Files of rows of numbers, all of one width: written piece by piece, then mapped into memory.

There is no header: the width and the type are written elsewhere, and the size of the file gives the
number of rows. What is mapped is read from the disk where it is used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


class RowFile:
    """A file that is being written.

    Args:
        path: the file, which must not be there.
        width: numbers per row.
        dtype: a little-endian type, such as ``"<f4"``.
    """

    def __init__(self, path: Path, width: int, dtype: str) -> None:
        self.path, self.width, self.dtype = path, width, dtype
        self._file = path.open("xb")

    def append(self, rows: NDArray[Any]) -> None:
        """Write rows [n, width] at the end."""
        self._file.write(np.ascontiguousarray(rows, self.dtype).data)

    def mapped(self) -> NDArray[Any]:
        """End the writing, and return all rows."""
        self._file.close()
        return map_rows(self.path, self.width, self.dtype)


def map_rows(path: Path, width: int, dtype: str) -> NDArray[Any]:
    """Return the rows of a file [n, width], mapped into memory for reading.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the size is not that of whole rows.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    row, size = width * np.dtype(dtype).itemsize, path.stat().st_size
    if size % row:
        raise ValueError(f"{path}: {size:,} bytes are no rows of {row} bytes")
    if not size:
        return np.zeros((0, width), dtype)  # nothing can be mapped
    return np.memmap(path, dtype, "r", shape=(size // row, width))
