"""PEFT as the peer: its adapters become experts, and experts become its adapters."""

import json

import pytest
import torch
from transformers import AutoModel

import moe_fast
from tests.models.tiny import build, relative_error, save_sentence_transformer

peft = pytest.importorskip("peft", reason="needs peft")
sbert = pytest.importorskip("sentence_transformers", reason="needs the extra moe-fast[train]")

PATTERN = {
    "bert": r".*layer\.\d+\.(intermediate|output)\.dense",
    "modernbert": r".*mlp\.(Wi|Wo)",
    "nomic_bert": r".*mlp\.(gate_proj|up_proj|down_proj)",
}


def adapter(dense, folder, seed, target, **settings):
    """Train nothing: draw both halves of every pair at random, and save the adapter."""
    config = peft.LoraConfig(**{"r": 2, "lora_alpha": 5, "target_modules": target, **settings})
    torch.manual_seed(seed)
    model = peft.get_peft_model(AutoModel.from_pretrained(dense, dtype=torch.float64), config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value += torch.randn_like(value)
    model.save_pretrained(folder)
    return model


@pytest.fixture
def base(request, tmp_path):
    """The folder of a dense model in float64."""
    name = getattr(request, "param", "bert")
    path = str(tmp_path / "base")
    build(name).double().save_pretrained(path)
    return path


def hidden(model, batch, **how):
    return model(**batch, **how).last_hidden_state[batch["attention_mask"].bool()]


@pytest.mark.parametrize(
    ("base", "name"), [(name, name) for name in PATTERN], indirect=["base"], ids=list(PATTERN)
)
def test_experts_are_the_adapters_with_their_gradients(base, name, batch, tmp_path):
    folders = [str(tmp_path / f"a{e}") for e in range(2)]
    peers = [adapter(base, folder, e, PATTERN[name]) for e, folder in enumerate(folders)]
    moe = moe_fast.from_adapters(folders)
    assert type(moe).__name__.startswith("MoE") and moe.dtype == torch.float64
    for e, peer in enumerate(peers):
        got = hidden(moe, batch, expert_ids=torch.full((3,), e))
        want = hidden(peer, batch)
        assert relative_error(got, want) <= 1e-11
        got.pow(3).sum().backward()
        want.pow(3).sum().backward()
    for layer, mlp in moe.moe_mlps().items():
        parts = moe.architecture.mlp_names["mlp.down_proj"]
        path = moe.architecture.join(layer, parts[0].removesuffix(".weight"))
        for e, peer in enumerate(peers):
            map_ = peer.base_model.model.get_submodule(path)
            a, b = map_.lora_A["default"].weight.grad, map_.lora_B["default"].weight.grad
            assert relative_error(mlp.down_proj_A.grad[e, : len(a)], a) <= 1e-10
            assert relative_error(mlp.down_proj_B.grad[e, :, : b.shape[1]], b) <= 1e-10


@pytest.mark.parametrize(
    ("base", "name"), [(name, name) for name in PATTERN], indirect=["base"], ids=list(PATTERN)
)
def test_peft_loads_what_is_written(base, name, batch, tmp_path):
    dense = AutoModel.from_pretrained(base, dtype=torch.float64)
    moe = moe_fast.upcycle(
        dense, num_experts=3, expert_form="lora", lora_rank=2, lora_alpha=3, routing="enforced"
    )
    with torch.no_grad():
        for mlp in moe.moe_mlps().values():
            for _, value in mlp.expert_parameters():
                value += torch.randn_like(value)
    moe_fast.write_adapter(moe, 1, tmp_path / "out", base=base)
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA" and settings["base_model_name_or_path"] == base
    assert (settings["r"], settings["lora_alpha"]) == (2, 3)
    peer = peft.PeftModel.from_pretrained(dense, tmp_path / "out")
    got = hidden(peer, batch)
    assert relative_error(got, hidden(moe, batch, expert_ids=torch.full((3,), 1))) <= 1e-11
    again = moe_fast.from_adapters([tmp_path / "out"])  # and back
    want = hidden(moe, batch, expert_ids=torch.full((3,), 1))
    assert relative_error(hidden(again, batch, expert_ids=torch.zeros(3).long()), want) <= 1e-11


def test_a_round_trip_keeps_every_bit(base, tmp_path):
    adapter(base, tmp_path / "a", 0, PATTERN["bert"])
    moe = moe_fast.from_adapters([tmp_path / "a"])
    moe_fast.write_adapter(moe, 0, tmp_path / "b", base=base)
    a, b = (peft.utils.load_peft_weights(str(tmp_path / f), device="cpu") for f in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"rank_pattern": {r"layer\.1\.output\.dense": 4}},
        {"alpha_pattern": {r"layer\.0\.intermediate\.dense": 1}},
        {"layers_to_transform": [1]},
    ],
    ids=str,
)
def test_settings_of_peft(base, batch, tmp_path, settings):
    target = ["intermediate.dense"] if "layers_to_transform" in settings else PATTERN["bert"]
    first = adapter(base, tmp_path / "a", 0, target, **settings)
    second = adapter(base, tmp_path / "b", 1, target, r=3)
    moe = moe_fast.from_adapters([tmp_path / "a", tmp_path / "b"])
    for e, peer in enumerate((first, second)):
        got = hidden(moe, batch, expert_ids=torch.full((3,), e))
        assert relative_error(got, hidden(peer, batch)) <= 1e-11
    if "layers_to_transform" in settings:
        assert moe.config.target == "intermediate"


