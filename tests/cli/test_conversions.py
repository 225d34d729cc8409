"""upcycle, extract and join: what the library gives, saved with its settings."""

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, BertForMaskedLM

import moe_fast
from moe_fast.inference import load_model

TEXTS = ["w1 w2 w3", "w30 w31", "w4"]


def encode(path, **options):
    return load_model(str(path), device="cpu").encode(TEXTS, **options)


def run(moe_fast_cli, *arguments):
    result = moe_fast_cli(*arguments)
    assert result.exit_code == 0, result.output
    return result


def test_upcycled_gives_the_dense_embeddings(moe_fast_cli):
    result = run(moe_fast_cli, "upcycle", "dense-model", "--domains", "law,medicine", "-o", "x")
    assert "parameters" in result.output and "active per token" in result.output
    np.testing.assert_allclose(encode("x", domain="law"), encode("dense-model"), atol=1e-6)


def test_upcycle_settings_reach_the_model(moe_fast_cli):
    flags = ["--num-experts", 4, "--num-experts-per-tok", 2, "--routing", "sentence_topk"]
    flags += ["--weight-mode", "probability", "--layers", "0,2", "--target", "output"]
    run(moe_fast_cli, "upcycle", "dense-model", *flags, "--seed", 5, "-o", "x")
    expected = moe_fast.upcycle(
        "dense-model",
        num_experts=4,
        num_experts_per_tok=2,
        routing="sentence_topk",
        weight_mode="probability",
        layers=[0, 2],
        target="output",
        seed=5,
    )
    mine, theirs = load_model("x", device="cpu").state_dict(), expected.state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_bare_encoder_stays_one_and_keeps_its_tokenizer(moe_fast_cli, workspace):
    AutoModel.from_pretrained("dense-model").save_pretrained("bare")
    AutoTokenizer.from_pretrained("dense-model").save_pretrained("bare")
    run(moe_fast_cli, "upcycle", "bare", "--num-experts", 2, "-o", "x")
    run(moe_fast_cli, "extract", "x", "--expert", 1, "-o", "y")
    assert type(AutoModel.from_pretrained("x")).__name__ == "MoEBertModel"
    assert type(AutoModel.from_pretrained("y")).__name__ == "BertModel"
    assert AutoTokenizer.from_pretrained("y")("w1")["input_ids"] == [4, 7, 5]


def test_a_head_is_kept_where_it_is_asked_for(moe_fast_cli, workspace):
    config = AutoModel.from_pretrained("dense-model").config
    dense = BertForMaskedLM(config)
    dense.save_pretrained("masked")
    AutoTokenizer.from_pretrained("dense-model").save_pretrained("masked")
    flags = ["--head", "ForMaskedLM", "--domains", "law,medicine"]
    run(moe_fast_cli, "upcycle", "masked", *flags, "-o", "x")
    moe = AutoModelForMaskedLM.from_pretrained("x")
    assert type(moe).__name__ == "MoEBertForMaskedLM"
    assert torch.equal(moe.cls.predictions.bias[: config.vocab_size], dense.cls.predictions.bias)
    assert AutoTokenizer.from_pretrained("x")("w1")["input_ids"] == [4, 7, 5]


@pytest.mark.parametrize(("expert", "domain"), [("medicine", "medicine"), ("0", "law")])
def test_extracted_gives_the_domain_embeddings(expert, domain, moe_fast_cli):
    run(moe_fast_cli, "extract", "mixture", "--expert", expert, "-o", "x")
    np.testing.assert_allclose(encode("x"), encode("mixture", domain=domain), atol=1e-6)


def test_joined_models_come_back(moe_fast_cli):
    """They differ in their MLPs alone, so each domain gives its model's embeddings."""
    models = ["law=law-model", "medicine=medicine-model"]
    run(moe_fast_cli, "join", *models, "-o", "x")
    np.testing.assert_allclose(encode("x", domain="law"), encode("law-model"), atol=1e-6)
    np.testing.assert_allclose(encode("x", domain="medicine"), encode("medicine-model"), atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["upcycle", "mixture", "--num-experts", "2"], "a mixture already"),
        (["upcycle", "no/such/model", "--num-experts", "2"], "there is no such folder"),
        (["extract", "mixture", "--expert", "art"], "('law', 'medicine'); got 'art'"),
        (["extract", "mixture", "--expert", "7"], "[0, 2); got 7"),
        (["extract", "dense-model", "--expert", "0"], "mixture of experts"),
    ],
)
def test_failures(arguments, message, moe_fast_cli, workspace):
    result = moe_fast_cli(*arguments, "-o", "x")
    assert result.exit_code == 1
    assert message in result.stderr and result.stderr.count("\n") == 1
    assert not (workspace / "x").exists()


