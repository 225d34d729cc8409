"""The chunks of an unfinished ``embed_file``, in a folder beside its output."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_fast.files import atomic_write

_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Parts:
    """The folder ``OUTPUT.parts``: a manifest, and per finished chunk its vectors and ids.

    Attributes:
        output: the file that the chunks are for.
        dimension, dtype: of the vectors.
    """

    output: Path
    dimension: int
    dtype: str

    @property
    def folder(self) -> Path:
        """Where the chunks are."""
        return self.output.with_name(f"{self.output.name}.parts")

    def open(
        self,
        manifest: dict[str, Any],
        *,
        threads: int | None,
        default_threads: int,
        overwrite: bool,
    ) -> int:
        """Begin, or go on with an interrupted run of the same manifest.

        Returns:
            The number of threads to compute with: `threads`, or the interrupted run's, or the
            default.

        Raises:
            FileExistsError: the chunks of a run with another manifest, unless `overwrite`; the
                message names what differs.
        """
        before = self._read_manifest()
        if before is not None and threads is None:
            default_threads = before.get("threads", default_threads)
        threads = threads or default_threads
        manifest = {**manifest, "threads": threads}
        differing = sorted(
            key
            for key in manifest.keys() | (before or {}).keys()
            if (before or {}).get(key) != manifest.get(key)
        )
        if before is None or differing:
            if self._has_chunks() and not overwrite:
                raise FileExistsError(
                    f"{self.folder} holds the chunks of an interrupted run that differs from this "
                    f"one in {_changes(before or {}, manifest, differing)}. Run with the same "
                    "settings to go on with it, or with overwrite (--overwrite) to discard it."
                )
            shutil.rmtree(self.folder, ignore_errors=True)
            with atomic_write(self.folder / _MANIFEST) as temporary:
                temporary.write_text(json.dumps(manifest, indent=2), encoding="utf-8")
        return threads

    def write(self, number: int, vectors: NDArray[np.floating], ids: list[str]) -> None:
        """Keep chunk `number`: vectors [n, d] and n ids."""
        # The ids first: a chunk whose vectors are there is finished.
        with atomic_write(self._path(number, ".json")) as temporary:
            temporary.write_text(json.dumps(ids), encoding="utf-8")
        with atomic_write(self._path(number, ".npy")) as temporary:
            np.save(temporary, vectors, allow_pickle=False)

    def holds(self, number: int, rows: int) -> bool:
        """Whether chunk `number` is there and has as many rows."""
        path = self._path(number, ".npy")
        if not path.exists():
            return False
        try:
            found = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError, OSError):  # after a power cut, say: compute it again
            return False
        return found.shape == (rows, self.dimension) and found.dtype == self.dtype

    def read(self, chunks: int) -> Iterator[tuple[list[str], NDArray[np.floating]]]:
        """Yield (ids, vectors) of the chunks, in order."""
        for number in range(chunks):
            ids = json.loads(self._path(number, ".json").read_text(encoding="utf-8"))
            yield ids, np.load(self._path(number, ".npy"), allow_pickle=False)

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder)

    def _path(self, number: int, suffix: str) -> Path:
        return self.folder / f"{number:08d}{suffix}"

    def _has_chunks(self) -> bool:
        return any(self.folder.glob("*.npy"))

    def _read_manifest(self) -> dict[str, Any] | None:
        try:
            return json.loads((self.folder / _MANIFEST).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None


def _changes(before: dict[str, Any], now: dict[str, Any], names: list[str]) -> str:
    """What differs, by name; hashes are not shown."""
    shown = [
        name
        if name in ("source", "model")
        else f"{name} ({before.get(name)!r} then, {now.get(name)!r} now)"
        for name in names
    ]
    return ", ".join(shown)