def test_a_sentence_transformer_with_its_domains(tmp_path):
    base = save_sentence_transformer(tmp_path)
    texts = ["w1 w2 w3", "w7"]
    want = {}
    for seed, name in enumerate(("law", "tax")):
        model = sbert.SentenceTransformer(base, device="cpu")  # whose encoder PEFT adapts in place
        config = peft.LoraConfig(r=2, target_modules=PATTERN["bert"])
        wrapped = peft.get_peft_model(model.transformers_model, config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for n, value in wrapped.named_parameters():
                if "lora_B" in n:
                    value += 0.3 * torch.randn(value.shape, generator=generator)
        wrapped.save_pretrained(tmp_path / name)
        want[name] = model.encode(texts)
    moe = moe_fast.from_adapters(
        [tmp_path / "law", tmp_path / "tax"], base=base, domains=list(want)
    )
    assert type(moe).__name__ == "MoESentenceTransformer"
    for name, vectors in want.items():
        assert abs(moe.encode(texts, domain=name) - vectors).max() <= 1e-5
    trained = [n for n, p in moe.named_parameters() if p.requires_grad]
    assert trained and all(n.endswith(("_A", "_B")) for n in trained)
    moe_fast.write_adapter(moe, "tax", tmp_path / "out", base=base)
    peer = sbert.SentenceTransformer(base, device="cpu")
    peft.PeftModel.from_pretrained(peer.transformers_model, tmp_path / "out")
    assert abs(peer.encode(texts) - want["tax"]).max() <= 1e-5


def test_what_is_no_expert_is_refused(base, tmp_path):
    adapter(base, tmp_path / "a", 0, ["query", "intermediate.dense"])
    with pytest.raises(
        ValueError, match=r"LoRA pairs of MLPs and nothing else.*query.*from_experts"
    ):
        moe_fast.from_adapters([tmp_path / "a"])
    adapter(base, tmp_path / "d", 0, ["intermediate.dense"], use_dora=True)
    with pytest.raises(ValueError, match="LoRA pairs of MLPs and nothing else.*magnitude"):
        moe_fast.from_adapters([tmp_path / "d"])
    adapter(base, tmp_path / "b", 0, ["intermediate.dense"], bias="lora_only")
    with pytest.raises(ValueError, match="LoRA pairs of MLPs and nothing else.*bias"):
        moe_fast.from_adapters([tmp_path / "b"])
    with pytest.raises(ValueError, match="adapters must be folders that PEFT wrote"):
        moe_fast.from_adapters([base])
    with pytest.raises(ValueError, match="at least one folder"):
        moe_fast.from_adapters([])
    with pytest.raises(TypeError, match="sequence of folders"):
        moe_fast.from_adapters(base)
    with pytest.raises(TypeError, match="takes lora_rank, target from the adapters"):
        moe_fast.from_adapters([tmp_path / "a"], target="mlp", lora_rank=2)


def test_adapters_of_several_bases(base, tmp_path):
    build("bert").double().save_pretrained(tmp_path / "other")
    adapter(base, tmp_path / "a", 0, ["intermediate.dense"])
    adapter(tmp_path / "other", tmp_path / "b", 0, ["intermediate.dense"])
    with pytest.raises(ValueError, match="adapters must have one base; they name"):
        moe_fast.from_adapters([tmp_path / "a", tmp_path / "b"])
    assert (
        moe_fast.from_adapters([tmp_path / "a", tmp_path / "b"], base=base).config.num_experts == 2
    )


def test_a_mixture_that_differs_in_more_is_not_an_adapter(base, tmp_path):
    dense = AutoModel.from_pretrained(base, dtype=torch.float64)
    moe = moe_fast.upcycle(dense, num_experts=2, expert_form="lora", routing="enforced")
    with torch.no_grad():
        moe.encoder.layer[1].attention.self.query.weight += 1
    with pytest.raises(ValueError, match=r"differs from what its experts share.*self\.query"):
        moe_fast.write_adapter(moe, 0, tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()
