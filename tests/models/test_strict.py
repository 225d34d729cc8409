"""Weights that a checkpoint lacks are an error, whoever loads it; heads and poolers are not."""

import json
import logging
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import moe_fast
from moe_fast.models.checkpoint_files import check_checkpoint
from moe_fast.models.loading import load_encoder, tokenizer_beside
from tests.models.tiny import build, save_sentence_transformer

WEIGHTS = "model.safetensors"


def change(folder, rename):
    """Store the weights anew, by the names that ``rename`` gives; ``None`` leaves one out."""
    weights = load_file(folder / WEIGHTS)
    renamed = {rename(name): value for name, value in weights.items()}
    renamed.pop(None, None)
    save_file(renamed, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders ``bare`` and ``model`` (a SentenceTransformer), dense, each lacking a weight."""
    pytest.importorskip("sentence_transformers", reason="needs the extra moe-fast[train]")
    folder = tmp_path_factory.mktemp("saved")
    save_sentence_transformer(folder)
    build("bert").save_pretrained(folder / "bare")
    for name in ("bare", "model"):
        change(folder / name, lambda n: None if "layer.1.intermediate" in n else n)
    return folder


LACKS = r"lacks weights of BertModel: encoder\.layer\.1\.intermediate\.dense\.bias, encoder"


@pytest.mark.parametrize(
    "load",
    [
        lambda folder: moe_fast.upcycle(folder, num_experts=2),
        lambda folder: moe_fast.from_experts([str(folder)] * 2, domains=["a", "b"]),
    ],
    ids=["upcycle", "from_experts"],
)
@pytest.mark.parametrize("name", ["bare", "model"])
def test_a_dense_model_that_lacks_weights(saved, name, load):
    with pytest.raises(ValueError, match=rf"{name}.* {LACKS}|{name} {LACKS}"):
        load(saved / name)


def test_by_the_loaders_of_the_commands(saved):
    from moe_fast.inference import load_model

    with pytest.raises(ValueError, match=LACKS):
        load_model(str(saved / "model"), device="cpu")
    with pytest.raises(ValueError, match=LACKS):
        load_model(str(saved / "bare"), device="cpu")
    with pytest.raises(ValueError, match=LACKS):
        load_encoder(str(saved / "bare"))


def test_all_renamed_and_a_mixture_called_dense(bert, tmp_path):
    bert.save_pretrained(tmp_path / "renamed")
    change(tmp_path / "renamed", lambda name: f"x.{name}")
    with pytest.raises(ValueError, match=r"lacks weights of BertModel: .* and 4\d more"):
        load_encoder(str(tmp_path / "renamed"))
    moe_fast.upcycle(bert, num_experts=2).save_pretrained(tmp_path / "moe")
    config = tmp_path / "moe" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "bert"}))
    with pytest.raises(ValueError, match=r"lacks weights .*instead: encoder\.layer\.0\.mlp\."):
        load_encoder(str(tmp_path / "moe"))


def test_what_an_old_checkpoint_has_and_lacks_is_no_error(bert, tmp_path, caplog):
    """Prefix, gamma and beta, a head, saved constants, no pooler: the same weights, no warning."""
    bert.save_pretrained(tmp_path)

    def legacy(name):
        if name.startswith("pooler."):
            return None
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        return "bert." + name.replace("LayerNorm.bias", "LayerNorm.beta")

    change(tmp_path, legacy)
    weights = load_file(tmp_path / WEIGHTS) | {
        "cls.predictions.bias": torch.zeros(60),
        "bert.embeddings.position_ids": torch.arange(40)[None],
    }
    save_file(weights, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with caplog.at_level(logging.WARNING, "moe_fast"):
        loaded = load_encoder(str(tmp_path))
    for name, value in bert.state_dict().items():
        assert name.startswith("pooler.") or torch.equal(loaded.state_dict()[name], value)
    assert not [r for r in caplog.records if r.name.startswith("moe_fast")]


@pytest.mark.parametrize("mixture", [False, True])
@pytest.mark.parametrize(
    "other",
    [
        lambda name: f"bert.{name}",
        lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma"),
    ],
    ids=["prefix", "gamma"],
)
def test_a_weight_that_is_there_twice(bert, tmp_path, other, mixture):
    (moe_fast.upcycle(bert, num_experts=2) if mixture else bert).save_pretrained(tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    name = "embeddings.LayerNorm.weight"
    weights[other(name)] = torch.zeros_like(weights[name])
    save_file(weights, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"weights of {'MoE' * mixture}BertModel twice: .* as "):
        load_encoder(str(tmp_path))


def test_a_weight_of_a_sentence_transformer_that_is_there_twice(tmp_path):
    pytest.importorskip("sentence_transformers", reason="needs the extra moe-fast[train]")
    folder = save_sentence_transformer(tmp_path)
    file = tmp_path / "model" / WEIGHTS
    weights = load_file(file)
    weights["bert.pooler.dense.bias"] = torch.zeros(32)
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="BertModel twice: pooler.dense.bias as bert.pooler"):
        moe_fast.upcycle(folder, num_experts=2)


def test_a_tokenizers_code_is_not_run(bert, tmp_path):
    """Nor is anybody asked whether it may: a program has nobody to ask."""
    bert.save_pretrained(tmp_path)
    settings = {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["code.T", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert tokenizer_beside(str(tmp_path)) is None
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("mixture", [False, True])
def test_weights_that_the_encoder_has_no_place_for_are_named(bert, tmp_path, caplog, mixture):
    (moe_fast.upcycle(bert, num_experts=2) if mixture else bert).save_pretrained(tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    save_file(
        weights | {"encoder.layer.7.output.dense.bias": torch.zeros(2)},
        tmp_path / WEIGHTS,
        metadata={"format": "pt"},
    )
    load_encoder(str(tmp_path))
    assert r"no place for, and which are not used: encoder.layer.7.output.dense.bias" in caplog.text


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool])
def test_whole_numbers_are_no_weights(bert, tmp_path, dtype):
    moe_fast.upcycle(bert, num_experts=2).save_pretrained(tmp_path)
    name = "encoder.layer.1.mlp.up_proj"
    weights = load_file(tmp_path / WEIGHTS)
    save_file(weights | {name: weights[name].to(dtype)}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=r"whole numbers or truth values .*1\.mlp\.up_proj \("):
        moe_fast.models.MoEBertModel.from_pretrained(tmp_path)


class TestIndex:
    @pytest.fixture
    def folder(self, bert, tmp_path):
        bert.save_pretrained(tmp_path, max_shard_size="20KB")
        return tmp_path

    def edit(self, folder, change):
        index = folder / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        index.write_text(json.dumps(content | {"weight_map": change(content["weight_map"])}))

    @pytest.mark.parametrize(
        "name", ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "config.json", 5]
    )
    def test_a_shard_must_lie_beside_it(self, folder, name):
        self.edit(folder, lambda weights: weights | {next(iter(weights)): name})
        with pytest.raises(ValueError, match=r"index\.json: its weight_map must name safetensors"):
            load_encoder(str(folder))

    def test_a_weight_must_be_where_it_says(self, folder):
        self.edit(folder, lambda weights: dict.fromkeys(weights, next(iter(weights.values()))))
        with pytest.raises(ValueError, match=r"lacks weights that model\.safetensors\.index\.json"):
            load_encoder(str(folder))

    def test_every_shard_is_named(self, folder):
        shard = next(folder.glob("model-00001-*"))
        (folder / "model-00009-of-00009.safetensors").write_bytes(shard.read_bytes())
        with pytest.raises(ValueError, match=r"shards that .* does not name.*model-00009-of-00009"):
            load_encoder(str(folder))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", "[]", r"config\.json is damaged: it must hold a JSON object; got a list"),
        ("config.json", "[" * 100_000, r"config\.json is damaged"),
        ("modules.json", "[]", r"modules\.json is damaged: it must list modules, at least one"),
        (
            "modules.json",
            '[{"path": "../x", "type": "sentence_transformers.models.Transformer"}]',
            r"modules\.json: a module's path must lie inside the model's folder; got '\.\./x'",
        ),
    ],
)
def test_files_that_say_something_else(bert, tmp_path, file, content, message):
    bert.save_pretrained(tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        check_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [("moe_layers", 5), ("moe_layers", ["0"]), ("num_experts", "x"), ("domains", "law")],
)
def test_a_setting_of_another_kind_is_named(field, value):
    with pytest.raises(TypeError, match=f"{field} must be a .*; got {re.escape(repr(value))}"):
        moe_fast.models.MoEBertConfig(**{field: value})
