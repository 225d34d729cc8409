"""Writes files and folders such that a reader never sees an incomplete one."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import secrets
import shutil
import socket
import stat
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path

logger = logging.getLogger(__name__)

PARTIAL, PREVIOUS = ".partial", ".previous"  # endings of files that a killed process leaves
_open_folders: set[Path] = set()  # temporary folders that this process is filling
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)
_NO_LOCKS = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.ENOLCK)
_LOCK_TITLE = "moe_fast writes here: "  # how a lock file begins


def check_output(path: str | os.PathLike[str], overwrite: bool = False) -> Path:
    """Check that a new file or folder can be written to ``path``; call it before any work starts.

    Args:
        path: where the result will be. Its parent folders may be missing.
        overwrite: whether a file or folder that exists there may be replaced.

    Returns:
        ``path``.

    Raises:
        FileExistsError: a file or a non-empty folder is there, and ``overwrite`` is False.
        NotADirectoryError: a parent of ``path`` is a file.
        PermissionError: writing there is not permitted.
    """
    path = Path(path)
    is_folder = path.is_dir()
    is_empty = is_folder and all(entry.name == _lock_name(path) for entry in path.iterdir())
    if os.path.lexists(path) and not overwrite and not is_empty:
        raise FileExistsError(
            f"{path} exists already and is kept. Choose another path, or pass overwrite=True "
            "(--overwrite) to replace it."
        )
    folder = path if is_folder else path.parent
    while not os.path.lexists(folder):
        folder = folder.parent
    if not folder.is_dir():
        raise NotADirectoryError(f"{path} cannot be written: {folder} is not a folder.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{path} cannot be written: no permission to write in {folder}.")
    return path


@contextlib.contextmanager
def exclusive(path: str | os.PathLike[str]) -> Iterator[None]:
    """Lock an output for this run until the block ends; another run that asks for it is refused.

    The lock is on the file ``.NAME.lock`` beside ``path`` (inside it, if ``path`` is a mount point
    or its parent cannot be written). The lock ends with the process, however that ends; the file is
    removed at the end of the block. A file that a killed run left is reused. On a file system
    without locks nothing is locked.

    Args:
        path: the file or folder that will be written. Folders above it are created; those that are
            still empty at the end are removed.

    Raises:
        RuntimeError: another run, in this process or another one, has locked ``path``; the message
            names it.
        FileExistsError, OSError: something other than a lock file of ours has the lock file's name.
    """
    place = _lock_place(Path(path))
    made = [folder for folder in place.parents if not folder.exists()]
    place.parent.mkdir(parents=True, exist_ok=True)
    lock = _locked_file(place, path)
    try:
        yield
    finally:
        place.unlink(missing_ok=True)  # still locked, so no other run holds this file
        os.close(lock)
        with contextlib.suppress(OSError):  # folders that are not empty stay
            for folder in made:
                folder.rmdir()


def _lock_place(path: Path) -> Path:
    target = Path(os.path.realpath(path)) if path.is_dir() else path
    parent = Path(os.path.realpath(target.parent))
    if target.is_dir() and not _replaceable(target):
        parent = target
    return parent / _lock_name(target)


def _lock_name(target: Path) -> str:
    return f".{target.name}.lock"


def _locked_file(place: Path, path: str | os.PathLike[str]) -> int:
    """Create and lock the file ``place``; it then names this process."""
    import fcntl  # POSIX alone

    while True:
        lock = os.open(place, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        try:
            holder = _holder(lock, place, path)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise RuntimeError(
                f"{path} is being written by another run ({holder}). Wait for it, or choose "
                "another output."
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(lock)
                raise
        if _is_at(lock, place):  # else its holder removed it before it was locked
            break
        os.close(lock)
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{_LOCK_TITLE}process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return lock


def _holder(lock: int, place: Path, path: str | os.PathLike[str]) -> str:
    """Return who holds a lock file, for a message.

    Raises ``FileExistsError`` if the file is not a lock file of ours.
    """
    about = os.fstat(lock)
    regular = stat.S_ISREG(about.st_mode) and about.st_nlink <= 1
    found = os.pread(lock, 500, 0).decode("utf-8", "replace") if regular else ""
    if not regular or (found and not found.startswith(_LOCK_TITLE)):
        raise FileExistsError(
            f"{place} is where the lock on {path} belongs, and holds something else. Move it away."
        )
    holder = found.removeprefix(_LOCK_TITLE).strip()
    return "".join(c if c.isprintable() else "?" for c in holder) or "which began just now"


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether ``path`` still names this open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``, and rename it to ``path`` at the end of the block.

    The folder is created if it is missing. After an error an old file is unchanged, and the
    temporary file is removed; one that a killed process left is removed by the next call. The
    temporary name is random and must be new, so no existing link is followed. It has the suffix of
    ``path``, because some writers choose the format by it. A new file gets the mode that the umask
    allows; a replaced file keeps its mode; a link is replaced by a file.

    Raises:
        IsADirectoryError: ``path`` is a folder.
    """
    path = Path(path)
    if path.is_dir() and not path.is_symlink():
        raise IsADirectoryError(f"{path} must be a file; it is a folder.")
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(
        f".{escape(path.stem)}.????????{PARTIAL}{escape(path.suffix)}"
    ):
        _remove_unlocked(leftover)
    mode = _mode_of(path)
    temporary, lock = _locked_temporary(path, 0o666 if mode is None else 0o600)
    try:
        yield temporary
        if mode is not None:
            temporary.chmod(mode)
        _sync(temporary)  # else a power cut could leave an empty file under the new name
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
        os.close(lock)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 text file, completely or not at all; see :func:`atomic_write`."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _mode_of(path: Path) -> int | None:
    """Return the mode of a regular file; ``None`` if ``path`` is not one."""
    try:
        found = path.lstat().st_mode
    except FileNotFoundError:
        return None
    return stat.S_IMODE(found) if stat.S_ISREG(found) else None


