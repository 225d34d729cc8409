"""inspect: the numbers are the model's own, the picture is drawn."""

import json

import pytest

from moe_fast.inference import load_model
from tests.cli.conftest import read_jsonl, write_jsonl


def test_a_mixture(moe_fast_cli, workspace):
    result = moe_fast_cli("inspect", "mixture", "--json", "x.json")
    assert result.exit_code == 0, result.output
    shown = json.loads((workspace / "x.json").read_text())
    model = load_model("mixture", device="cpu")
    encoder = model.transformers_model
    assert shown["parameters"] == encoder.num_parameters()
    assert shown["active parameters"] == encoder.num_parameters(only_active=True)
    assert shown["parameters"] > shown["active parameters"]
    assert (shown["layers"], shown["layers with experts"]) == (3, [0, 1, 2])
    assert (shown["experts"], shown["experts per token"]) == (2, 1)
    assert (shown["routing"], shown["domains"]) == ("enforced", ["law", "medicine"])
    assert (shown["dtype"], shown["tokens per text"], shown["embedding size"]) == (
        "float32",
        32,
        32,
    )
    assert shown["made by"].startswith("moe_fast ")
    for value in (f"{shown['parameters']:,}", "law, medicine", "enforced", "query: 'w1 '"):
        assert value in result.stdout


def test_a_dense_model(moe_fast_cli):
    result = moe_fast_cli("inspect", "dense-model")
    assert result.exit_code == 0
    assert "none, the model is dense" in result.stdout


def test_tokens_per_expert_by_domain(moe_fast_cli, workspace):
    write_jsonl(workspace / "back.jsonl", reversed(read_jsonl("texts.jsonl")))
    arguments = ["--texts", "back.jsonl", "--domain-column", "domain", "-o", "u.png"]
    result = moe_fast_cli("inspect", "mixture", *arguments, "--json", "x.json")
    assert result.exit_code == 0, result.output
    shown = json.loads((workspace / "x.json").read_text())
    order = shown["usage_domains"]
    assert order == ["law", "medicine"]  # the model's order, which is its experts'
    # enforced: a domain's tokens all go to its expert, in each of the three layers
    assert shown["usage"][order.index("law")] == [[1.0, 0.0]] * 3
    assert shown["usage"][order.index("medicine")] == [[0.0, 1.0]] * 3
    assert (workspace / "u.png").read_bytes().startswith(b"\x89PNG")
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["domain", "layer", "law", "medicine"] in lines  # the experts by their domains
    assert ["law", "0", "100.0", "0.0"] in lines and ["medicine", "2", "0.0", "100.0"] in lines
    assert shown["usage_experts"] == ["law", "medicine"]


def test_files_that_name_their_domain(moe_fast_cli, workspace):
    for name in ("law", "medicine"):
        rows = [row for row in read_jsonl("texts.jsonl") if row["domain"] == name]
        (workspace / f"{name}.txt").write_text("".join(row["text"] + "\n" for row in rows))
    texts = ["--texts", "medicine=medicine.txt", "--texts", "law=law.txt"]
    result = moe_fast_cli("inspect", "mixture", *texts, "--json", "x.json")
    assert result.exit_code == 0, result.output
    shown = json.loads((workspace / "x.json").read_text())
    assert shown["usage_domains"] == ["law", "medicine"]
    assert shown["usage"] == [[[1.0, 0.0]] * 3, [[0.0, 1.0]] * 3]


def test_tokens_of_a_learned_router(moe_fast_cli, workspace):
    upcycle = ["upcycle", "dense-model", "--num-experts", 3, "-o", "learned"]
    assert moe_fast_cli(*upcycle).exit_code == 0
    result = moe_fast_cli("inspect", "learned", "--texts", "texts.jsonl", "--json", "x.json")
    assert result.exit_code == 0, result.output
    shown = json.loads((workspace / "x.json").read_text())
    assert shown["usage_domains"] == ["all texts"]
    assert all(sum(shares) == pytest.approx(1) for shares in shown["usage"][0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dense-model", "--texts", "texts.jsonl"], "no experts"),
        (["mixture", "--texts", "texts.jsonl"], "domain must be given"),
        (
            ["mixture", "--texts", "art.jsonl", "--domain-column", "domain"],
            "one of the model's domains ('law', 'medicine'); got 'art'",
        ),
        (["mixture", "--texts", "none.jsonl"], "no such file: none.jsonl"),
        (["none/at/all"], "there is no such folder"),
        (["mixture", "--texts", "art=texts.jsonl"], "('law', 'medicine'); got 'art'"),
        (
            ["mixture", "--texts", "law=texts.jsonl", "--texts", "texts.jsonl"],
            "either all files name",
        ),
    ],
)
def test_failures(arguments, message, moe_fast_cli, workspace):
    mixed = [{"text": "w1", "domain": name} for name in ("law", "art")]
    write_jsonl(workspace / "art.jsonl", mixed)
    result = moe_fast_cli("inspect", *arguments)
    assert result.exit_code == 1 and message in result.stderr


@pytest.mark.parametrize(
    ("flags", "shown"),
    [
        ([], "weights of their own"),
        (["--moe-block", "multi_head", "--moe-heads", 4], "multi-head block, 4 heads per token"),
        (["--expert-form", "lora", "--lora-rank", 3], "LoRA on one shared MLP, rank 3, alpha 3"),
    ],
)
def test_the_form_of_the_experts(moe_fast_cli, flags, shown):
    result = moe_fast_cli("upcycle", "dense-model", "--num-experts", 3, *flags, "-o", "x")
    assert result.exit_code == 0, result.output
    assert shown in moe_fast_cli("inspect", "x").stdout
