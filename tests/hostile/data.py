"""Damaged tables, texts, retrieval sets, vectors, indexes, manifests and settings."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tests.hostile.bases import lines
from tests.hostile.cases import Case, damaged_bytes, nothing

_NUL = {  # no text has one
    "pairs.jsonl": '{"a": "w1", "b": "w2\\u0000", "domain": "law"}',
    "pairs.csv": "w1,w2\0,law",
    "flag.jsonl": '{"query": "w1", "pos": ["w2"], "neg": ["\\u0000"]}',
    "texts.jsonl": '{"id": "t9", "text": "w1\\u0000"}',
    "texts.txt": "w1\0w2",
}
_LOSSY = ("last bytes cut", "first half")  # half of a text is a text


def cases() -> Iterator[Case]:
    """All of this file."""
    yield from _tables()
    yield from _retrieval()
    yield from _vectors()
    yield from _manifests()
    yield from _yaml()


def pairs(path: Path) -> None:
    """As ``moe-fast train --data`` reads."""
    from moe_fast.data import read_training_data

    read_training_data(path)


def texts(path: Path) -> None:
    """As ``moe-fast embed`` reads."""
    from moe_fast.data import read_texts

    if not list(read_texts(path)):
        raise ValueError(f"{path}: no texts in this file")


def _tables() -> Iterator[Case]:
    readers = {
        "pairs.jsonl": pairs,
        "pairs.csv": pairs,
        "pairs.parquet": pairs,
        "flag.jsonl": pairs,
        "flag.parquet": pairs,
        "texts.jsonl": texts,
        "texts.parquet": texts,
        "texts.txt": texts,
    }
    for file, use in readers.items():
        yield Case("control", f"{file} as it is", file, nothing, use, control=True)
        if not file.endswith(".parquet"):  # nobody can know that there was more
            yield Case("control", f"{file}: lines cut off", file, _first_lines, use, control=True)
        plain = file.endswith((".txt", ".csv"))
        for name, spoil in damaged_bytes():
            if not (plain and name in (*_LOSSY, "first byte cut")):
                yield Case("table", f"{file}: {name}", file, spoil, use)
    rows: dict[str, tuple[str, list[Any]]] = {
        "pairs.jsonl": ("b", [None, 5, [], {}, "", " ", True, ["x"]]),
        "flag.jsonl": ("pos", [None, 5, {}, "", [""], [5], [[]], True]),
        "texts.jsonl": ("text", [None, 5, [], {}, "", " ", True]),
    }
    for file, (column, values) in rows.items():
        for value in values:
            yield Case(
                "table", f"{file}: {column}={value!r}", file, _cell(column, value), readers[file]
            )
        for line in ("7", "[]", '"x"', "{", "null", '{"a": 1, "a": 2}', "[" * 100_000):
            yield Case("table", f"{file}: line {line[:9]!r}", file, _more(line), readers[file])
        yield Case("table", f"{file}: gzip cut", file + ".gz", _zipped(-9), readers[file])
        yield Case("table", f"{file}: gzip that is none", file + ".gz", _zipped(0), readers[file])
        yield Case("table", f"{file}: another suffix", file + ".xyz", _renamed, readers[file])
    for line in ("w1", "w1,w2,law,more", 'w1,"w2', "w1,,law", '"w1"x,w2,law'):
        yield Case("table", f"pairs.csv: line {line!r}", "pairs.csv", _more(line), pairs)
    for header in ("a,a,b", "", "x,y,z", "a;b;domain", ",,"):
        yield Case("table", f"pairs.csv: header {header!r}", "pairs.csv", _header(header), pairs)
    for file, line in _NUL.items():
        yield Case("table", f"{file}: a NUL byte", file, _more(line), readers[file])
    for line in ("", " ", "\t"):
        yield Case("table", f"texts.txt: line {line!r}", "texts.txt", _more(line), texts)
    wide = json.dumps({f"c{i}": 1 for i in range(60_000)})
    twice = "{" + ", ".join(f'"c{i % 59_999}": 1' for i in range(60_000)) + "}"
    for name, line in (("60,000 columns", wide), ("60,000 columns, one twice", twice)):
        yield Case("table", f"pairs.jsonl: {name}", "pairs.jsonl", _more(line), pairs)


def _cell(column: str, value: Any) -> Callable[[Path], Any]:
    def spoil(path: Path) -> None:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows[1][column] = value
        lines(path, rows)

    return spoil


def _more(line: str) -> Callable[[Path], Any]:
    return lambda path: path.write_text(path.read_text() + line + "\n")


def _header(line: str) -> Callable[[Path], Any]:
    return lambda path: path.write_text("\n".join([line, *path.read_text().splitlines()[1:]]))


def _first_lines(path: Path) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))


def _zipped(cut: int) -> Callable[[Path], Any]:
    content = b'{"a": "w1", "b": "w2", "query": "w1", "pos": ["w2"], "text": "w1"}\n' * 50
    packed = gzip.compress(content)
    return lambda path: path.write_bytes(packed[:cut] if cut else content)


def _renamed(path: Path) -> None:
    path.write_text("{}")


def _retrieval() -> Iterator[Case]:
    from moe_fast.data import read_retrieval

    yield Case("control", "beir as it is", "beir", nothing, read_retrieval, control=True)
    for file in ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv"):
        for name, spoil in damaged_bytes():
            if not (file.endswith("tsv") and name in (*_LOSSY, "first byte cut")):
                yield _beir(file, name, spoil)
    for line in ("q1", "q1\td1", "q1\td1\tx", "q1\td1\t1.5", "q1\td1\t1", "\t\t", "q9\td1\t1"):
        yield _beir("qrels/test.tsv", f"line {line!r}", _more(line))
    for value in (None, 5, [], ""):
        for file in ("corpus.jsonl", "queries.jsonl"):
            yield _beir(file, f"text={value!r}", _cell("text", value))
    for value in (None, [], "", "d0"):
        yield _beir("corpus.jsonl", f"_id={value!r}", _cell("_id", value))


def _beir(file: str, name: str, spoil: Callable[[Path], Any]) -> Case:
    from moe_fast.data import read_retrieval

    known = ("beir",)
    return Case(
        "retrieval", f"{file}: {name}", "beir", lambda p: spoil(p / file), read_retrieval, known
    )


def vectors(path: Path) -> None:
    """As ``moe-fast search`` reads documents."""
    from moe_fast.inference.index import build_index
    from moe_fast.inference.vectors import open_vectors

    build_index(open_vectors(path))


def _vectors() -> Iterator[Case]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from moe_fast.inference.index import load_index

    def saved(array: Any) -> Callable[[Path], Any]:
        return lambda path: np.save(path, array, allow_pickle=True)

    def table(**columns: Any) -> Callable[[Path], Any]:
        return lambda path: pq.write_table(pa.table(columns), path)

    for file in ("vectors.npy", "vectors.parquet"):
        yield Case("control", f"{file} as it is", file, nothing, vectors, control=True)
        for name, spoil in damaged_bytes():
            yield Case("vectors", f"{file}: {name}", file, spoil, vectors)
    arrays = {
        "one dimension": np.ones(4, np.float32),
        "three dimensions": np.ones((2, 2, 2), np.float32),
        "whole numbers": np.ones((2, 2), np.int64),
        "texts": np.array([["a", "b"]]),
        "objects": np.array([[{}, None]], dtype=object),
        "complex": np.ones((2, 2), np.complex64),
        "no rows": np.ones((0, 4), np.float32),
        "no columns": np.ones((4, 0), np.float32),
        "a record": np.zeros(3, dtype=[("a", "f4")]),
    }
    for name, array in arrays.items():
        yield Case("vectors", f"vectors.npy: {name}", "vectors.npy", saved(array), vectors)
    rows = [[1.0, 2.0], [3.0, 4.0]]
    tables = {
        "no embedding": table(id=["a"], vector=[[1.0]]),
        "unequal lengths": table(id=["a", "b"], embedding=[[1.0], [1.0, 2.0]]),
        "texts": table(id=["a"], embedding=["x"]),
        "numbers": table(id=["a"], embedding=[1.0]),
        "nulls": table(id=["a", "b"], embedding=[[1.0], None]),
        "nulls within": table(id=["a"], embedding=[[1.0, None]]),
        "no rows": table(
            id=pa.array([], pa.string()), embedding=pa.array([], pa.list_(pa.float32()))
        ),
        "one id twice": table(id=["a", "a"], embedding=rows),
    }
    for name, spoil in tables.items():
        yield Case("vectors", f"vectors.parquet: {name}", "vectors.parquet", spoil, vectors)
    yield Case("control", "index as it is", "index", nothing, load_index, control=True)
    for file in ("index.faiss", "content.json"):
        for name, spoil in damaged_bytes():
            if (file, name) != ("index.faiss", "last bytes cut"):
                yield _index(file, name, spoil)
    contents = ({}, [], 5, None, {"ids": []}, {"ids": 5, "normalize": True, "factory": "Flat"})
    for content in contents:
        text = json.dumps(content)
        yield _index("content.json", text, lambda p, text=text: p.write_text(text))


def _index(file: str, name: str, spoil: Callable[[Path], Any]) -> Case:
    from moe_fast.inference.index import load_index

    return Case("vectors", f"index/{file}: {name}", "index", lambda p: spoil(p / file), load_index)


def _manifests() -> Iterator[Case]:
    """What may lie where ``embed`` keeps its chunks."""
    whole = {"kind": "moe_fast embed, unfinished", "threads": 1}
    planted: dict[str, Any] = {
        "an empty object": {},
        "a list": [],
        "somebody's": {"mine": 1},
        "another run's": whole | {"source": "x"},
        "100000 threads": whole | {"threads": 100_000},
        "threads as text": whole | {"threads": "8"},
        "threads null": whole | {"threads": None},
        "threads true": whole | {"threads": True},
        "threads negative": whole | {"threads": -1},
        "threads a list": whole | {"threads": [1]},
        "a control character": whole | {"source": "\x1b[31m", "normalize": "\x1b[31m"},
    }
    for name, content in planted.items():
        yield _planted(name, json.dumps(content))
    yield _planted("deep", "[" * 100_000)
    yield _planted("no JSON", "{")
    yield Case(
        "manifest", "a file", "texts.jsonl", lambda p: _parts(p).write_text(""), _embed, _PARTS
    )


_PARTS = (".parts", "threads")


def _parts(source: Path) -> Path:
    return source.with_name("out.npy.parts")


def _planted(name: str, text: str) -> Case:
    def plant(source: Path) -> None:
        parts = _parts(source)
        parts.mkdir()
        (parts / "manifest.json").write_text(text)
        np.save(parts / "00000000-0123456789abcdef.npy", np.ones((4, 32), np.float32))

    return Case("manifest", name, "texts.jsonl", plant, _embed, _PARTS)


def _embed(source: Path) -> None:
    import os

    from moe_fast.inference import EncoderSettings, embed_file

    settings = EncoderSettings(os.environ["HOSTILE_BASES"] + "/dense", device="cpu")
    embed_file(source, source.with_name("out.npy"), settings, progress=False)


def _yaml() -> Iterator[Case]:
    from moe_fast.cli.config import read_config

    kinds = {"num_experts": int, "routing": Literal["token_topk", "dense"], "layers": list[str]}

    def use(path: Path) -> None:
        read_config(path, kinds)

    yield Case("control", "settings.yaml as it is", "settings.yaml", nothing, use, control=True)
    for name, spoil in damaged_bytes():
        if name not in (*_LOSSY, "first byte cut"):
            yield Case("settings file", name, "settings.yaml", spoil, use)
    laughs = "a: &a [x, x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(24)
    )
    contents = {
        "a list": "- 1",
        "a text": "text",
        "an unknown key": "num_expert: 2",
        "a key twice": "routing: dense\nrouting: dense",
        "a wrong type": "num_experts: two",
        "a truth value": "num_experts: true",
        "a wrong name": "routing: none",
        "an object": "num_experts: !!python/object/apply:os.system ['true']",
        "a tag": "num_experts: !x 2",
        "aliases of aliases": laughs,
        "deep lists": "layers: " + "[" * 5_000 + "]" * 5_000,
        "deeper lists": "layers: " + "[" * 100_000,
        "a list as key": "? [1, 2]\n: 3",
        "tabs": "num_experts:\n\t- 2",
        "two documents": "num_experts: 2\n---\nnum_experts: 3",
        "an unknown alias": "num_experts: *x",
    }
    for name, text in contents.items():
        yield Case(
            "settings file", name, "settings.yaml", lambda p, text=text: p.write_text(text), use
        )
