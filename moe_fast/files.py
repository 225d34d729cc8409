"""Writing files and folders so that a reader never sees half of one."""

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

PARTIAL, PREVIOUS = ".partial", ".previous"  # endings of what a killed process leaves behind
_open_folders: set[Path] = set()  # temporary folders that this process is filling
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)
_NO_LOCKS = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.ENOLCK)
_LOCK_TITLE = "moe_fast writes here: "  # how a lock file begins


def check_output(path: str | os.PathLike[str], overwrite: bool = False) -> Path:
    """``path`` as the place of a new file or folder: call it before any work starts.

    Args:
        path: where the result will be. Its parent folders may be missing.
        overwrite: whether something that is there already may be replaced.

    Returns:
        ``path``.

    Raises:
        FileExistsError: for a file or a non-empty folder, unless ``overwrite``.
        NotADirectoryError: where a parent of ``path`` is a file.
        PermissionError: where nothing can be written.
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
    """Hold an output for this run until the block ends: a second run that asks for it is refused.

    The lock is one on the file ``.NAME.lock`` beside ``path`` (inside it, where ``path`` is a mount
    point or its parent cannot be written). It dies with the process, however that ends, and the
    file goes with the block; a file that a killed run left is taken over. Nothing is locked on a
    file system that has no locks.

    Args:
        path: the file or folder that will be written. Folders above it are created, and go again
            where nothing was put into them.

    Raises:
        RuntimeError: another run, in this process or another one, holds ``path``; it is named.
        FileExistsError, OSError: what stands in the place of the lock is not one of ours.
    """
    place = _lock_place(Path(path))
    made = [folder for folder in place.parents if not folder.exists()]
    place.parent.mkdir(parents=True, exist_ok=True)
    lock = _locked_file(place, path)
    try:
        yield
    finally:
        place.unlink(missing_ok=True)  # still locked: nobody else holds this very file
        os.close(lock)
        with contextlib.suppress(OSError):  # a folder that something was put into stays
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
    """A lock on the file ``place``, which says whose it is."""
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
        if _is_at(lock, place):  # else its holder removed it before it could be locked
            break
        os.close(lock)
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{_LOCK_TITLE}process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return lock


def _holder(lock: int, place: Path, path: str | os.PathLike[str]) -> str:
    """Whose lock a file is, for a message; an error for one that is none of ours."""
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
    """Whether an open file is still what ``path`` names."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside `path`, renamed to `path` when the block ends without an error.

    The folder is created where missing. After an error the old file, if any, is untouched and the
    temporary one is gone; one that a killed process left goes at the next call. Its name cannot be
    foreseen and nothing is there before, so that nobody's link is followed. The suffix stays the
    same, since some writers choose the format by it. A new file has the modes that the umask says,
    a replaced one keeps its own; in place of a link comes a file.

    Raises:
        IsADirectoryError: where ``path`` is a folder.
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
        _sync(temporary)  # or a power cut could leave the new name with no content
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
        os.close(lock)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 text file, whole or not at all: see :func:`atomic_write`."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _mode_of(path: Path) -> int | None:
    """The modes of a regular file; ``None`` where there is none."""
    try:
        found = path.lstat().st_mode
    except FileNotFoundError:
        return None
    return stat.S_IMODE(found) if stat.S_ISREG(found) else None


def _locked_temporary(path: Path, mode: int) -> tuple[Path, int]:
    """A new file beside ``path`` and a lock on it, which dies with this process."""
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
    """Give an empty temporary folder that takes the place of ``path`` when the block ends.

    Until then, and after an error, a full disk or a kill, the old folder is untouched. On Linux
    the two are exchanged in one step (``renameat2``); on a file system that cannot do that, in
    two: a kill between them leaves the old folder as ``.NAME.*.previous`` beside its place, and the
    next ``atomic_folder`` puts it back. What a killed process left behind goes at the next call.

    Files of the old folder that the new one has no file for are kept, as hard links, so an open
    log goes on. Only what another process adds in the instant of the exchange may be lost.

    Where ``path`` is a mount point, or its parent cannot be written, folders cannot be exchanged:
    the finished files are then moved into it one by one, each whole, with a warning.

    Inside another ``atomic_folder``'s temporary folder this gives ``path`` itself: all appears at
    once when the outer block ends.

    Args:
        path: the folder; created, with its parents, where missing. A link is followed.
        replaces: patterns (:mod:`fnmatch`, on paths relative to ``path``; "*" matches "/" too) of
            old files that do *not* outlive this: ("*",) for a folder replaced as a whole.

    Raises:
        NotADirectoryError: where ``path`` is a file.
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
        # After an exchange this name is the old folder's.
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(lock)


def _replaceable(folder: Path) -> bool:
    """Whether another folder can take the place of this one."""
    return os.access(folder.parent, os.W_OK | os.X_OK) and not os.path.ismount(folder)


def _locked_folder(place: Path, target: Path) -> tuple[Path, int]:
    """A new folder in ``place`` and a lock on it, which dies with this process."""
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
    """Remove what killed processes left of earlier saves; put a set-aside folder back."""
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
    except OSError:  # another process was faster, or it is none of ours
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
    """Link into ``new`` every file of ``old`` that it has none for and that is not replaced."""
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
    except OSError:  # a file system without hard links, or somebody else's file
        shutil.copy2(old, new, follow_symlinks=False)


def _exchange(temporary: Path, target: Path) -> None:
    """Put ``temporary`` in the place of ``target``, which takes the other's name."""
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
        os.chdir(here)  # or this process would stand in a removed folder


def _working_folder() -> Path | None:
    try:
        return Path.cwd()
    except FileNotFoundError:  # somebody removed it
        return None


def _exchanged_in_one_step(first: Path, second: Path) -> bool:
    """Swap two names with Linux's ``renameat2``; ``False`` where there is no such call."""
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
    """Have the disk take what was written to a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some cannot sync folders
            raise
    finally:
        os.close(descriptor)
