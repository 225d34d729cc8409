"""Search by three heads: quality and bytes per document of each score and precision.

    python -m experiments.search_quality --data FOLDER [--model FOLDER]

The documents are the answers of held-out MedQuAD pairs, or all abstracts of PubMedQA, the queries
their questions (the sets of ``experiments.three_heads``). Without ``--model`` the model is MiniLM
with untrained heads. An index is built for each precision and pooling. A document's bytes are those
of the codes, and of the inverted index (8 per weight); multi and hybrid search read the codes of
the dense vectors, the inverted index and the codes of the token vectors. The vectors themselves, by
which the best are scored again, stay on the disk and are not counted. The table is written to
``experiments/results/search_quality.md``.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from experiments.three_heads import OUTPUTS, Questions, new_model, read_pairs, read_pubmedqa
from moe_fast.data import TextRow
from moe_fast.encoding.head_outputs import HeadOutputs
from moe_fast.evaluation.ir_metrics import query_scores
from moe_fast.files import write_text
from moe_fast.inference.codes import PRECISIONS, factory_of
from moe_fast.inference.head_build import build_head_index
from moe_fast.inference.head_index import HeadIndex, search_heads
from moe_fast.inference.index import search_index

RESULTS = Path(__file__).parent / "results" / "search_quality.md"
DEPTH, RESCORE = 10, 100
POOLING = (1, 2, 4)


def rows_of(outputs: HeadOutputs, rows: list[TextRow], names: tuple[str, ...]) -> HeadOutputs:
    """The named outputs of documents, whose texts are their places."""
    chosen = [int(row.text) for row in rows]
    assert outputs.multi_vector is not None
    every: dict[str, Any] = {
        "dense": outputs.dense[chosen],
        "sparse": outputs.sparse[chosen],
        "multi_vector": [outputs.multi_vector[i] for i in chosen],
    }
    return HeadOutputs(**{name: every[name] for name in names})


def measure(queries: HeadOutputs, documents: HeadOutputs, own: list[int]) -> list[dict[str, Any]]:
    """One entry per score, precision and pooling."""
    assert documents.dense is not None and documents.sparse is not None
    number = len(documents.dense)
    rows = [TextRow(str(i), str(i), None, "") for i in range(number)]
    qrels = {str(q): {str(d): 1} for q, d in enumerate(own)}
    found: list[dict[str, Any]] = []

    def note(by: str, precision: str, pooling: int, rescore: int, hits: Any, size: int) -> None:
        run = {
            str(q): {str(d): float(len(of_query) - place) for place, d in enumerate(of_query)}
            for q, of_query in enumerate(row[row >= 0].tolist() for row in hits)
        }
        scores = query_scores(run, qrels, ["nDCG@10"])["nDCG@10"]
        entry = {"by": by, "precision": precision, "pooling": pooling, "rescore": rescore}
        entry |= {"nDCG@10": round(float(scores.mean()), 4), "bytes": round(size / number)}
        found.append(entry)
        print(entry, flush=True)

    sparse_bytes = 8 * documents.sparse.nnz
    for pooling in POOLING:
        for precision in PRECISIONS:
            with tempfile.TemporaryDirectory() as folder:
                index = build_head_index(
                    rows,
                    lambda chunk, names: rows_of(documents, chunk, names),
                    Path(folder),
                    dense_factory=lambda d, p=precision: factory_of(p, d),
                    token_factory=lambda d, p=precision: factory_of(p, d),
                    pool_tokens=pooling,
                    rescore=True,
                )
                if pooling == 1:
                    note_single(index, queries, precision, note, sparse_bytes)
                size = sparse_bytes + number * index.dense.index.sa_code_size()
                size += index.tokens.codes.nbytes
                for by, rescore in (("multi", 0), ("multi", 20), ("hybrid", 0), ("hybrid", 20)):
                    if rescore and precision == "float32":
                        continue
                    options = {"by": by, "candidates": 100, "rescore": rescore}
                    _, hits = search_heads(index, queries, DEPTH, **options)
                    note(by, precision, pooling, rescore, hits, size)
    return found


def note_single(
    index: HeadIndex, queries: HeadOutputs, precision: str, note: Any, sparse_bytes: int
) -> None:
    """The dense search, alone and with the best scored again, and once the sparse search."""
    assert index.dense is not None and queries.dense is not None
    size = len(index.ids) * index.dense.index.sa_code_size()
    for rescore in (0,) if precision == "float32" else (0, RESCORE):
        _, hits = search_index(index.dense, queries.dense, DEPTH, rescore=rescore)
        note("dense", precision, 1, rescore, hits, size)
    if precision == PRECISIONS[0]:
        _, hits = search_heads(index, queries, DEPTH, by="sparse")
        note("sparse", "float32", 1, 0, hits, sparse_bytes)


def table(name: str, test: Questions, found: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        f"## {name}: {len(test.questions):,} questions, {len(test.documents):,} documents",
        "",
        "| by | precision | tokens merged to one of | best scored again | nDCG@10 | bytes |",
        "|---|---|---|---|---|---|",
    ]
    for row in found:
        again = row["rescore"] or "-"
        lines.append(
            f"| {row['by']} | {row['precision']} | {row['pooling']} | {again} | "
            f"{row['nDCG@10']:.3f} | {row['bytes']:,} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure both sets, and write the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--model", help="a folder of a model with three heads")
    parser.add_argument("--sets", nargs="+", default=["MedQuAD", "PubMedQA"])
    parser.add_argument("--questions", type=int, default=1000, help="of MedQuAD")
    parser.add_argument("--length", type=int, default=128, help="most tokens per text")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    from moe_fast import load_three_heads

    if arguments.model is None:
        model = new_model(None, arguments.length)
    else:
        model = load_three_heads(arguments.model, device="cpu")
        model.max_seq_length = arguments.length
    _, held = read_pairs(arguments.data, arguments.questions)
    questions, answers = ([pair[side] for pair in held] for side in (0, 1))
    tests = {
        "MedQuAD": Questions(questions, answers, list(range(len(held)))),
        "PubMedQA": read_pubmedqa(arguments.data)[1],
    }
    which = "trained heads" if arguments.model else "untrained heads on MiniLM"
    parts = [
        "# Search by three heads: quality and bytes\n\n"
        f"`python -m experiments.search_quality` with {which}, texts cut at {arguments.length} "
        "tokens. Multi and hybrid score 100 candidates of the dense and of the sparse search each. "
        "Bytes are those of a document in the parts that the search reads."
    ]
    for name in arguments.sets:
        test = tests[name]
        queries, documents = (
            model.encode(texts, outputs=OUTPUTS, truncate=True)
            for texts in (test.questions, test.documents)
        )
        parts.append(table(name, test, measure(queries, documents, test.own)))
    write_text(arguments.results, "\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
