"""A folder with tiny models and files of every kind, which the commands' examples run in."""

import json
import random

import pytest

pytest.importorskip("sentence_transformers", reason="needs the extra moe-fast[train]")
pytest.importorskip("ir_measures", reason="needs the extra moe-fast[eval]")

import torch
from typer.testing import CliRunner

import moe_fast
from tests.models.tiny import save_sentence_transformer

DOMAINS = ["law", "medicine"]


def words(rng, domain, count=4):
    """A text of the domain: the two have no word in common."""
    first = 25 * DOMAINS.index(domain)
    return " ".join(f"w{rng.randrange(first, first + 25)}" for _ in range(count))


def read_jsonl(path):
    with open(path) as file:
        return [json.loads(line) for line in file]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Inputs that no test changes."""
    from sentence_transformers import SentenceTransformer

    folder = tmp_path_factory.mktemp("files")
    dense = SentenceTransformer(save_sentence_transformer(folder), device="cpu")
    dense.save_pretrained(str(folder / "dense-model"), create_model_card=False)
    for seed, name in enumerate(("law", "medicine")):
        other = SentenceTransformer(str(folder / "dense-model"), device="cpu")
        _shake(other, seed)
        other.save_pretrained(str(folder / f"{name}-model"), create_model_card=False)
    for seed, name in enumerate(("mixture", "other-mixture")):
        mixture = moe_fast.upcycle(dense, num_experts=2, routing="enforced", domains=DOMAINS)
        _shake(mixture, seed)
        mixture.save_pretrained(str(folder / name), create_model_card=False)
    rng = random.Random(0)
    domains = [DOMAINS[i % 2] for i in range(24)]
    texts = [words(rng, domain) for domain in domains]
    pairs = [
        {"a": text, "b": " ".join(reversed(text.split())), "domain": domain}
        for text, domain in zip(texts, domains, strict=True)
    ]
    write_jsonl(folder / "pairs.jsonl", pairs)
    rows = [
        {"id": f"d{i}", "text": text, "domain": domain}
        for i, (text, domain) in enumerate(zip(texts, domains, strict=True))
    ]
    write_jsonl(folder / "texts.jsonl", rows)
    write_jsonl(
        folder / "queries.jsonl", [{"_id": "q0", "text": texts[3]}, {"_id": "q1", "text": texts[8]}]
    )
    write_jsonl(folder / "papers.jsonl", _papers(rng))
    return folder


def _shake(model, seed):
    """Other weights in the MLPs, and in each expert."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "up_proj" in name or "intermediate" in name:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)


def _papers(rng):
    """Twelve papers, and twelve that each cite six of them."""
    cited = [{"id": f"p{i}", "abstract": words(rng, "law", 6), "cited_by": []} for i in range(12)]
    citing = [
        {"id": f"c{i}", "abstract": words(rng, "medicine", 6), "cited_by": []} for i in range(12)
    ]
    for paper in cited:
        paper["citing"] = []
    for paper in citing:
        paper["citing"] = [f"p{i}" for i in rng.sample(range(12), 6)]
    return cited + citing


@pytest.fixture
def workspace(files, tmp_path, monkeypatch):
    """The working folder of a test, with all inputs in it."""
    for path in files.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


@pytest.fixture
def moe_fast_cli(workspace):
    """Runs ``moe-fast`` in this process and says how it ended."""
    from moe_fast.cli.app import app

    def run(*arguments):
        return CliRunner().invoke(app, [str(a) for a in arguments], prog_name="moe-fast")

    return run
