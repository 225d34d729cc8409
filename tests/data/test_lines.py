"""Files that are no text files, or that would unfold without end."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest

from moe_fast.data import lines
from moe_fast.data.lines import check_file, open_binary, read_lines


@pytest.mark.parametrize(
    ("encoding", "said"),
    [("utf-16", "UTF-16"), ("utf-32", "UTF-32"), ("utf-16-le", "UTF-16"), ("latin-1", "UTF-8")],
)
def test_other_encodings_are_named(tmp_path: Path, encoding: str, said: str):
    path = tmp_path / "t.csv"
    path.write_bytes("a,b\nü,y\n".encode(encoding))
    with pytest.raises(ValueError, match=rf"t\.csv, line [12]: .*{said}"):
        list(read_lines(path))


def test_what_is_no_file(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "pipe.jsonl")
    for name, message in [
        ("pipe.jsonl", "is a pipe or a device, not a regular file"),
        ("link.jsonl", "is a pipe or a device"),
        (".", "is a folder, not a regular file"),
        ("x" * 300, "path='.*File name too long"),
        ("\0", "path='.*null"),
    ]:
        with pytest.raises(ValueError, match=message):
            open_binary(tmp_path / name)
    with pytest.raises(ValueError, match="is a pipe or a device"):
        check_file(Path(os.devnull))
    with pytest.raises(FileNotFoundError, match="no such file: .*none"):
        check_file(tmp_path / "none")


@pytest.mark.parametrize("text", [b"\0", b"x\n"])
def test_a_gzip_file_that_unfolds_without_end_is_refused(
    tmp_path: Path, text: bytes, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(lines, "BOMB_BYTES", 1 << 20)
    (tmp_path / "t.jsonl.gz").write_bytes(gzip.compress(text * (1 << 22)))
    with pytest.raises(ValueError, match=r"t\.jsonl\.gz: unfolds to more than 200 times its size"):
        list(read_lines(tmp_path / "t.jsonl.gz"))


def test_a_line_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lines, "MAX_LINE", 100)
    (tmp_path / "t.txt").write_bytes(b"x" * 99 + b"\n" + b"x" * 101)
    with pytest.raises(ValueError, match=r"t\.txt, line 2: longer than 100 bytes"):
        list(read_lines(tmp_path / "t.txt"))


def test_lines_that_are_no_text_are_passed_over_on_request(tmp_path: Path):
    (tmp_path / "t.txt").write_bytes(b"one\n\xff\nthree\n")
    wrong: list[ValueError] = []
    assert list(read_lines(tmp_path / "t.txt", wrong.append)) == [(1, "one\n"), (3, "three\n")]
    assert [", line 2: not UTF-8" in str(error) for error in wrong] == [True]