def test_quantized_gives_nearly_the_same_embeddings(moe_fast_cli):
    result = run(moe_fast_cli, "quantize", "mixture", "-o", "x")
    assert "active per token" in result.output
    got, want = (torch.from_numpy(encode(path, domain="law")) for path in ("x", "mixture"))
    assert torch.cosine_similarity(got, want).min() > 0.99


def test_texts_fix_the_ranges_of_a_quantised_model(moe_fast_cli):
    flags = ["--texts", "law=texts.jsonl"]
    run(moe_fast_cli, "quantize", "mixture", *flags, "-o", "x")
    config = AutoModel.from_pretrained("x").config
    assert config.quantization == {"method": "int8", "activations": "static"}
    result = moe_fast_cli("quantize", "mixture", "--domain", "law", "-o", "y")
    assert result.exit_code == 2
    assert "need --texts" in result.output


@pytest.mark.slow
def test_lora_experts_from_training_to_adapters_and_back(moe_fast_cli, workspace):
    pytest.importorskip("peft")
    flags = ["--routing", "enforced", "--expert-form", "lora", "--lora-rank", 2, "--lora-alpha", 4]
    flags += ["--batch-size", 8, "--max-steps", 2, "--learning-rate", "1e-2", "--save-steps", 0]
    run(moe_fast_cli, "train", "dense-model", "--data", "pairs.jsonl", *flags, "-o", "x")
    assert "LoRA on one shared MLP, rank 2, alpha 4" in run(moe_fast_cli, "inspect", "x").stdout
    trained, dense = (load_model(path, device="cpu") for path in ("x", "dense-model"))
    mine, theirs = trained.state_dict(), dense.state_dict()
    attention = "0.model.encoder.layer.0.attention.self.query.weight"
    assert torch.equal(mine[attention], theirs[attention]), "only the experts are trained"
    assert any(value.any() for name, value in mine.items() if name.endswith("proj_B"))
    for domain in ("law", "medicine"):
        names = ["--as-adapter", "--base", "dense-model", "-o", f"{domain}-adapter"]
        run(moe_fast_cli, "extract", "x", "--expert", domain, *names)
        assert (workspace / f"{domain}-adapter" / "adapter_model.safetensors").is_file()
        np.testing.assert_allclose(  # load_model merges an adapter into its base
            encode(f"{domain}-adapter"), encode("x", domain=domain), atol=1e-6
        )
    adapters = ["law=law-adapter", "medicine=medicine-adapter"]
    run(moe_fast_cli, "join", *adapters, "--expert-form", "lora", "-o", "y")
    for domain in ("law", "medicine"):
        np.testing.assert_allclose(
            encode("y", domain=domain), encode("x", domain=domain), atol=1e-6
        )
    result = moe_fast_cli(
        "join", *adapters, "--expert-form", "lora", "--target", "output", "-o", "z"
    )
    assert result.exit_code == 2 and "are not for --expert-form lora" in result.output
    result = moe_fast_cli("extract", "x", "--expert", 0, "--base", "dense-model", "-o", "z")
    assert result.exit_code == 2 and "--base is for --as-adapter" in result.output


def test_export_writes_one_expert_or_all(moe_fast_cli):
    pytest.importorskip("onnx", reason="needs the extra moe-fast[onnx]")
    pytest.importorskip("onnxruntime", reason="needs the extra moe-fast[onnx]")
    result = run(moe_fast_cli, "export", "mixture", "--domain", "law", "-o", "law")
    assert "checked; load it with moe_fast.OnnxEncoder" in result.output
    run(moe_fast_cli, "export", "mixture", "-o", "all")
    expected = encode("mixture", domain="law")
    np.testing.assert_allclose(moe_fast.OnnxEncoder("law").encode(TEXTS), expected, atol=1e-5)
    both = moe_fast.OnnxEncoder("all").encode(TEXTS, domain="law")
    np.testing.assert_allclose(both, expected, atol=1e-5)
    wrong = moe_fast_cli("export", "mixture", "--domain", "sports", "-o", "x")
    assert wrong.exit_code == 1 and "'law', 'medicine'" in wrong.stderr
