"""Reads the lines of UTF-8 text files, compressed or not, and limits how large they may become."""

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

MAX_LINE = 1 << 28  # bytes; a file without line ends is no file of lines
BOMB_BYTES, BOMB_RATIO = 1 << 28, 200  # text shrinks to a tenth or so, at the most 1,030-fold
_ENCODINGS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}

Refuse = Callable[[ValueError], None]


def refuse(error: ValueError) -> None:
    """Raises the error of a record that cannot be read, unless the caller handles it otherwise."""
    raise error


def check_file(path: Path) -> None:
    """Raises unless there is a regular file of that name.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: a folder, a pipe or a device, or a name that cannot be one.
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
    """Open a regular file to read bytes, through gzip where its name ends so.

    Raises:
        FileNotFoundError, ValueError: as `check_file`.
    """
    check_file(path)
    if path.suffix.lower() == ".gz":
        return io.BufferedReader(_Unzipped(path), buffer_size=1 << 17)
    return path.open("rb")


def read_lines(path: Path, invalid: Refuse = refuse) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, line with its line feed) of a UTF-8 text file, ``.gz`` or not.

    Only a line feed ends a line. A leading byte order mark, as spreadsheet programs write it, is
    dropped.

    Args:
        path: of a regular file.
        invalid: takes the error of a line that is no text; where it returns, reading goes on.

    Raises:
        FileNotFoundError, ValueError: as `check_file`; a truncated or broken gzip file, or one that
            is made to unfold without end; a line that is too long or not UTF-8.
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
    """The bytes in a gzip file; stops where they are many times those of the file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("rb")
        self._unzipped = gzip.GzipFile(fileobj=self._file, mode="rb")
        self._bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._unzipped.read1(len(buffer))  # whole reads lose what precedes a broken part
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
