"""--domain auto: of embed, search, evaluate and inspect, on a mixture with a domain predictor."""

import json

import numpy as np
import pytest

import moe_fast

pytest.importorskip("sklearn", reason="needs the extra moe-fast[eval]")


def read_jsonl(name):
    with open(name) as file:
        return [json.loads(line) for line in file]


@pytest.fixture
def fitted(workspace):
    """The mixture of the files, with a predictor fitted to their texts."""
    model = moe_fast.MoESentenceTransformer("mixture", device="cpu")
    rows = read_jsonl("texts.jsonl")
    model.fit_domain_predictor([r["text"] for r in rows], [r["domain"] for r in rows])
    model.save_pretrained("fitted", create_model_card=False)
    return model


def test_embed(fitted, moe_fast_cli):
    result = moe_fast_cli("embed", "fitted", "texts.jsonl", "--domain", "auto", "-o", "v.npy")
    assert result.exit_code == 0, result.output
    texts = [row["text"] for row in read_jsonl("texts.jsonl")]
    names = fitted.predict_domain(texts).domains
    assert len(set(names)) == 2
    np.testing.assert_allclose(np.load("v.npy"), fitted.encode(texts, domain=names), atol=1e-6)


def test_embed_with_auto_in_a_column(fitted, moe_fast_cli, workspace):
    rows = [
        {**row, "domain": "auto"} if i % 2 else row
        for i, row in enumerate(read_jsonl("texts.jsonl"))
    ]
    (workspace / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = moe_fast_cli(
        "embed", "fitted", "some.jsonl", "--domain-column", "domain", "-o", "v.npy"
    )
    assert result.exit_code == 0, result.output
    want = fitted.encode([r["text"] for r in rows], domain=[r["domain"] for r in rows])
    np.testing.assert_allclose(np.load("v.npy"), want, atol=1e-6)


def test_search_and_evaluate(fitted, moe_fast_cli, workspace):
    files = ("--documents", "texts.jsonl", "--queries", "queries.jsonl")
    result = moe_fast_cli(
        "search", "--model", "fitted", "--domain", "auto", *files, "-o", "run.trec"
    )
    assert result.exit_code == 0, result.output
    assert (workspace / "run.trec").read_text().startswith("q0 Q0 d3 1 ")
    result = moe_fast_cli(
        "evaluate", "fitted", "--pairs", "pairs.jsonl", "--domain", "auto", "--json", "s.json"
    )
    assert result.exit_code == 0, result.output


def test_inspect_shows_it(fitted, moe_fast_cli):
    result = moe_fast_cli("inspect", "fitted")
    accuracy = fitted.transformers_model.config.domain_predictor["accuracy"]
    said = f"of 2 domains, fitted to 24 texts, accuracy {accuracy:.3f} in cross-validation"
    assert f"domain predictor       {said}" in result.output
    result = moe_fast_cli("inspect", "mixture")
    assert "domain predictor       none" in result.output


@pytest.mark.parametrize(
    "arguments",
    [
        ("embed", "mixture", "texts.jsonl", "--domain", "auto", "-o", "v.npy"),
        ("embed", "mixture", "auto=texts.jsonl", "-o", "v.npy"),
        ("evaluate", "mixture", "--pairs", "pairs.jsonl", "--domain", "auto"),
    ],
)
def test_without_a_predictor_the_error_says_what_to_do(moe_fast_cli, workspace, arguments):
    result = moe_fast_cli(*arguments)
    assert result.exit_code != 0
    assert (
        "fit one with model.fit_domain_predictor(texts, domains)"
        in str(result.exception or "") + result.output
    )
    assert not (workspace / "v.npy").exists()