def _locked_temporary(path: Path, mode: int) -> tuple[Path, int]:
    """Create a new file beside ``path``, and lock it until this process ends."""
    import fcntl

    while True:
        temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{PARTIAL}{path.suffix}")
        try:
            lock = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
        except FileExistsError:
            continue
        with contextlib.suppress(OSError):  # no locks on this file system: nothing is cleared
            fcntl.flock(lock, fcntl.LOCK_EX)
        if _is_at(lock, temporary):  # it may have been cleared before it was locked
            return temporary, lock
        os.close(lock)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str], *, replaces: Sequence[str] = ()) -> Iterator[Path]:
    """Yield an empty temporary folder that replaces ``path`` when the block ends.

    Until then, and after an error, a full disk or a kill, the old folder is unchanged. On Linux the
    two are exchanged in one step (``renameat2``). On a file system that cannot do that, it takes
    two steps; a kill between them leaves the old folder as ``.NAME.*.previous`` beside its place,
    and the next ``atomic_folder`` restores it. The next call also removes what a killed process
    left.

    Files of the old folder that are missing in the new one are kept as hard links, so an open log
    continues. Only a file that another process adds during the exchange may be lost.

    If ``path`` is a mount point, or its parent cannot be written, folders cannot be exchanged: the
    finished files are then moved into it one by one, with a warning.

    Inside another ``atomic_folder``'s temporary folder this yields ``path`` itself; everything
    appears at once when the outer block ends.

    Args:
        path: the folder; it is created, with its parents, if it is missing. A link is followed.
        replaces: patterns (:mod:`fnmatch`, on paths relative to ``path``; "*" matches "/" too) of
            old files that are *not* kept: ("*",) to replace the folder as a whole.

    Raises:
        NotADirectoryError: ``path`` is a file.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{path} must be a folder; it is a file.")
    if any(target.is_relative_to(folder) for folder in _open_folders):
        target.mkdir(parents=True, exist_ok=True)
        yield target
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    replaceable = _replaceable(target)
    place = target.parent if replaceable else target
    _clear_leftovers(place, target)
    temporary, lock = _locked_folder(place, target)
    _open_folders.add(temporary)
    try:
        yield temporary
        _sync_tree(temporary)
        if replaceable:
            _keep_others(target, temporary, replaces)
            _exchange(temporary, target)
        else:
            _move_files(temporary, target, replaces)
        _sync(place)
    finally:
        _open_folders.discard(temporary)
        # After an exchange this is the name of the old folder.
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(lock)


def move_folder(folder: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Give a finished folder the name ``path``; a folder that has this name is removed.

    Both must be on one file system. On Linux the two are exchanged in one step; see
    :func:`atomic_folder`.

    Raises:
        NotADirectoryError: ``path`` is a file.
    """
    folder, target = Path(folder), Path(os.path.realpath(path))
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{path} must be a folder; it is a file.")
    _sync(folder)
    replaces = target.exists()
    _exchange(folder, target)
    _sync(target.parent)
    if replaces:  # the old one has the name of the new one now
        shutil.rmtree(folder)


