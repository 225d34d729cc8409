"""Files and folders are written whole or not at all, whatever happens meanwhile."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_fast import files
from moe_fast.files import atomic_folder, atomic_write, check_output, exclusive


def contents(folder: Path) -> dict[str, str]:
    """Every file below ``folder`` by its relative path."""
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def fill(folder: Path, **texts: str) -> Path:
    """Write files, "__" in a name standing for "/"."""
    for name, text in texts.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


class TestAtomicWrite:
    def test_an_error_leaves_the_old_file_and_no_other(self, tmp_path: Path) -> None:
        path = tmp_path / "table.md"
        path.write_text("old")
        with pytest.raises(RuntimeError), atomic_write(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError
        assert path.read_text() == "old"
        with atomic_write(path) as temporary:
            temporary.write_text("new")
            assert path.read_text() == "old"
        assert path.read_text() == "new"
        assert [file.name for file in tmp_path.iterdir()] == ["table.md"]

    def test_the_folder_is_made_and_the_suffix_kept(self, tmp_path: Path) -> None:
        path = tmp_path / "new" / "picture.png"
        with atomic_write(path) as temporary:
            assert temporary.suffix == ".png" and temporary.parent == path.parent
            temporary.write_bytes(b"x")
        assert path.read_bytes() == b"x"

    def test_a_planted_link_is_replaced_and_not_followed(self, tmp_path: Path) -> None:
        (tmp_path / "victim").write_text("precious")
        path = tmp_path / "table.md"
        path.symlink_to("victim")
        with atomic_write(path) as temporary:
            assert temporary.lstat().st_size == 0 and not temporary.is_symlink()
            temporary.write_text("new")
        assert (tmp_path / "victim").read_text() == "precious"
        assert path.read_text() == "new" and not path.is_symlink()

    def test_names_cannot_be_foreseen(self, tmp_path: Path) -> None:
        names = set()
        for _ in range(3):
            with atomic_write(tmp_path / "x") as temporary:
                names.add(temporary.name)
        assert len(names) == 3

    def test_modes_are_kept_and_new_files_follow_the_umask(self, tmp_path: Path) -> None:
        private, new = fill(tmp_path, private="old") / "private", tmp_path / "new"
        private.chmod(0o640)
        before = os.umask(0o027)
        try:
            for path in (private, new):
                with atomic_write(path) as temporary:
                    temporary.write_text("new")
                    if path == private:
                        assert temporary.stat().st_mode & 0o077 == 0, "nor readable meanwhile"
        finally:
            os.umask(before)
        assert private.stat().st_mode & 0o777 == 0o640
        assert new.stat().st_mode & 0o777 == 0o640

    def test_a_read_only_file_stays_one(self, tmp_path: Path) -> None:
        path = fill(tmp_path, x="old") / "x"
        path.chmod(0o444)
        with atomic_write(path) as temporary:
            temporary.write_text("new")
        assert path.read_text() == "new" and path.stat().st_mode & 0o777 == 0o444

    def test_what_a_killed_process_left_goes_and_other_files_stay(self, tmp_path: Path) -> None:
        left, living = ".x.0123abcd.partial.npy", ".x.4567abcd.partial.npy"
        others = [".x.npy", ".x.partial.npy", ".y.0123abcd.partial.npy", "x.0123abcd.partial.npy"]
        for name in (left, living, *others):
            (tmp_path / name).write_text("half")
        with exclusive_flock(tmp_path / living), atomic_write(tmp_path / "x.npy") as temporary:
            temporary.write_text("new")
        assert sorted(os.listdir(tmp_path)) == sorted([living, *others, "x.npy"])

    def test_a_folder_in_its_place_is_an_error(self, tmp_path: Path) -> None:
        (tmp_path / "x").mkdir()
        with pytest.raises(IsADirectoryError, match="x must be a file"):
            atomic_write(tmp_path / "x").__enter__()


@contextlib.contextmanager
def exclusive_flock(path: Path) -> Iterator[None]:
    """Hold a file as a living process does."""
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class TestExclusive:
    def test_a_second_run_is_refused_by_name_and_the_next_is_not(self, tmp_path: Path) -> None:
        path = tmp_path / "made" / "x.npy"
        with exclusive(path):
            with (
                pytest.raises(RuntimeError, match=rf"x.npy is being .*\(process {os.getpid()} on"),
                exclusive(path),
            ):
                pass
            with exclusive(path.with_name("y.npy")):
                pass
            assert os.listdir(path.parent) == [".x.npy.lock"]
        assert os.listdir(tmp_path) == [], "a folder that it made goes again"
        with exclusive(path):
            path.write_text("result")
        assert os.listdir(path.parent) == ["x.npy"]

    def test_it_dies_with_its_process(self, tmp_path: Path) -> None:
        code = (
            "import os, signal, files\n"
            f"with files.exclusive({str(tmp_path / 'x')!r}): os.kill(os.getpid(), signal.SIGKILL)"
        )
        subprocess.run([sys.executable, "-c", code], cwd=Path(files.__file__).parent)
        assert os.listdir(tmp_path) == [".x.lock"]
        with exclusive(tmp_path / "x"):
            assert str(os.getpid()) in (tmp_path / ".x.lock").read_text()
        assert os.listdir(tmp_path) == []

    def test_a_folder_has_one_lock_under_all_its_names(self, tmp_path: Path) -> None:
        (tmp_path / "real").mkdir()
        (tmp_path / "latest").symlink_to("real")
        with (
            exclusive(tmp_path / "latest"),
            pytest.raises(RuntimeError, match="another run"),
            exclusive(tmp_path / "real"),
        ):
            pass

    def test_a_mount_point_is_locked_inside_and_counts_as_empty(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "mount"
        path.mkdir()
        monkeypatch.setattr(os.path, "ismount", lambda given: Path(given) == path)
        with exclusive(path):
            assert check_output(path) == path
            with atomic_folder(path, replaces=["*"]) as temporary:
                fill(temporary, a="new")
            assert sorted(os.listdir(path)) == [".mount.lock", "a"]
        assert os.listdir(path) == ["a"]

    @pytest.mark.parametrize("plant", ["text", "symlink", "hard link", "folder"])
    def test_what_is_no_lock_is_refused_and_kept(self, tmp_path: Path, plant: str) -> None:
        fill(tmp_path, victim="" if plant == "hard link" else "precious")
        victim, place = tmp_path / "victim", tmp_path / ".x.lock"
        if plant == "text":
            place.write_text("precious")
        elif plant == "symlink":
            place.symlink_to("victim")
        elif plant == "hard link":
            os.link(victim, place)
        else:
            place.mkdir()
        content = victim.read_text()
        with pytest.raises(OSError, match=r"\.x\.lock"), exclusive(tmp_path / "x"):
            pass
        assert victim.read_text() == content and os.path.lexists(place)


class TestAtomicFolder:
    def test_a_new_folder_is_there_whole_or_not(self, tmp_path: Path) -> None:
        path = tmp_path / "made" / "too" / "model"
        with atomic_folder(path) as temporary:
            fill(temporary, a="1", sub__b="2")
            assert not path.exists()
        assert contents(path) == {"a": "1", "sub/b": "2"}
        assert os.listdir(path.parent) == ["model"]

    @pytest.mark.parametrize("one_step", [True, False], ids=["exchange", "two renames"])
    def test_it_takes_the_old_folders_place_and_other_files_stay(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_step: bool
    ) -> None:
        if not one_step:
            monkeypatch.setattr(files, "_exchanged_in_one_step", lambda first, second: False)
        path = fill(tmp_path / "model", a="old", stale="old", mine="mine", logs__x="log")
        path.chmod(0o750)
        (path / "link").symlink_to("mine")
        (path / "folder_link").symlink_to("logs")
        inode = (path / "mine").stat().st_ino
        with atomic_folder(path, replaces=["stale"]) as temporary:
            fill(temporary, a="new", sub__b="2")
            assert contents(path)["a"] == "old"
        assert contents(path) == {
            **{"a": "new", "sub/b": "2", "mine": "mine", "logs/x": "log"},
            **{"link": "mine"},
        }
        assert (path / "mine").stat().st_ino == inode, "an open log goes on in the same file"
        assert os.readlink(path / "folder_link") == "logs"
        assert path.stat().st_mode & 0o777 == 0o750
        assert os.listdir(tmp_path) == ["model"]

    def test_everything_may_be_replaced(self, tmp_path: Path) -> None:
        path = fill(tmp_path / "index", a="old", deep__er__b="old")
        with atomic_folder(path, replaces=["*"]) as temporary:
            fill(temporary, c="new")
        assert contents(path) == {"c": "new"}

    def test_without_hard_links_files_are_copied(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*args: object, **kwargs: object) -> None:
            raise OSError(errno.EPERM, "no hard links here")

        monkeypatch.setattr(os, "link", refuse)
        path = fill(tmp_path / "model", mine="mine")
        with atomic_folder(path) as temporary:
            fill(temporary, a="new")
        assert contents(path) == {"a": "new", "mine": "mine"}

    @pytest.mark.parametrize("error", [RuntimeError(), KeyboardInterrupt(), OSError(errno.ENOSPC)])
    def test_an_error_leaves_the_old_folder_and_no_other(
        self, tmp_path: Path, error: BaseException
    ) -> None:
        path = fill(tmp_path / "model", a="old")
        with pytest.raises(type(error)), atomic_folder(path) as temporary:
            fill(temporary, a="half")
            raise error
        assert contents(path) == {"a": "old"}
        assert os.listdir(tmp_path) == ["model"]

    def test_an_error_between_two_renames_is_undone(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = fill(tmp_path / "model", a="old")
        rename = os.rename

        def fail_on_new(source: Path, target: Path) -> None:
            if Path(source).suffix == files.PARTIAL:
                raise OSError(errno.EIO, "broken disk")
            rename(source, target)

        monkeypatch.setattr(files, "_exchanged_in_one_step", lambda first, second: False)
        monkeypatch.setattr(os, "rename", fail_on_new)
        with pytest.raises(OSError, match="broken disk"), atomic_folder(path) as temporary:
            fill(temporary, a="new")
        assert contents(path) == {"a": "old"}
        assert os.listdir(tmp_path) == ["model"]

    def test_a_link_is_followed_and_kept(self, tmp_path: Path) -> None:
        real = fill(tmp_path / "real", a="old")
        (tmp_path / "latest").symlink_to("real")
        with atomic_folder(tmp_path / "latest") as temporary:
            fill(temporary, a="new")
        assert os.readlink(tmp_path / "latest") == "real"
        assert contents(real) == {"a": "new"}

    def test_the_working_folder_itself(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = fill(tmp_path / "model", sub__a="old")
        monkeypatch.chdir(path / "sub")
        with atomic_folder("..") as temporary:
            fill(temporary, b="new")
        assert Path("a").read_text() == "old" and Path("../b").read_text() == "new"

    def test_a_file_in_its_place_is_an_error(self, tmp_path: Path) -> None:
        (tmp_path / "model").write_text("text")
        with pytest.raises(NotADirectoryError, match="model must be a folder"):
            atomic_folder(tmp_path / "model").__enter__()

    def test_nested(self, tmp_path: Path) -> None:
        path = fill(tmp_path / "model", inner__a="old", b="old")
        with atomic_folder(path) as outer, atomic_folder(outer / "inner") as inner:
            fill(inner, a="new")
            assert contents(path) == {"inner/a": "old", "b": "old"}
        assert contents(path) == {"inner/a": "new", "b": "old"}

    def test_a_mount_point_gets_its_files_one_by_one(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = fill(tmp_path / "model", a="old", stale="old", mine="mine")
        monkeypatch.setattr(os.path, "ismount", lambda given: Path(given) == path)
        inode = path.stat().st_ino
        with atomic_folder(path, replaces=["a", "stale"]) as temporary:
            fill(temporary, a="new", sub__b="2")
        assert contents(path) == {"a": "new", "sub/b": "2", "mine": "mine"}
        assert path.stat().st_ino == inode
        assert "mount point" in caplog.text


# Saves {a, sub/b} over an old folder and is killed at the named step.
KILLED = """
import os, shutil, signal, sys
from pathlib import Path
import files  # the module alone: the package would load torch

