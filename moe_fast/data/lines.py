"""Reads the lines of UTF-8 text files, compressed or not, up to a limit on their size."""

from __future__ import annotations

import gzip
import io
import os
import stat
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from moe_fast.messages import reason, shown

MAX_LINE = 1 << 28  # bytes; a longer line means that the file is not made of lines
# gzip makes text about 10 times smaller, and any data at most 1,030 times.
BOMB_BYTES, BOMB_RATIO = 1 << 28, 200
_ENCODINGS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}

Refuse = Callable[[ValueError], None]


def refuse(error: ValueError) -> None:
    """Raise the error of a record that cannot be read; the default of the readers' `invalid`."""
    raise error


def check_file(path: Path) -> None:
    """Raise an error unless the path is a regular file.

    Raises:
        FileNotFoundError: nothing has this path.
        ValueError: it is a folder, a pipe or a device, or no valid path.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no such file: {path}") from error
    except (OSError, ValueError) as error:  # too long a name, a NUL byte in it
        raise ValueError(f"path={shown(str(path), 500)}: {reason(error)}") from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise ValueError(f"{path} is {kind}, not a regular file")


def open_binary(path: Path) -> IO[bytes]:
    """Open a regular file to read bytes, which are uncompressed if its name ends in ``.gz``.

    Raises:
        FileNotFoundError, ValueError: as `check_file`.
    """
    check_file(path)
    if path.suffix.lower() == ".gz":
        return io.BufferedReader(_Unzipped(path), buffer_size=1 << 17)
    return path.open("rb")


def read_lines(path: Path, invalid: Refuse = refuse) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, line with its line feed) of a UTF-8 text file, ``.gz`` or not.

    Only a line feed ends a line. The byte order mark that spreadsheet programs write at the start
    of a file is removed.

    Args:
        path: a regular file.
        invalid: called with the error of a line that is not UTF-8. If it returns, reading goes on
            with the next line. By default it raises.

    Raises:
        FileNotFoundError, ValueError: as `check_file`.
        ValueError: a gzip file is truncated or broken, or becomes more than `BOMB_RATIO` times
            larger when it is uncompressed.
        ValueError: a line is longer than `MAX_LINE` bytes.
        ValueError: a line is not UTF-8, unless `invalid` returns.
    """
    number = 0
    try:
        with open_binary(path) as file:
            while raw := file.readline(MAX_LINE + 1):
                number += 1
                where = f"{path}, line {number}"
                if len(raw) > MAX_LINE:
                    raise ValueError(f"{where}: longer than {MAX_LINE:,} bytes")
                try:
                    text = _decode(raw, where, first=number == 1)
                except ValueError as error:
                    invalid(error)
                else:
                    yield number, text
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(
            f"{path}, after line {number}: truncated or broken gzip file ({error})"
        ) from error


def _decode(raw: bytes, where: str, *, first: bool) -> str:
    if first and (mark := next((m for m in _ENCODINGS if raw.startswith(m)), None)):
        raise ValueError(f"{where}: the file is {_ENCODINGS[mark]}; save it as UTF-8")
    try:
        text = raw.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: not UTF-8 ({error}); save the file as UTF-8, which spreadsheet programs "
            "call 'CSV UTF-8'"
        ) from error
    if first and "\0" in text:
        raise ValueError(f"{where}: a NUL byte, which no text has; is the file UTF-16?")
    return text


class _Unzipped(io.RawIOBase):
    """A stream of the uncompressed bytes of a gzip file.

    Reading raises ValueError once they are many times more than the bytes of the file, so that a
    malicious file cannot fill the memory.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("rb")
        self._unzipped = gzip.GzipFile(fileobj=self._file, mode="rb")
        self._bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._unzipped.read1(len(buffer))  # read() would lose the data before a broken part
        buffer[: len(data)] = data
        self._bytes += len(data)
        if self._bytes > BOMB_BYTES and self._bytes > BOMB_RATIO * self._file.tell():
            raise ValueError(
                f"{self._path}: unfolds to more than {BOMB_RATIO} times its size, as no text does; "
                "unpack it first if that is meant"
            )
        return len(data)

    def close(self) -> None:
        self._unzipped.close()
        self._file.close()
        super().close()
