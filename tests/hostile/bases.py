"""The small whole files that bad inputs are made from by damage."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

TEXTS = ["w1 w2", "w3", "w4 w5 w6", "w7 w8"]


def make_bases(folder: Path) -> None:
    """Fill ``folder``: models dense, bare, shards, moe, moe_shards; data; vectors; index."""
    make_models(folder)
    make_data(folder)
    make_vectors(folder)


def make_models(folder: Path) -> None:
    """A dense and a mixture SentenceTransformer, and bare encoders in shards."""
    import moe_fast
    from tests.models.tiny import build, save_sentence_transformer

    dense = save_sentence_transformer(folder / "made")
    (folder / "made" / "model").rename(folder / "dense")
    mixture = moe_fast.upcycle(str(folder / "dense"), num_experts=2, domains=["law", "art"])
    mixture.save_pretrained(str(folder / "moe"), create_model_card=False)
    del dense
    bert = build("bert")
    bert.save_pretrained(folder / "bare")
    bert.save_pretrained(folder / "shards", max_shard_size="20KB")
    moe_fast.upcycle(bert, num_experts=2).save_pretrained(
        folder / "moe_shards", max_shard_size="40KB"
    )


def make_data(folder: Path) -> None:
    """Files of pairs, FlagEmbedding rows, texts, a retrieval set and settings."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pairs = [{"a": f"w{i} w2", "b": f"w{i} w3", "domain": "law"} for i in range(6)]
    flag = [{"query": f"w{i}", "pos": [f"w{i} w2"], "neg": ["w9", "w8"]} for i in range(6)]
    texts = [{"id": f"t{i}", "text": text} for i, text in enumerate(TEXTS)]
    for name, rows in (("pairs", pairs), ("flag", flag), ("texts", texts)):
        lines(folder / f"{name}.jsonl", rows)
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
    cells = ["a,b,domain", *(f'"{p["a"]}","{p["b"]}",law' for p in pairs)]
    (folder / "pairs.csv").write_text("\n".join(cells) + "\n")
    (folder / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    beir = folder / "beir"
    (beir / "qrels").mkdir(parents=True)
    lines(beir / "corpus.jsonl", [{"_id": f"d{i}", "text": f"w{i} w2"} for i in range(4)])
    lines(beir / "queries.jsonl", [{"_id": f"q{i}", "text": f"w{i}"} for i in range(4)])
    rows = [f"q{i}\td{i}\t1" for i in range(4)]
    (beir / "qrels" / "test.tsv").write_text(
        "\n".join(["query-id\tcorpus-id\tscore", *rows]) + "\n"
    )
    (folder / "settings.yaml").write_text("num-experts: 2\nrouting: token_topk\nlayers: [all]\n")


def make_vectors(folder: Path) -> None:
    """Vectors in both formats, and an index of them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from moe_fast.inference.index import build_index, save_index
    from moe_fast.inference.vectors import open_vectors

    vectors = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    np.save(folder / "vectors.npy", vectors)
    ids = [f"t{i}" for i in range(4)]
    table = {"id": ids, "embedding": pa.array(vectors.tolist(), pa.list_(pa.float32()))}
    pq.write_table(pa.table(table), folder / "vectors.parquet")
    save_index(build_index(open_vectors(folder / "vectors.npy")), folder / "index")


def lines(path: Path, rows: list[dict]) -> Path:
    """Write rows as JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
