"""Files of vectors, piece by piece."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moe_fast.inference.vectors import open_vectors, write_vectors

RNG = np.random.default_rng(0)


def pieces_of(array, size):
    for start in range(0, len(array), size):
        part = array[start : start + size]
        yield [f"x{i}" for i in range(start, start + len(part))], part


def read(path):
    vectors = open_vectors(path)
    pieces = list(vectors.pieces())
    ids = [key for keys, _ in pieces for key in keys]
    return vectors, ids, np.concatenate([rows for _, rows in pieces])


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("size", [1, 7, 5000, 9001])
def test_what_is_written_is_read(suffix, dtype, size, tmp_path):
    array = RNG.standard_normal((9000 if size > 7 else 20, 3)).astype(dtype)
    path = tmp_path / f"v{suffix}"
    write_vectors(path, pieces_of(array, size), array.shape)
    vectors, ids, rows = read(path)
    assert (vectors.rows, vectors.dimension) == array.shape
    np.testing.assert_array_equal(rows, array)
    assert rows.dtype == dtype
    assert vectors.has_ids and ids == [f"x{i}" for i in range(len(array))]
    if suffix == ".npy":  # numpy itself reads the file
        np.testing.assert_array_equal(np.load(path), array)


def test_parquet_of_others_without_ids(tmp_path):
    lists = pa.array([[1.0, 2.0], [3.0, 4.0]], pa.list_(pa.float64()))
    pq.write_table(pa.table({"embedding": lists, "other": [1, 2]}), tmp_path / "v.parquet")
    vectors, ids, rows = read(tmp_path / "v.parquet")
    assert (vectors.dimension, ids, rows.tolist()) == (2, ["0", "1"], [[1.0, 2.0], [3.0, 4.0]])


def test_pieces_that_do_not_add_up_leave_no_file(tmp_path):
    with pytest.raises(ValueError, match="expected 5 rows, got 4; did the source change"):
        write_vectors(tmp_path / "v.npy", pieces_of(np.zeros((4, 2)), 2), (5, 2))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "v.npy"
    write_vectors(path, pieces_of(np.zeros((4, 2)), 2), (4, 2))
    before = path.read_bytes()

    def pieces():
        yield from pieces_of(np.ones((2, 2)), 2)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_vectors(path, pieces(), (4, 2))
    assert path.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["v.npy", "v.npy.ids.jsonl"]
    assert read(path)[1] == ["x0", "x1", "x2", "x3"]


def test_ids_of_any_text_come_back(tmp_path):
    ids = ["a b", "line\nfeed", '"quoted"', "\u2028", "中文", "0"]
    write_vectors(tmp_path / "v.npy", [(ids, np.zeros((6, 2)))], (6, 2))
    assert read(tmp_path / "v.npy")[1] == ids


def test_npy_of_others_has_row_numbers(tmp_path):
    np.save(tmp_path / "v.npy", np.zeros((3, 2)))
    vectors, ids, _ = read(tmp_path / "v.npy")
    assert not vectors.has_ids and ids == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('"a"\n"b"\n', "2 ids, but .*v.npy has 3 rows"),
        ('"a"\n"b"\n"c"\n"d"\n', "4 ids"),
        ('"a"\nb\n"c"\n', "line 2: must be an id as a JSON string; got 'b'"),
        ('"a"\n2\n"c"\n', "line 2: must be an id"),
        ('"a"\n\n"c"\n', "line 2: must be an id"),
        ('"a"\n""\n"c"\n', "line 2: must be an id"),
        ("[" * 100_000, "line 1: must be an id"),
    ],
)
def test_ids_that_do_not_fit_the_rows(content, message, tmp_path):
    np.save(tmp_path / "v.npy", np.zeros((3, 2)))
    (tmp_path / "v.npy.ids.jsonl").write_text(content)
    with pytest.raises(ValueError, match=f"v.npy.ids.jsonl.*{message}"):
        open_vectors(tmp_path / "v.npy")


def test_new_ids_never_lie_beside_old_vectors(tmp_path, monkeypatch):
    """A kill between the two renames leaves ids alone, and the next run writes both."""
    path = tmp_path / "v.npy"
    write_vectors(path, pieces_of(np.zeros((4, 2)), 2), (4, 2))
    rename, seen = os.replace, []

    def replace(source, target):
        seen.append((Path(target).name, path.exists()))
        rename(source, target)

    monkeypatch.setattr(os, "replace", replace)
    write_vectors(path, [(["new"], np.ones((1, 2)))], (1, 2))
    assert seen == [("v.npy.ids.jsonl", False), ("v.npy", False)]
    assert read(path)[1] == ["new"]


def test_files_that_hold_no_vectors(tmp_path):
    for name, message in (("v.txt", "formats .npy and .parquet"), ("none.npy", "there is no file")):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            open_vectors(tmp_path / name)
    np.save(tmp_path / "flat.npy", np.zeros(3))
    np.save(tmp_path / "int.npy", np.zeros((2, 2), int))
    np.save(tmp_path / "object.npy", np.array([{}], object))
    (tmp_path / "broken.npy").write_bytes(b"\x93NUMPY\x01\x00")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "text.parquet")
    for name, message in {
        "flat.npy": r"must hold floating numbers \[N, d\]; got float64, shape \(3,\)",
        "int.npy": "got int64",
        "object.npy": "not readable as .npy",
        "broken.npy": "not readable as .npy",
        "broken.parquet": "not readable as Parquet",
        "text.parquet": r"column 'embedding' is missing; columns present: \['text'\]",
    }.items():
        with pytest.raises(ValueError, match=f"{name}.*{message}"):
            open_vectors(tmp_path / name)


@pytest.mark.parametrize("lists", [[[1.0], [1.0, 2.0]], [[1.0], None], [[1], [2]]])
def test_lists_that_make_no_matrix(lists, tmp_path):
    pq.write_table(pa.table({"embedding": lists}), tmp_path / "v.parquet")
    with pytest.raises(ValueError, match="lists of floating numbers, all of one length"):
        read(tmp_path / "v.parquet")
