"""Keeps the chunks of an unfinished ``embed_file`` in a folder beside its output."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_fast.files import PARTIAL, atomic_write, write_text
from moe_fast.inference.manifest import (
    MANIFEST,
    changes,
    differing_names,
    manifest_key,
    read_manifest,
    write_manifest,
)
from moe_fast.inference.precision import StoredPrecision, needs_ranges, ranges_of
from moe_fast.inference.threads import check_threads
from moe_fast.inference.vectors import open_vectors

logger = logging.getLogger(__name__)

_KIND = "moe_fast embed, unfinished"  # marks a manifest as one of ours
_BOOKKEEPING = ("finished",)  # entries of a manifest that are no settings
# Names of a chunk's vectors and ids, of the manifest, and of files that a killed process left.
_OURS = re.compile(
    rf"\d{{8}}-[0-9a-f]{{16}}\.(npy|json)|{re.escape(MANIFEST)}"
    rf"|\..+\.[0-9a-f]{{8}}{re.escape(PARTIAL)}\.(npy|json)"
)


@dataclass(frozen=True)
class Parts:
    """The folder ``OUTPUT.parts`` with a manifest, and the vectors and ids of each finished chunk.

    The file names of the chunks have a hash of the run's manifest, so that chunks of different runs
    are not confused.

    Attributes:
        output: the file that will be made from the chunks.
        dimension, dtype: the dimension and dtype of the vectors.
        threads: the number of threads that compute them.
        key: the hash of the manifest.
    """

    output: Path
    dimension: int
    dtype: str
    threads: int
    key: str

    def write(self, number: int, vectors: NDArray[np.floating], ids: list[str]) -> None:
        """Write chunk `number`: vectors [n, d] and n ids."""
        # The ids come first, because a chunk counts as finished if its vectors exist.
        write_text(self._path(number, ".json"), json.dumps(ids))
        with atomic_write(self._path(number, ".npy")) as temporary:
            np.save(temporary, vectors, allow_pickle=False)

    def holds(self, number: int, rows: int) -> bool:
        """Return whether chunk `number` exists, is readable and has this many rows."""
        path = self._path(number, ".npy")
        if not path.exists():
            return False
        try:
            found = np.load(path, mmap_mode="r", allow_pickle=False)
            ids = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        except (ValueError, EOFError, OSError, RecursionError):  # damaged, e.g. by a power cut
            return False
        fits = isinstance(ids, list) and len(ids) == rows and all(isinstance(i, str) for i in ids)
        return fits and found.shape == (rows, self.dimension) and found.dtype == self.dtype

    def read(self, chunks: int) -> Iterator[tuple[list[str], NDArray[np.floating]]]:
        """Yield (ids, vectors) of the first `chunks` chunks, in order."""
        for number in range(chunks):
            ids = json.loads(self._path(number, ".json").read_text(encoding="utf-8"))
            yield ids, np.load(self._path(number, ".npy"), allow_pickle=False)

    def stored(self, chunks: int, precision: str) -> StoredPrecision:
        """Return how the output stores the vectors of the first `chunks` chunks.

        The ranges of a quantised precision are those of all vectors.
        """
        vectors = (vectors for _, vectors in self.read(chunks))
        ranges = ranges_of(vectors) if needs_ranges(precision) else None
        return StoredPrecision(precision, self.dimension, ranges)

    def are_in_output(self, sizes: list[int], precision: str) -> bool:
        """Return whether the output was made from these chunks, so that only cleaning up is left.

        Args:
            sizes: the number of texts of each chunk.
            precision: the precision of the output.
        """
        if not self.output.is_file():
            return False
        finished = (read_manifest(_folder(self.output), _KIND) or {}).get("finished")
        if finished is not None:
            return finished == _identity(self.output)
        if not all(self.holds(number, rows) for number, rows in enumerate(sizes)):
            return False
        try:
            found = _digest(vectors for _, vectors in open_vectors(self.output).pieces())
        except ValueError:
            return False
        stored = self.stored(len(sizes), precision)
        return found == _digest(stored.decode(stored.encode(v)) for _, v in self.read(len(sizes)))

    def remove(self) -> None:
        """Delete the chunks when the output is complete.

        Files that are not ours are kept, with a warning.
        """
        folder = _folder(self.output)
        manifest = read_manifest(folder, _KIND) or {}
        write_manifest(folder, _KIND, {**manifest, "finished": _identity(self.output)})
        _remove_ours(folder)

    def _path(self, number: int, suffix: str) -> Path:
        return _folder(self.output) / f"{number:08d}-{self.key}{suffix}"


def has_parts(output: Path) -> bool:
    """Return whether an unfinished run has left its chunks beside `output`."""
    return read_manifest(_folder(output), _KIND) is not None


def open_parts(
    output: Path,
    manifest: dict[str, Any],
    shape: tuple[int, str],
    *,
    threads: int | None,
    default_threads: int,
    overwrite: bool,
) -> Parts:
    """Open the folder of chunks for a new run, or to resume a run with the same manifest.

    Args:
        output: the file that will be made from the chunks.
        manifest: everything that its content depends on, except the threads.
        shape: the dimension and dtype of the vectors.
        threads: the number of threads; ``None``: that of the interrupted run, or
            `default_threads`.
        default_threads: the number of threads of a new run.
        overwrite: discard the chunks of a run with another manifest.

    Raises:
        FileExistsError: there are chunks of a run with another manifest, unless `overwrite`; the
            error names what differs.
        FileExistsError: the folder's name is taken by something that is not ours.
        ValueError: the interrupted run's number of threads is not possible on this machine.
    """
    folder = _folder(output)
    before = read_manifest(folder, _KIND)
    if before is None:
        _check_free(folder)
    elif threads is None and "threads" in before:
        check_threads(f"{folder / MANIFEST}: threads", before["threads"])
        default_threads = before["threads"]
    manifest = {**manifest, "threads": threads or default_threads}
    old = {name: value for name, value in (before or {}).items() if name not in _BOOKKEEPING}
    differing = differing_names(old, manifest)
    key = manifest_key(manifest)
    if before is None or differing:
        if any(folder.glob("*.npy")) and not overwrite:
            raise FileExistsError(
                f"{folder} holds the chunks of an interrupted run that differs from this "
                f"one in {changes(old, manifest, differing)}. Run with the same "
                "settings to go on with it, or with overwrite (--overwrite) to discard it."
            )
        if before is not None:
            _remove_ours(folder)
        write_manifest(folder, _KIND, manifest)
    return Parts(output, *shape, manifest["threads"], key)


def _folder(output: Path) -> Path:
    return output.with_name(f"{output.name}.parts")


def _identity(path: Path) -> list[int]:
    """Return values that distinguish a file from another one of the same name."""
    about = path.stat()
    return [about.st_ino, about.st_size, about.st_mtime_ns]


def _digest(pieces: Iterable[NDArray[np.floating]]) -> str:
    digest = hashlib.sha256()
    for vectors in pieces:
        digest.update(np.ascontiguousarray(vectors).data)
    return digest.hexdigest()


def _check_free(folder: Path) -> None:
    """Raise if the folder contains anything but the files of a run of ours killed at its start."""
    if not os.path.lexists(folder):
        return
    others = [folder.name] if folder.is_symlink() or not folder.is_dir() else _others(folder)
    if others:
        raise FileExistsError(
            f"{folder} is where the chunks of an unfinished run are kept, and holds something else "
            f"({', '.join(map(repr, others[:3]))}). Move it away, or choose another output."
        )


def _others(folder: Path) -> list[str]:
    """Return the names of the entries of a folder that are not files of ours."""
    others = [
        entry.name
        for entry in os.scandir(folder)
        if not (_OURS.fullmatch(entry.name) and entry.is_file(follow_symlinks=False))
    ]
    foreign_manifest = (folder / MANIFEST).is_file() and read_manifest(folder, _KIND) is None
    return sorted({*others, *([MANIFEST] if foreign_manifest else [])})


def _remove_ours(folder: Path) -> None:
    """Delete our files, the manifest last, and the folder if nothing else is in it."""
    others = _others(folder)
    ours = {entry.name for entry in os.scandir(folder)} - {*others, MANIFEST}
    for name in sorted(ours):
        (folder / name).unlink(missing_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    if others:
        logger.warning("%s is kept: it holds files of others (%s).", folder, ", ".join(others[:3]))
        return
    with contextlib.suppress(OSError):  # another program may have just put a file there
        folder.rmdir()
