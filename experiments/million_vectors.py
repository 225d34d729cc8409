"""A million vectors: bytes, seconds and recall of each precision of an index, kept on the disk.

    python -m experiments.million_vectors --data FOLDER

10,000 questions of MedQuAD (FOLDER holds ``pairs_medquad_question_answer.jsonl.gz``), embedded by
all-MiniLM-L6-v2 (384 numbers), are copied a hundred times, each copy with noise of its own, half as
long as the vector. The queries are other questions. A query's true neighbours are its ten largest
dot products, found by an exact search in blocks.

The copies of one question differ by noise alone, so that finding the ten nearest of a hundred is
harder than it is among texts: the recalls are low bounds rather than what a user sees.

Each precision is built, saved, loaded and searched in a process of its own, whose peak memory is
recorded; the vectors are read from the disk piece by piece. Recall@10 is the share of the true ten
that are found, by the codes alone and with the best 100 and 1,000 scored again by the vectors on
the disk. The results are written to ``experiments/results/million_vectors.json``.
"""

from __future__ import annotations

import argparse
import gzip
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from moe_fast.files import write_text
from moe_fast.inference.codes import PRECISIONS, factory_of

RESULTS = Path(__file__).parent / "results" / "million_vectors.json"
PAIRS = "pairs_medquad_question_answer.jsonl.gz"
K, RESCORES, BLOCK = 10, (0, 100, 1000), 50_000
NOISE = 0.5  # its length, where a vector's is 1
VECTORS, QUERIES, TRUTH = "vectors.npy", "queries.npy", "truth.npy"


def embed_questions(folder: Path, count: int) -> np.ndarray:
    """The unit vectors of ``count`` different questions, [count, 384] float32."""
    from experiments.three_heads import new_model

    with gzip.open(folder / PAIRS, "rt", encoding="utf-8") as file:
        questions = list(dict.fromkeys(json.loads(line)["a"] for line in file))
    chosen = np.random.default_rng(0).permutation(len(questions))[:count]
    model = new_model(None, 64)
    vectors = model.encode([questions[i] for i in chosen], normalize_embeddings=True)
    return np.asarray(vectors, np.float32)


def make_vectors(base: np.ndarray, count: int, folder: Path) -> None:
    """Write ``count`` unit vectors: those of ``base`` again and again, with noise."""
    from numpy.lib.format import open_memmap

    shape = (count, base.shape[1])
    written = open_memmap(folder / VECTORS, "w+", np.float32, shape)
    rng = np.random.default_rng(1)
    for start in range(0, count, BLOCK):
        rows = np.arange(start, min(start + BLOCK, count)) % len(base)
        noise = rng.standard_normal((len(rows), base.shape[1]), np.float32)
        noisy = base[rows] + NOISE * noise / np.linalg.norm(noise, axis=1, keepdims=True)
        written[start : start + len(rows)] = noisy / np.linalg.norm(noisy, axis=1, keepdims=True)
    written.flush()


def find_neighbours(folder: Path, queries: np.ndarray) -> None:
    """Search exactly, a block of vectors at a time, and write the queries and their neighbours."""
    vectors = np.load(folder / VECTORS, mmap_mode="r")
    scores = np.full((len(queries), 0), 0, np.float32)
    rows = np.zeros((len(queries), 0), np.int64)
    for start in range(0, len(vectors), BLOCK):
        block = queries @ vectors[start : start + BLOCK].T
        best = np.argpartition(-block, min(K, block.shape[1]) - 1, axis=1)[:, :K]
        scores = np.hstack([scores, np.take_along_axis(block, best, 1)])
        rows = np.hstack([rows, best + start])
        order = np.argsort(-scores, axis=1, kind="stable")[:, :K]
        scores, rows = (np.take_along_axis(values, order, 1) for values in (scores, rows))
    np.save(folder / QUERIES, queries)
    np.save(folder / TRUTH, rows)


def measure(folder: Path, precision: str) -> dict[str, Any]:
    """Build, save, load and search an index; memory is that of the whole process."""
    from moe_fast.inference import build_index, load_index, open_vectors, save_index, search_index

    opened = open_vectors(folder / VECTORS)
    queries, truth = np.load(folder / QUERIES), np.load(folder / TRUTH)
    factory = factory_of(precision, opened.dimension)
    start = time.perf_counter()
    built = build_index(opened, factory=factory, keep_vectors=folder / f"{precision}.f32")
    building = time.perf_counter() - start
    save_index(built, folder / precision)
    del built
    start = time.perf_counter()
    index = load_index(folder / precision)
    loading = time.perf_counter() - start
    found: dict[str, Any] = {
        "factory": factory,
        "bytes per vector": round(
            (folder / precision / "index.faiss").stat().st_size / opened.rows, 1
        ),
        "build seconds": round(building, 1),
        "load seconds": round(loading, 2),
    }
    for rescore in RESCORES:
        start = time.perf_counter()
        _, rows = search_index(index, queries, K, rescore=min(rescore, opened.rows))
        seconds = time.perf_counter() - start
        hits = [len(set(a) & set(b)) for a, b in zip(rows.tolist(), truth.tolist(), strict=True)]
        found[f"rescore {rescore}"] = {
            "recall@10": round(float(np.mean(hits)) / K, 4),
            "milliseconds per query": round(1000 * seconds / len(queries), 2),
        }
    found["peak MB"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return found


def run(base: np.ndarray, queries: np.ndarray, count: int) -> dict[str, Any]:
    """Measure all precisions on ``count`` vectors made of ``base``."""
    results: dict[str, Any] = {
        "vectors": count,
        "dimension": base.shape[1],
        "real vectors": len(base),
        "queries": len(queries),
    }
    with tempfile.TemporaryDirectory(prefix="million-") as name:
        folder = Path(name)
        make_vectors(base, count, folder)
        find_neighbours(folder, queries)
        for precision in PRECISIONS:
            code = (
                "import sys, json; from pathlib import Path; "
                "from experiments.million_vectors import measure; "
                "print(json.dumps(measure(Path(sys.argv[1]), sys.argv[2])))"
            )
            command = [sys.executable, "-c", code, str(folder), precision]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            results[precision] = json.loads(done.stdout.splitlines()[-1])
            print(precision, json.dumps(results[precision]), flush=True)
            for path in (folder / f"{precision}.f32", *(folder / precision).iterdir()):
                path.unlink()  # room for the next
    return results


def main() -> None:
    """Embed the questions, measure, and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--base", type=int, default=10_000, help="real vectors")
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--machine", default="", help="the processor, for the record")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    embedded = embed_questions(arguments.data, arguments.base + arguments.queries)
    base, queries = np.split(embedded, [arguments.base])
    results = run(base, queries, arguments.vectors) | {"machine": arguments.machine}
    write_text(arguments.results, json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
