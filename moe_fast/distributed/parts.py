"""Keeps what an unfinished run on a cluster has finished: a Parquet file for each row group.

``OUTPUT.parts`` holds a manifest and two folders: ``vectors``, and ``quantized`` where the ranges
of all vectors must be known before any can be stored. A file gets its name when it is complete, and
names its run. However often a row group is computed, because workers were killed, there is one file
of it. The folder of the finished files becomes ``OUTPUT`` by a change of its name.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_fast.files import PARTIAL, move_folder
from moe_fast.inference.manifest import (
    MANIFEST,
    changes,
    differing_names,
    manifest_key,
    read_manifest,
    write_manifest,
)
from moe_fast.inference.precision import StoredPrecision, merged_ranges, needs_ranges
from moe_fast.inference.vectors import open_vectors, write_vectors

_KIND = "moe_fast embed on a cluster, unfinished"
_KEY = b"moe_fast_part"
_FOLDERS = ("vectors", "quantized")
_OURS = re.compile(
    rf"part-\d{{8}}\.(parquet|begun)|\..+\.[0-9a-f]{{8}}{re.escape(PARTIAL)}\.parquet"
)


@dataclass(frozen=True)
class Part:
    """A piece of work whose result is one file.

    Attributes:
        number: its number, from 0.
        rows: the number of its rows.
    """

    number: int
    rows: int


@dataclass(frozen=True)
class PartFolder:
    """A folder with the files of a run.

    Attributes:
        path: the folder.
        key: the hash of the run's manifest.
    """

    path: Path
    key: str

    def write(
        self,
        part: Part,
        ids: list[str],
        vectors: NDArray[np.floating],
        stored: StoredPrecision,
        ranges: NDArray[np.float32] | None,
    ) -> None:
        """Write the file of a part: n ids, vectors [n, d] and, if given, their ranges [2, d]."""
        about: dict[str, Any] = {"run": self.key, "number": part.number}
        if ranges is not None:
            about["ranges"] = ranges.tolist()
        write_vectors(
            self._path(part),
            [(ids, vectors)],
            (part.rows, vectors.shape[1]),
            stored,
            {_KEY: json.dumps(about).encode()},
        )

    def begin(self, part: Part) -> int:
        """Note that a part is begun; return how often it was, this time included."""
        with self._path(part).with_suffix(".begun").open("a+b") as file:
            file.write(b"+")
            file.flush()
            return file.tell()

    def forget_begun(self) -> None:
        """Forget how often parts were begun."""
        for file in self.path.glob("*.begun"):
            file.unlink()

    def holds(self, part: Part) -> bool:
        """Return whether the file of a part is there, readable, of this run and complete."""
        found = self._about(part)
        expected = {"run": self.key, "number": part.number, "rows": part.rows}
        return found is not None and found.items() >= expected.items()

    def read(self, part: Part) -> tuple[list[str], NDArray[np.floating]]:
        """Read the ids and vectors of a part."""
        pieces = list(open_vectors(self._path(part)).pieces())
        ids = [key for keys, _ in pieces for key in keys]
        return ids, np.concatenate([vectors for _, vectors in pieces])

    def dimension(self, part: Part) -> int:
        """Return the dimension of the vectors of a part, before they are stored in fewer bytes."""
        return open_vectors(self._path(part)).dimension

    def ranges(self, parts: Sequence[Part]) -> NDArray[np.float32]:
        """Return the ranges [2, d] of the vectors of all parts."""
        found: NDArray[np.float32] | None = None
        for part in parts:
            about = self._about(part)
            assert about is not None  # the caller has asked `holds`
            these = np.array(about["ranges"], np.float32)
            found = these if found is None else merged_ranges(found, these)
        assert found is not None
        return found

    def clear(self) -> None:
        """Delete the files of any run."""
        for file in self.path.glob("*"):
            if _OURS.fullmatch(file.name):
                file.unlink(missing_ok=True)

    def _path(self, part: Part) -> Path:
        return self.path / f"part-{part.number:08d}.parquet"

    def _about(self, part: Part) -> dict[str, Any] | None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            metadata = pq.read_metadata(self._path(part))
            about = json.loads((metadata.metadata or {})[_KEY])
            return {**about, "rows": metadata.num_rows}
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError, RecursionError):
            return None


@dataclass(frozen=True)
class CorpusParts:
    """The folder ``OUTPUT.parts`` of a run.

    Attributes:
        output: the folder that will be made.
        key: the hash of the manifest.
        threads: PyTorch's threads of each worker.
        precision: the precision of the output.
    """

    output: Path
    key: str
    threads: int
    precision: str

    @property
    def vectors(self) -> PartFolder:
        """Where the vectors are written first."""
        return PartFolder(_folder(self.output) / "vectors", self.key)

    @property
    def quantized(self) -> PartFolder:
        """Where quantised vectors are written."""
        return PartFolder(_folder(self.output) / "quantized", self.key)

    @property
    def in_output(self) -> PartFolder:
        """The output, once it is published."""
        return PartFolder(self.output, self.key)

    def are_in_output(self, parts: Sequence[Part]) -> bool:
        """Return whether the output is that of this run, so that only cleaning up is left."""
        return all(self.in_output.holds(part) for part in parts)

    def publish(self) -> None:
        """Give the folder of finished files the name of the output; an old one is removed."""
        finished = self.quantized if needs_ranges(self.precision) else self.vectors
        finished.forget_begun()
        for half_written in finished.path.glob(f".*{PARTIAL}.parquet"):  # by killed workers
            half_written.unlink()
        move_folder(finished.path, self.output)

    def remove(self) -> None:
        """Delete what is left, when the output is complete."""
        _remove_ours(_folder(self.output))


def has_corpus_parts(output: Path) -> bool:
    """Return whether an unfinished run on a cluster has left its files beside `output`."""
    return read_manifest(_folder(output), _KIND) is not None


def open_corpus_parts(
    output: Path,
    manifest: dict[str, Any],
    *,
    threads: int | None,
    default_threads: int,
    overwrite: bool,
) -> CorpusParts:
    """Open the folder for a new run, or to resume a run with the same manifest.

    Args:
        output: the folder that will be made.
        manifest: everything that its content depends on, except the threads.
        threads: the number of threads of each worker; ``None``: that of the interrupted run, or
            `default_threads`.
        default_threads: the number of threads of a new run.
        overwrite: discard the files of a run with another manifest.

    Raises:
        FileExistsError: there are files of a run with another manifest, unless `overwrite`; the
            error names what differs.
        FileExistsError: the folder's name is taken by something that is not ours.
    """
    folder = _folder(output)
    before = read_manifest(folder, _KIND)
    if before is None:
        if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
            raise FileExistsError(
                f"{folder} is where the files of an unfinished run are kept, and is something "
                "else. Move it away, or choose another output."
            )
    elif threads is None:
        threads = before.get("threads")
    manifest = {**manifest, "threads": threads or default_threads}
    if before != manifest:
        if before is not None:
            if any(folder.glob("*/part-*.parquet")) and not overwrite:
                names = differing_names(before, manifest)
                raise FileExistsError(
                    f"{folder} holds the files of an interrupted run that differs from this one "
                    f"in {changes(before, manifest, names)}. Run with the same settings to go on "
                    "with it, or with overwrite (--overwrite) to discard it."
                )
            _remove_ours(folder)
        write_manifest(folder, _KIND, manifest)
    for name in _FOLDERS:
        (folder / name).mkdir(exist_ok=True)
    key = manifest_key(manifest)
    return CorpusParts(output, key, manifest["threads"], manifest["precision"])


def _folder(output: Path) -> Path:
    return output.with_name(f"{output.name}.parts")


def _remove_ours(folder: Path) -> None:
    """Delete our files, the manifest last, and the folders that hold nothing else."""
    for name in _FOLDERS:
        PartFolder(folder / name, "").clear()
        _remove_if_empty(folder / name)
    (folder / MANIFEST).unlink(missing_ok=True)
    _remove_if_empty(folder)


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # files of others are kept
        folder.rmdir()
