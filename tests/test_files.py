"""atomic_write: whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_fast.files import atomic_write


def test_an_error_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
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


def test_the_folder_is_made_and_the_suffix_kept(tmp_path: Path) -> None:
    path = tmp_path / "new" / "picture.png"
    with atomic_write(path) as temporary:
        assert temporary.suffix == ".png" and temporary.parent == path.parent
        temporary.write_bytes(b"x")
    assert path.read_bytes() == b"x"
