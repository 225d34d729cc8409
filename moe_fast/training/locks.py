"""Locks a folder of checkpoints, so that only one run at a time writes to it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

_held: set[tuple[int, int]] = set()  # (device, inode) of the folders that this process holds


@contextlib.contextmanager
def hold_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Lock a folder, which is made if missing, until the block ends or the process dies.

    The kernel holds the lock (``flock`` on the folder itself), so that there is no lock file, and
    nothing is left after a kill. Blocks of one process on the same folder may be nested. A file
    system without locks is not an error: the folder is then not locked.

    Raises:
        BlockingIOError: another process has locked the folder; the error names it.
    """
    import fcntl  # exists only on POSIX systems

    path = Path(folder)
    while True:
        path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDONLY)
        try:
            key = _identity(os.fstat(descriptor))
            if key in _held:
                yield path
                return
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise BlockingIOError(
                    f"another training run is writing to {path}; it goes on undisturbed. "
                    "Choose another output, or wait until it has ended."
                ) from error
            except OSError:  # no locks on this file system
                pass
            if not path.is_dir() or _identity(path.stat()) != key:
                continue  # it was replaced before it was locked
            _held.add(key)
            try:
                yield path
            finally:
                _held.discard(key)
                with contextlib.suppress(OSError):  # unlocks it for forked processes, too
                    fcntl.flock(descriptor, fcntl.LOCK_UN)
            return
        finally:
            os.close(descriptor)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
