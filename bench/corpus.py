"""Measures ``moe-fast embed`` with two processes of its own and with two workers of Ray.

    python -m bench.corpus prepare         # a model and a corpus, in build/corpus
    python -m bench.corpus run local       # or ray instead of local
    python -m bench.corpus compare         # ids and vectors of the two runs

The seconds of a run in all have the start of its processes, in which the model is loaded, and of
the cluster. The texts per second are those after the first chunks, when all processes are at work.
"""

from __future__ import annotations

import argparse
import random
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

import moe_fast
from moe_fast.demo.pretrained import go_offline, pretrained_folder
from moe_fast.distributed import embed_corpus
from moe_fast.inference import EncoderSettings, embed_file, open_vectors

FOLDER = Path("build/corpus")
SOURCE = FOLDER / "corpus.parquet"
OUTPUTS = {"local": FOLDER / "local.parquet", "ray": FOLDER / "ray"}
TEXTS = 4_000
DOMAINS = ["law", "medicine", "physics", "history", "sport"]
WORKERS, ROWS = 2, 200  # rows of a row group, and texts of a chunk
FIRST = 5  # files after which both workers are at work
WORDS = ["court", "law", "claim", "heart", "vessel", "energy", "field", "king", "war", "goal"]


def prepare() -> None:
    """Write the model, MiniLM with five experts, and the corpus: texts of 5 to 150 words."""
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
    table = {
        "id": [f"d{i}" for i in range(TEXTS)],
        "text": [" ".join(rng.choices(WORDS, k=rng.randint(5, 150))) for _ in range(TEXTS)],
        "domain": rng.choices(DOMAINS, k=TEXTS),
    }
    pq.write_table(pa.table(table), SOURCE, row_group_size=ROWS)


def run(engine: str) -> None:
    """Embed the corpus, one thread per process, and print the seconds."""
    go_offline()
    output = OUTPUTS[engine]
    settings = EncoderSettings(str(FOLDER / "mixture"), device="cpu")
    times: list[float] = []

    def finish() -> None:
        """Note when the file of each chunk or row group was written."""
        folder = output if engine == "ray" else output.with_name(f"{output.name}.parts")
        files = (*folder.glob("part-*.parquet"), *folder.glob("*.npy"))
        times.extend(sorted(file.stat().st_mtime for file in files))

    options: dict[str, Any] = {
        "domain_column": "domain",
        "chunk_size": ROWS,
        "threads": 1,
        "overwrite": True,
        "progress": False,
        "finish": finish,
    }
    start = time.perf_counter()
    if engine == "local":
        embed_file(SOURCE, output, settings, processes=WORKERS, **options)
    else:
        embed_corpus(SOURCE, output, settings, workers=WORKERS, **options)
    whole = time.perf_counter() - start
    rate = ROWS * (len(times) - 1 - FIRST) / (times[-1] - times[FIRST])
    print(f"{engine}, {TEXTS:,} texts: {whole:.1f} s in all, {rate:.0f} texts a second")


def compare() -> None:
    """Print whether the ids are the same, and how far the vectors are apart."""
    found = []
    for output in OUTPUTS.values():
        pieces = list(open_vectors(output).pieces())
        ids = [key for keys, _ in pieces for key in keys]
        found.append((ids, np.concatenate([vectors for _, vectors in pieces])))
    (ids, vectors), (other_ids, others) = found
    print(
        f"ids {'the same' if ids == other_ids else 'NOT the same'}, "
        f"vectors differ by {np.abs(vectors - others).max():.1e} at most"
    )


def main() -> None:
    """Run the command that the arguments name."""
    parser = argparse.ArgumentParser(description="embed with processes and with Ray")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("prepare")
    one = commands.add_parser("run")
    one.add_argument("engine", choices=OUTPUTS)
    commands.add_parser("compare")
    arguments = parser.parse_args()
    if arguments.command == "prepare":
        prepare()
    elif arguments.command == "run":
        run(arguments.engine)
    else:
        compare()


if __name__ == "__main__":
    main()