path, step, one_step = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "True"
if not one_step:
    files._exchanged_in_one_step = lambda first, second: False

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

if step == "sync":
    files._sync_tree = die
elif step == "keep":
    files._link = die
elif step == "exchange":
    files._exchange = die
elif step == "between":
    rename, calls = os.rename, []
    def second(*args):
        calls.append(args)
        die() if len(calls) == 2 else rename(*args)
    os.rename = second
elif step == "remove":
    shutil.rmtree = die
with files.atomic_folder(path) as temporary:
    (temporary / "a").write_text("new")
    if step == "write":
        die()
    (temporary / "sub").mkdir()
    (temporary / "sub" / "b").write_text("new")
"""
OLD = {"a": "old", "sub/b": "old", "mine": "mine"}
NEW = {"a": "new", "sub/b": "new", "mine": "mine"}


@pytest.mark.parametrize(
    ("step", "one_step", "left"),
    [
        ("write", True, OLD),
        ("sync", True, OLD),
        ("keep", True, OLD),
        ("exchange", True, OLD),
        ("remove", True, NEW),
        ("between", False, None),
        ("remove", False, NEW),
    ],
)
def test_a_killed_save_leaves_one_of_the_two_whole_and_the_next_clears_up(
    tmp_path: Path, step: str, one_step: bool, left: dict[str, str] | None
) -> None:
    path = fill(tmp_path / "model", a="old", sub__b="old", mine="mine")
    command = [sys.executable, "-c", KILLED, str(path), step, str(one_step)]
    beside = Path(files.__file__).parent
    assert subprocess.run(command, cwd=beside).returncode == -signal.SIGKILL
    if left is None:  # between two renames the old folder stands beside its place
        assert not path.exists()
        assert [contents(p) for p in tmp_path.glob(f".model.*{files.PREVIOUS}")] == [OLD]
    else:
        assert contents(path) == left
    assert len(os.listdir(tmp_path)) == 2, "the killed process left something recognisable"
    with pytest.raises(RuntimeError), atomic_folder(path):
        assert contents(path) == (left or OLD)
        raise RuntimeError
    assert os.listdir(tmp_path) == ["model"]


def test_a_living_process_keeps_its_temporary_folder(tmp_path: Path) -> None:
    path = tmp_path / "model"
    with atomic_folder(path) as slow:
        fill(slow, a="slow")
        with atomic_folder(path) as quick:
            fill(quick, b="quick")
        assert contents(path) == {"b": "quick"}
        assert contents(slow) == {"a": "slow"}
    assert contents(path) == {"a": "slow", "b": "quick"}


class TestCheckOutput:
    def test_what_is_not_there_is_free(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        for free in ("new", "deep/er/new.json", "empty"):
            assert check_output(str(tmp_path / free)) == tmp_path / free
        assert os.listdir(tmp_path) == ["empty"], "nothing is created"

    def test_what_is_there_is_kept_unless_told_otherwise(self, tmp_path: Path) -> None:
        fill(tmp_path, file="x", folder__file="x")
        (tmp_path / "dangling").symlink_to("nowhere")
        for taken in ("file", "folder", "dangling"):
            with pytest.raises(FileExistsError, match=rf"{taken} exists already.*--overwrite"):
                check_output(tmp_path / taken)
            assert check_output(tmp_path / taken, overwrite=True) == tmp_path / taken

    def test_a_place_that_cannot_be(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        fill(tmp_path, file="x")
        with pytest.raises(NotADirectoryError, match="file is not a folder"):
            check_output(tmp_path / "file" / "below")
        monkeypatch.setattr(os, "access", lambda path, mode: False)
        with pytest.raises(PermissionError, match="no permission"):
            check_output(tmp_path / "new" / "file")