def _replaceable(folder: Path) -> bool:
    """Whether this folder can be replaced by another one."""
    return os.access(folder.parent, os.W_OK | os.X_OK) and not os.path.ismount(folder)


def _locked_folder(place: Path, target: Path) -> tuple[Path, int]:
    """Create a new folder in ``place``, and lock it until this process ends."""
    import fcntl  # POSIX alone

    while True:
        folder = place / f".{target.name}.{secrets.token_hex(4)}{PARTIAL}"
        folder.mkdir()
        lock = os.open(folder, os.O_RDONLY)
        with contextlib.suppress(OSError):  # no locks on this file system: nothing is cleared
            fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():  # it may have been cleared before it was locked
            return folder, lock
        os.close(lock)


def _clear_leftovers(place: Path, target: Path) -> None:
    """Remove what killed processes left of earlier saves, or restore an old folder set aside."""
    for leftover in sorted(place.glob(f".{escape(target.name)}.????????.*")):
        if leftover.suffix == PREVIOUS and not target.exists():
            logger.warning("%s: an interrupted save is undone, the old folder put back.", target)
            os.rename(leftover, target)
        elif leftover.suffix in (PARTIAL, PREVIOUS):
            _remove_unlocked(leftover)


def _remove_unlocked(leftover: Path) -> None:
    """Remove a file or folder unless a living process has locked it."""
    import fcntl

    try:
        lock = os.open(leftover, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:  # already removed by another process, or not ours
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if stat.S_ISDIR(os.fstat(lock).st_mode):
            shutil.rmtree(leftover, ignore_errors=True)
        elif stat.S_ISREG(os.fstat(lock).st_mode):
            leftover.unlink(missing_ok=True)
    except OSError:
        return
    finally:
        os.close(lock)


def _keep_others(old: Path, new: Path, replaces: Sequence[str]) -> None:
    """Link into ``new`` each file of ``old`` that it lacks and that ``replaces`` does not match."""
    if not old.exists():
        return
    for folder, folders, files in os.walk(old):
        relative = Path(folder).relative_to(old)
        linked = [name for name in folders if Path(folder, name).is_symlink()]
        for name in files + linked:
            place = new / relative / name
            if os.path.lexists(place) or _matches(relative / name, replaces):
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            _link(Path(folder, name), place)
        if (new / relative).is_dir():
            shutil.copymode(folder, new / relative)


def _matches(path: Path, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(path.as_posix(), pattern) for pattern in patterns)


def _link(old: Path, new: Path) -> None:
    try:
        os.link(old, new, follow_symlinks=False)
    except OSError:  # a file system without hard links, or another user's file
        shutil.copy2(old, new, follow_symlinks=False)


def _exchange(temporary: Path, target: Path) -> None:
    """Exchange the names of ``temporary`` and ``target``."""
    here = _working_folder()
    if not target.exists():
        os.rename(temporary, target)
    elif not _exchanged_in_one_step(temporary, target):
        previous = temporary.with_suffix(PREVIOUS)
        os.rename(target, previous)
        try:
            os.rename(temporary, target)
        except OSError:
            os.rename(previous, target)
            raise
        os.rename(previous, temporary)
    if here is not None and here.is_relative_to(target) and here.is_dir():
        os.chdir(here)  # else the working folder would be the removed one


def _working_folder() -> Path | None:
    try:
        return Path.cwd()
    except FileNotFoundError:  # somebody removed it
        return None


def _exchanged_in_one_step(first: Path, second: Path) -> bool:
    """Exchange two names by Linux's ``renameat2``; return ``False`` if that is not supported."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    at_cwd, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if call(at_cwd, os.fsencode(first), at_cwd, os.fsencode(second), exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(first), None, str(second))


def _move_files(temporary: Path, target: Path, replaces: Sequence[str]) -> None:
    logger.warning(
        "%s is a mount point, or its parent cannot be written: its files are replaced one by one, "
        "not all at once.",
        target,
    )
    new = [path.relative_to(temporary) for path in temporary.rglob("*") if not path.is_dir()]
    for path in new:
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        os.replace(temporary / path, target / path)
    for path in [p for p in target.rglob("*") if not p.is_dir()]:
        relative = path.relative_to(target)
        held = relative.name == _lock_name(target)  # its holder removes it
        if not held and relative not in new and _matches(relative, replaces):
            path.unlink()


def _sync_tree(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        if not path.is_symlink():
            _sync(path)


def _sync(path: Path) -> None:
    """Make the disk store what was written to a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some cannot sync folders
            raise
    finally:
        os.close(descriptor)
