"""The commands of docs/corpus.md, with a real cluster of Ray on this machine."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("ray", reason="needs the extra moe-fast[ray]")
pytest.importorskip("psutil", reason="needs the extra moe-fast[ray]")

import psutil

from moe_fast.inference import EncoderSettings, embed_file, open_vectors
from tests.distributed.conftest import rows, write_corpus

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "corpus.md"


def commands():
    """The command lines of the page's first block, without the program's name."""
    block = re.search(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[1]
    lines = [shlex.split(line) for line in block.replace("\\\n", " ").splitlines()]
    return [line[1:] for line in lines if line[:1] == ["moe-fast"]]


def read(path):
    pieces = list(open_vectors(path).pieces())
    return [key for ids, _ in pieces for key in ids], np.concatenate([v for _, v in pieces])


def below(process):
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def listening(processes):
    """The addresses at which processes wait for connections."""
    found = set()
    for process in processes:
        try:
            connections = process.net_connections("inet")
        except psutil.Error:
            continue
        found |= {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}
    return found


def is_worker(process):
    try:
        return "ray::MapWorker" in " ".join(process.cmdline())
    except psutil.Error:
        return False


@pytest.mark.slow
def test_a_corpus_with_a_worker_killed_has_every_id_once(models, tmp_path):
    pytest.importorskip("faiss", reason="needs the extra moe-fast[search]")
    embed, search = commands()
    (tmp_path / "law-and-medicine").symlink_to(models / "moe")
    write_corpus(tmp_path / "corpus", [2000, 1000], 20)
    (tmp_path / "questions.txt").write_text("w1 w2 w3\n")
    (tmp_path / "tmp").mkdir()
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "HOME": str(tmp_path / "home"),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    program = [sys.executable, "-m", "moe_fast.cli"]
    running = psutil.Popen(
        [*program, *embed], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
    )
    parts, killed, seen, addresses = tmp_path / "vectors.parts" / "vectors", None, set(), set()
    while running.poll() is None:
        done = len(list(parts.glob("*.parquet")))
        if done and killed is None:
            seen |= set(below(running))
            addresses |= listening(seen)
            killed = next(filter(is_worker, seen))
            killed.send_signal(signal.SIGKILL)
            at_the_kill = len(list(parts.glob("*.parquet")))
        time.sleep(0.01)
    said = running.stderr.read()
    assert running.returncode == 0, said
    assert killed is not None and at_the_kill < 150, "the kill came too late to test anything"
    assert addresses and addresses <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    _, alive = psutil.wait_procs(seen, timeout=1)
    assert not alive, "processes that outlive the run"
    assert not (tmp_path / "home" / ".ray").exists()

    table = pa.table(rows(3000))
    pq.write_table(table, tmp_path / "one.parquet")
    settings = EncoderSettings(str(models / "moe"), device="cpu")
    options = {"domain_column": "domain", "progress": False}
    embed_file(tmp_path / "one.parquet", tmp_path / "v.parquet", settings, **options)
    ids, vectors = read(tmp_path / "vectors")
    expected_ids, expected = read(tmp_path / "v.parquet")
    assert ids == expected_ids == rows(3000)["id"]
    np.testing.assert_allclose(vectors, expected, rtol=0, atol=1e-5)
    assert sorted(path.name for path in tmp_path.glob("vectors*")) == ["vectors", "vectors.yaml"]

    subprocess.run([*program, *search], cwd=tmp_path, env=environment, check=True)
    hits = [line.split()[2] for line in (tmp_path / "run.trec").read_text().splitlines()]
    assert len(hits) == 100 and set(hits) <= set(ids)
