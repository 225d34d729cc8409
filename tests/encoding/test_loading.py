"""Loading by path: which class, and what is said when there is nothing."""

import json
import shutil

import pytest
from sentence_transformers import SentenceTransformer

from moe_fast import MoESentenceTransformer
from moe_fast.encoding.loading import load_model
from moe_fast.encoding.model_paths import is_mixture, model_fingerprint


def test_the_class_is_told_by_the_configuration(models):
    assert type(load_model(str(models / "model"), device="cpu")) is SentenceTransformer
    assert type(load_model(str(models / "moe"), device="cpu")) is MoESentenceTransformer
    assert is_mixture(str(models / "moe")) and not is_mixture(str(models / "model"))


@pytest.mark.parametrize("path", ["no/such/folder", "./none", "/none", "none/", ""])
def test_no_such_folder(path):
    with pytest.raises(FileNotFoundError, match=f"model '{path}': there is no such folder"):
        load_model(path)


def test_no_such_id(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # else it tries for long
    with pytest.raises(
        FileNotFoundError, match="'nobody/nothing': there is no such folder, and no"
    ):
        load_model("nobody/nothing")


def test_a_half_written_checkpoint_is_named(models, tmp_path):
    shutil.copytree(models / "moe", tmp_path / "moe")
    weights = next((tmp_path / "moe").rglob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=weights.name):
        load_model(str(tmp_path / "moe"))


@pytest.mark.parametrize("kind", [[], {}, 1, None, True])
def test_a_model_type_that_is_no_name(kind, models, tmp_path):
    shutil.copytree(models / "moe", tmp_path / "moe")
    file = tmp_path / "moe" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": kind}))
    with pytest.raises(ValueError, match="moe"):
        load_model(str(tmp_path / "moe"))


def test_the_fingerprint_is_of_the_content(models, tmp_path):
    before = model_fingerprint(str(models / "moe"))
    copy = tmp_path / "copy"
    shutil.copytree(models / "moe", copy)
    (copy / "README.md").write_text("a card")
    assert model_fingerprint(str(copy)) == before
    tokenizer = copy / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    assert model_fingerprint(str(copy)) != before
