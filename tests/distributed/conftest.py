"""The tiny models of tests/encoding, and a corpus of Parquet files."""

import pytest

from tests.encoding.conftest import models

pa = pytest.importorskip("pyarrow", reason="needs the extra moe-fast[train]")

__all__ = ["models"]
DOMAINS = ["law", "medicine"]


def rows(count):
    """Rows of a corpus: of any two, the texts differ."""
    return {
        "id": [f"d{i}" for i in range(count)],
        "text": [f"w{i % 50} w{i // 50 % 50} w{7 * i % 11}" for i in range(count)],
        "domain": [DOMAINS[i % 2] for i in range(count)],
    }


def write_corpus(folder, files, row_group_size):
    """Write the rows 0 .. sum(files) to so many files; one row group of the first is empty."""
    import pyarrow.parquet as pq

    folder.mkdir()
    table, start = pa.table(rows(sum(files))), 0
    for number, count in enumerate(files):
        with pq.ParquetWriter(folder / f"{number}.parquet", table.schema) as writer:
            if number == 0:
                writer.write_table(table.slice(0, 0))
            writer.write_table(table.slice(start, count), row_group_size)
        start += count
    return folder


@pytest.fixture
def corpus(tmp_path):
    """A folder of two files with 24 rows in five row groups."""
    return write_corpus(tmp_path / "corpus", [14, 10], 6)
