"""What a conversion reads from a path: an encoder alone, or with the head that was asked for."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertTokenizerFast, CLIPTextConfig, CLIPTextModel

import moe_fast
from moe_fast.architectures import HEADS
from tests.models.tiny import (
    ENCODERS,
    build,
    build_head,
    relative_error,
    same_weights,
    save_sentence_transformer,
)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", ENCODERS)
def test_a_head_is_read_from_a_folder(name, head, batch, tmp_path):
    dense = build_head(name, head)
    dense.save_pretrained(tmp_path)
    moe = moe_fast.upcycle(tmp_path, head=head, num_experts=2).eval()
    assert type(moe).__name__ == f"MoE{type(dense).__name__}"
    assert same_weights(moe, moe_fast.upcycle(dense, num_experts=2))
    with torch.no_grad():
        got, want = moe(**batch).logits, dense(**batch).logits
    if head != "ForSequenceClassification":
        got, want = (logits[batch["attention_mask"].bool()] for logits in (got, want))
    assert relative_error(got, want) <= 1e-6
    assert same_weights(moe_fast.extract_expert(moe, 1), dense)
    assert type(moe_fast.upcycle(tmp_path, num_experts=2)).__name__.endswith("Model")


def test_the_tokenizer_beside_it_names_cls(tmp_path):
    build_head("bert", "ForMaskedLM").save_pretrained(tmp_path)
    words = ["[PAD]", "[UNK]", "x", "y", "[CLS]", "[SEP]", "[MASK]", "word"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    moe = moe_fast.upcycle(tmp_path, head="ForMaskedLM", num_experts=2, domains=["a", "b"])
    assert moe.config.domain_token_replaces == 4


def test_a_head_that_the_checkpoint_lacks(tmp_path):
    """Its weights would be random, and the mixture nobody's model."""
    build("bert").save_pretrained(tmp_path / "bare")
    build_head("bert", "ForMaskedLM").save_pretrained(tmp_path / "mlm")
    for folder in ("bare", "mlm"):
        with pytest.raises(ValueError, match=rf"{folder} has no head of BertForTokenClass.*head=N"):
            moe_fast.upcycle(tmp_path / folder, head="ForTokenClassification", num_experts=2)
    weights = load_file(tmp_path / "mlm" / "model.safetensors")
    del weights["cls.predictions.transform.dense.weight"]
    save_file(weights, tmp_path / "mlm" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"mlm lacks weights of BertForMaskedLM: cls\.pred"):
        moe_fast.upcycle(tmp_path / "mlm", head="ForMaskedLM", num_experts=2)


def test_an_encoder_that_has_no_such_head_in_transformers(tmp_path):
    config = CLIPTextConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        bos_token_id=1,
        eos_token_id=2,
    )
    CLIPTextModel(config).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="cannot be loaded: .*CLIPTextConfig.* AutoModelForMaskedL"
    ):
        moe_fast.upcycle(tmp_path, head="ForMaskedLM", num_experts=2)


def test_heads_that_cannot_be_asked_for(tmp_path):
    with pytest.raises(ValueError, match="head must be one of 'ForMaskedLM', .*; got 'ForQuestion"):
        moe_fast.upcycle(tmp_path, head="ForQuestionAnswering", num_experts=2)
    with pytest.raises(ValueError, match="head must be None for a model in memory.*a BertModel"):
        moe_fast.upcycle(build("bert"), head="ForMaskedLM", num_experts=2)
    pytest.importorskip("sentence_transformers", reason="needs the extra moe-fast[train]")
    folder = save_sentence_transformer(tmp_path)
    with pytest.raises(ValueError, match="head must be None for .*model, a model of sentence-tr"):
        moe_fast.upcycle(folder, head="ForMaskedLM", num_experts=2)


def test_folders_with_a_head_are_joined(tmp_path):
    models = [build_head("bert", "ForMaskedLM") for _ in range(2)]
    for i, model in enumerate(models):
        with torch.no_grad():
            model.bert.encoder.layer[1].output.dense.weight += 0.1 * i
        model.save_pretrained(tmp_path / str(i))
    folders = [str(tmp_path / str(i)) for i in range(2)]
    moe = moe_fast.from_experts(folders, head="ForMaskedLM")
    for i, model in enumerate(models):
        assert same_weights(moe_fast.extract_expert(moe, i), model)
