"""Models saved as an adapter: merged into their base wherever a model is loaded by its path."""

import json
import shutil

import pytest

pytest.importorskip("peft", reason="adapters need PEFT")
pytest.importorskip("sentence_transformers", reason="needs the extra moe-fast[train]")

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import moe_fast
from moe_fast.encoding.adapters import adapter_folder
from moe_fast.encoding.loading import load_model
from moe_fast.encoding.model_paths import model_fingerprint
from tests.models.tiny import save_sentence_transformer


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A mixture, the adapter of its encoder, a SentenceTransformer on that, and its vectors."""
    folder = tmp_path_factory.mktemp("adapters")
    dense = load_model(str(save_sentence_transformer(folder)), device="cpu")
    mixture = moe_fast.upcycle(dense, num_experts=2, routing="enforced", domains=["law", "art"])
    mixture.save_pretrained(str(folder / "base"), create_model_card=False)
    model = load_model(str(folder / "base"), device="cpu")
    targets = {"target_modules": ["query"], "target_parameters": ["mlp.up_proj", "mlp.down_proj"]}
    wrapped = get_peft_model(model.transformers_model, LoraConfig(r=2, **targets))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    wrapped.save_pretrained(str(folder / "adapter"))
    model[0].model = wrapped
    model.prompts["mine"] = "w3 "
    model.save_pretrained(str(folder / "whole"), create_model_card=False)
    model[0].model = wrapped.merge_and_unload()
    return folder, model.encode(["w1 w2"], domain="law")


@pytest.mark.parametrize("name", ["adapter", "whole"])
def test_a_path_to_an_adapter_gives_the_merged_model(folders, name):
    folder, expected = folders
    model = load_model(str(folder / name), device="cpu")
    assert type(model).__name__ == "MoESentenceTransformer"
    vectors = model.encode(["w1 w2"], domain="law")
    assert torch.allclose(torch.tensor(vectors), torch.tensor(expected), atol=1e-6)
    base = load_model(str(folder / "base"), device="cpu")
    assert abs(base.encode(["w1 w2"], domain="law") - expected).max() > 1e-3
    assert list(base.state_dict()) == list(model.state_dict())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert (model.prompts.get("mine") == "w3 ") is (name == "whole")


def test_the_fingerprint_knows_the_base(folders, tmp_path):
    folder, _ = folders
    config = folder / "adapter" / "adapter_config.json"
    before, text = model_fingerprint(str(folder / "adapter")), config.read_text()
    (folder / "base" / "more.txt").write_text("other contents")
    try:
        assert model_fingerprint(str(folder / "adapter")) != before
    finally:
        (folder / "base" / "more.txt").unlink()
    assert config.read_text() == text


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"base_model_name_or_path": None}, ValueError, "must name the base model; got None"),
        ({"base_model_name_or_path": "/none/at/all"}, FileNotFoundError, "'/none/at/all'"),
        ({"base_model_name_or_path": "SELF"}, ValueError, "names an adapter as its base"),
    ],
)
def test_bases_that_cannot_be_loaded(folders, tmp_path, change, error, message):
    folder, _ = folders
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    settings = json.loads((folder / "adapter" / "adapter_config.json").read_text()) | change
    if settings["base_model_name_or_path"] == "SELF":
        settings["base_model_name_or_path"] = str(adapter)
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(error, match=message):
        load_model(str(adapter), device="cpu")


def test_an_adapter_without_safetensors_is_not_read(folders, tmp_path):
    folder, _ = folders
    text = (folder / "adapter" / "adapter_config.json").read_text()
    (tmp_path / "adapter_config.json").write_text(text)
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match=r"has no adapter_model\.safetensors"):
        load_model(str(tmp_path), device="cpu")


@pytest.mark.parametrize("name", ["adapter", "whole"])
def test_tensors_that_an_adapter_lacks_are_named(folders, tmp_path, name):
    shutil.copytree(folders[0] / name, tmp_path / name)
    file = tmp_path / name / "adapter_model.safetensors"
    tensors = load_file(file)
    lost = next(key for key in tensors if "up_proj" in key or "query" in key)
    save_file({key: value for key, value in tensors.items() if key != lost}, file)
    with pytest.raises(ValueError, match=f"safetensors lacks 1 tensors of the adapter: {lost}"):
        load_model(str(tmp_path / name), device="cpu")


def test_what_is_no_adapter(folders):
    assert adapter_folder(str(folders[0] / "base")) is None
