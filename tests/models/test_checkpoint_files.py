"""A damaged or half-written checkpoint: an error that names the file, before anything is loaded."""

import json

import pytest
from transformers import AutoConfig, AutoModel

import moe_fast
from moe_fast.models.checkpoint_files import check_checkpoint
from tests.models.tiny import build, save_sentence_transformer


def cut(file, by=10):
    file.write_bytes(file.read_bytes()[:-by])


def half_json(file):
    file.write_text(file.read_text()[: len(file.read_text()) // 2])


DAMAGES = {
    "truncated weights": (
        lambda folder: cut(folder / "model.safetensors"),
        ValueError,
        r"model\.safetensors is damaged or half-written \(\d+ bytes\)",
    ),
    "empty weights": (
        lambda folder: (folder / "model.safetensors").write_bytes(b""),
        ValueError,
        r"model\.safetensors is damaged or half-written \(0 bytes\)",
    ),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        FileNotFoundError,
        "has a config.json but no weights",
    ),
    "half a config": (
        lambda folder: half_json(folder / "config.json"),
        (ValueError, OSError),
        r"config\.json.*(not JSON|not a valid JSON)",
    ),
    "no config": (
        lambda folder: (folder / "config.json").unlink(),
        (FileNotFoundError, ValueError),
        r"config\.json",
    ),
}
SHARD_DAMAGES = {
    "a missing shard": (
        lambda folder: next(folder.glob("model-00002-*")).unlink(),
        FileNotFoundError,
        r"names files that are not there: model-00002-of-\d+\.safetensors",
    ),
    "a truncated shard": (
        lambda folder: cut(next(folder.glob("model-00002-*"))),
        ValueError,
        r"model-00002-of-\d+\.safetensors is damaged",
    ),
    "half an index": (
        lambda folder: half_json(folder / "model.safetensors.index.json"),
        ValueError,
        r"model\.safetensors\.index\.json is damaged or half-written; it is not JSON",
    ),
    "an index of nothing": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("{}"),
        ValueError,
        r"model\.safetensors\.index\.json has no weight_map",
    ),
    "no index": (
        lambda folder: (folder / "model.safetensors.index.json").unlink(),
        (ValueError, OSError),
        "model.safetensors",
    ),
}


def readers(folder):
    """The ways by which a person loads a mixture."""
    mixture = moe_fast.models.MoEBertModel
    return (
        lambda: mixture.from_pretrained(folder),
        lambda: AutoModel.from_pretrained(str(folder)),
    )


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_mixture(bert, tmp_path, damage):
    spoil, error, message = damage
    moe_fast.upcycle(bert, num_experts=2).save_pretrained(tmp_path)
    spoil(tmp_path)
    for read in readers(tmp_path):
        with pytest.raises(error, match=message):
            read()


@pytest.mark.parametrize("damage", SHARD_DAMAGES.values(), ids=SHARD_DAMAGES)
def test_damaged_shards(bert, tmp_path, damage):
    spoil, error, message = damage
    moe_fast.upcycle(bert, num_experts=2).save_pretrained(tmp_path, max_shard_size="40KB")
    check_checkpoint(tmp_path)
    spoil(tmp_path)
    for read in readers(tmp_path):
        with pytest.raises(error, match=message):
            read()


@pytest.mark.parametrize("name", ["truncated weights", "no weights", "half a config"])
def test_a_damaged_dense_model(bert, tmp_path, name):
    spoil, error, message = DAMAGES[name]
    bert.save_pretrained(tmp_path)
    spoil(tmp_path)
    with pytest.raises(error, match=message):
        moe_fast.upcycle(tmp_path, num_experts=2)
    with pytest.raises(error, match=message):
        moe_fast.from_experts([str(tmp_path)])


def test_files_of_others_are_not_read(bert, tmp_path):
    moe_fast.upcycle(bert, num_experts=2).save_pretrained(tmp_path)
    (tmp_path / "results.json").write_text('{"a": 1}\n{"a": 2}\n')
    (tmp_path / "optimizer.safetensors").write_bytes(b"half")
    for read in readers(tmp_path):
        assert read().config.num_experts == 2


def test_weights_that_the_files_lack_are_no_random_ones(bert, tmp_path):
    moe = moe_fast.upcycle(bert, num_experts=2)
    state = moe.state_dict()
    for name in list(state):
        if name.endswith("mlp.up_proj"):
            del state[name]
    moe.save_pretrained(tmp_path, state_dict=state)
    for read in readers(tmp_path):
        with pytest.raises(ValueError, match=r"lacks weights of MoEBertModel: encoder.layer.0.mlp"):
            read()


def test_a_pooler_may_be_missing(bert, tmp_path):
    moe = moe_fast.upcycle(type(bert)(bert.config, add_pooling_layer=False), num_experts=2)
    moe.save_pretrained(tmp_path)
    assert moe_fast.models.MoEBertModel.from_pretrained(tmp_path).pooler is not None
    _, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {"pooler.dense.weight", "pooler.dense.bias"}


def test_a_configuration_given_beside_the_weights(bert, tmp_path):
    """As Trainer and accelerate do: the model from its configuration, the weights later."""
    moe = moe_fast.upcycle(bert, num_experts=2)
    moe.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path, config=config)
    assert again.config.num_experts == 2


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda f: half_json(f / "modules.json"), ValueError, r"modules\.json is damaged"),
        (lambda f: (f / "modules.json").write_text("{}"), ValueError, "must list modules"),
        (
            lambda f: half_json(f / "1_Pooling" / "config.json"),
            ValueError,
            r"1_Pooling.config\.json is damaged",
        ),
        (
            lambda f: (f / "1_Pooling").rename(f / "other"),
            FileNotFoundError,
            "names the folder '1_Pooling', which is not there",
        ),
        (
            lambda f: (f / "1_Pooling" / "config.json").write_text('{"embedding_dimension": 5}'),
            ValueError,
            r"config\.json: embedding_dimension must be the encoder's hidden_size, 32; got 5",
        ),
        (lambda f: cut(f / "model.safetensors"), ValueError, r"model\.safetensors is damaged"),
        (
            lambda f: (f / "tokenizer.json").write_text("{"),
            ValueError,
            r"tokenizer\.json is damaged",
        ),
        (lambda f: (f / "config.json").unlink(), FileNotFoundError, r"has no config\.json"),
    ],
)
def test_a_damaged_sentence_transformer(tmp_path, spoil, error, message):
    pytest.importorskip("sentence_transformers", reason="needs the extra moe-fast[train]")
    dense = save_sentence_transformer(tmp_path)
    moe = tmp_path / "moe"
    moe_fast.upcycle(dense, num_experts=2).save_pretrained(str(moe))
    for folder, read in (
        (tmp_path / "model", lambda: moe_fast.upcycle(dense, num_experts=2)),
        (moe, lambda: moe_fast.MoESentenceTransformer(str(moe), device="cpu")),
    ):
        spoil(folder)
        with pytest.raises(error, match=message):
            read()


def test_hub_ids_and_modules_without_files_pass(tmp_path):
    check_checkpoint("sentence-transformers/all-MiniLM-L6-v2")
    build("bert").save_pretrained(tmp_path)
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_N", "type": "sentence_transformers.models.Normalize"},
    ]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    check_checkpoint(tmp_path)
