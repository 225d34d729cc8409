"""A million vectors: bytes, seconds and recall of each precision of an index, kept on the disk.

    python -m experiments.million_vectors --data FOLDER --folder WORK

10,000 questions of MedQuAD (FOLDER holds ``pairs_medquad_question_answer.jsonl.gz``), embedded by
all-MiniLM-L6-v2 (384 numbers), are copied a hundred times, each copy with noise of its own, half as
long as the vector. The queries are other questions. A query's true neighbours are its ten largest
dot products, found by an exact search in blocks.

The copies of one question differ by noise alone, so that finding the ten nearest of a hundred is
harder than it is among texts: the recalls are low bounds rather than what a user sees.

Each precision is built and saved, and then loaded and searched, in processes of their own, whose
peak memory is recorded; the vectors are read from the disk piece by piece. Recall@10 is the share
of the true ten that are found, by the codes alone and with the best 100 and 1,000 scored again by
the vectors on the disk.

WORK keeps what is made (6 GB for each precision until it is searched, 1.5 GB for all), and what is
recorded in ``experiments/results/million_vectors.json`` is not done again: the parts can be run one
by one, as ``--only prepare``, ``--only build --precision int8`` and ``--only search --precision
int8``.
"""

from __future__ import annotations

import argparse
import gzip
import json
import resource
import shutil
import subprocess
import sys
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


def build(folder: Path, precision: str) -> dict[str, Any]:
    """Build an index, and save it with the vectors beside it."""
    from moe_fast.inference import build_index, open_vectors, save_index

    opened = open_vectors(folder / VECTORS)
    factory = factory_of(precision, opened.dimension)
    start, processor = time.perf_counter(), time.process_time()
    kept = folder / f"{precision}.f32"
    kept.unlink(missing_ok=True)  # of a run that was interrupted
    built = build_index(opened, factory=factory, keep_vectors=kept)
    found = {
        "factory": factory,
        "build seconds": round(time.perf_counter() - start, 1),
        "build processor seconds": round(time.process_time() - processor, 1),
    }
    save_index(built, folder / precision)
    kept.unlink()
    size = (folder / precision / "index.faiss").stat().st_size
    return found | {"bytes per vector": round(size / opened.rows, 1), "build peak MB": peak()}


def search(folder: Path, precision: str) -> dict[str, Any]:
    """Load an index and search it."""
    from moe_fast.inference import load_index, search_index

    queries, truth = np.load(folder / QUERIES), np.load(folder / TRUTH)
    start = time.perf_counter()
    index = load_index(folder / precision)
    found: dict[str, Any] = {"load seconds": round(time.perf_counter() - start, 2)}
    for rescore in RESCORES[: 1 if precision == "float32" else None]:
        start = time.perf_counter()
        _, rows = search_index(index, queries, K, rescore=min(rescore, len(index.ids)))
        seconds = time.perf_counter() - start
        hits = [len(set(a) & set(b)) for a, b in zip(rows.tolist(), truth.tolist(), strict=True)]
        found[f"rescore {rescore}"] = {
            "recall@10": round(float(np.mean(hits)) / K, 4),
            "milliseconds per query": round(1000 * seconds / len(queries), 2),
        }
    return found | {"search peak MB": peak()}


def peak() -> int:
    """The most memory that this process has had, in MB."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def in_new_process(part: str, folder: Path, precision: str) -> dict[str, Any]:
    """Call `build` or `search` in a process of its own."""
    code = (
        "import sys, json; from pathlib import Path; from experiments import million_vectors; "
        "part = getattr(million_vectors, sys.argv[1]); "
        "print(json.dumps(part(Path(sys.argv[2]), sys.argv[3])))"
    )
    command = [sys.executable, "-c", code, part, str(folder), precision]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def run_parts(
    parts: list[str], precisions: list[str], folder: Path, results: Path, about: dict[str, Any]
) -> dict[str, Any]:
    """Build and search what is not recorded yet; returns the record."""
    record = json.loads(results.read_text()) if results.exists() else about
    for precision in precisions:
        known = record.setdefault(precision, {})
        for part, name in (("build", "factory"), ("search", "rescore 0")):
            if part not in parts or name in known:
                continue
            known |= in_new_process(part, folder, precision)
            print(precision, part, json.dumps(known), flush=True)
            write_text(results, json.dumps(record, indent=2) + "\n")
        if "rescore 0" in known:
            shutil.rmtree(folder / precision, ignore_errors=True)  # room for the next
    return record


def main() -> None:
    """Run the parts that are asked for, and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--folder", type=Path, default=Path("build/million"))
    parser.add_argument("--only", nargs="+", default=["prepare", "build", "search"])
    parser.add_argument("--precision", nargs="+", default=list(PRECISIONS))
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--base", type=int, default=10_000, help="real vectors")
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--machine", default="", help="the processor, for the record")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    folder = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    if "prepare" in arguments.only and not (folder / TRUTH).exists():
        embedded = embed_questions(arguments.data, arguments.base + arguments.queries)
        base, queries = np.split(embedded, [arguments.base])
        make_vectors(base, arguments.vectors, folder)
        find_neighbours(folder, queries)
    about = {
        "vectors": arguments.vectors,
        "real vectors": arguments.base,
        "queries": arguments.queries,
        "machine": arguments.machine,
    }
    run_parts(arguments.only, arguments.precision, folder, arguments.results, about)


if __name__ == "__main__":
    main()
