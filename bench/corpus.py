"""Measures ``moe-fast embed`` with two processes of its own and with two workers of Ray.

    python -m bench.corpus prepare              # a model and two corpora, in build/corpus
    python -m bench.corpus run local 4000       # seconds; also 1000, and ray instead of local
    python -m bench.corpus compare              # ids and vectors of the runs

A run starts Python, loads the model in each process and, for Ray, starts a cluster. What a text
takes beside that is the difference between the corpora of 4,000 and of 1,000 texts.
"""

from __future__ import annotations

import argparse
import random
import shutil
import time
from pathlib import Path

import numpy as np

import moe_fast
from moe_fast.demo.pretrained import go_offline, pretrained_folder
from moe_fast.distributed import embed_corpus
from moe_fast.inference import EncoderSettings, embed_file, open_vectors

FOLDER = Path("build/corpus")
SIZES = (4_000, 1_000)
DOMAINS = ["law", "medicine", "physics", "history", "sport"]
WORKERS, ROWS = 2, 200  # rows of a row group, and texts of a chunk
WORDS = ["court", "law", "claim", "heart", "vessel", "energy", "field", "king", "war", "goal"]


def prepare() -> None:
    """Write the model, MiniLM with five experts, and the corpora: texts of 5 to 150 words."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    go_offline()
    model = moe_fast.upcycle(
        str(pretrained_folder()), num_experts=len(DOMAINS), routing="enforced", domains=DOMAINS
    )
    model.save_pretrained(str(FOLDER / "mixture"))
    rng = random.Random(0)
    for size in SIZES:
        table = {
            "id": [f"d{i}" for i in range(size)],
            "text": [" ".join(rng.choices(WORDS, k=rng.randint(5, 150))) for _ in range(size)],
            "domain": rng.choices(DOMAINS, k=size),
        }
        pq.write_table(pa.table(table), FOLDER / f"{size}.parquet", row_group_size=ROWS)


def run(engine: str, size: int) -> None:
    """Embed a corpus, one thread per process, and print the seconds."""
    go_offline()
    output = FOLDER / (f"{engine}-{size}" + (".parquet" if engine == "local" else ""))
    settings = EncoderSettings(str(FOLDER / "mixture"), device="cpu")
    options = {"domain_column": "domain", "chunk_size": ROWS, "threads": 1, "overwrite": True}
    source = FOLDER / f"{size}.parquet"
    start = time.perf_counter()
    if engine == "local":
        embed_file(source, output, settings, processes=WORKERS, progress=False, **options)
    else:
        embed_corpus(source, output, settings, workers=WORKERS, progress=False, **options)
    print(f"{engine}, {size:,} texts: {time.perf_counter() - start:.1f} s")


def compare() -> None:
    """Print whether the ids are the same, and how far the vectors are apart."""
    for size in SIZES:
        found = []
        for name in (f"local-{size}.parquet", f"ray-{size}"):
            pieces = list(open_vectors(FOLDER / name).pieces())
            ids = [key for keys, _ in pieces for key in keys]
            found.append((ids, np.concatenate([vectors for _, vectors in pieces])))
        (ids, vectors), (other_ids, others) = found
        print(
            f"{size:,} texts: ids {'the same' if ids == other_ids else 'NOT the same'}, "
            f"vectors differ by {np.abs(vectors - others).max():.1e} at most"
        )


def main() -> None:
    """Run the command that the arguments name."""
    parser = argparse.ArgumentParser(description="embed with processes and with Ray")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("prepare")
    one = commands.add_parser("run")
    one.add_argument("engine", choices=["local", "ray"])
    one.add_argument("size", type=int, choices=SIZES)
    commands.add_parser("compare")
    arguments = parser.parse_args()
    if arguments.command == "prepare":
        prepare()
    elif arguments.command == "run":
        run(arguments.engine, arguments.size)
    else:
        compare()


if __name__ == "__main__":
    main()
