"""LoRA experts: trained alone, saved, extracted, grown and merged."""

import pytest
import torch
import torch.nn.functional as F

import moe_fast
from moe_fast.conversion import set_trainable
from moe_fast.layers import ATTENTION
from tests.models.tiny import NAMES, build, build_head, relative_error, same_weights

ROUTINGS = [
    {"routing": "token_topk"},
    {"routing": "token_topk", "num_experts_per_tok": 2},
    {"routing": "sentence_topk", "num_experts_per_tok": 2, "weight_mode": "probability"},
    {"routing": "sentence_switch"},
    {"routing": "enforced"},
    {"routing": "dense"},
]
IDS = torch.tensor([2, 0, 1])


def mixture(name="bert", *, apart=True, **settings):
    """In float64; ``apart``: with experts that differ, as after training."""
    settings = {"lora_rank": 3, "lora_alpha": 6, **settings}
    dense = settings.pop("dense", None)
    dense = build(name).double() if dense is None else dense
    moe = moe_fast.upcycle(dense, num_experts=3, expert_form="lora", **settings)
    if apart:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for mlp in moe.moe_mlps().values():
                for parameter_name, value in mlp.expert_parameters():
                    if parameter_name.endswith("_B"):
                        value += torch.randn(value.shape, generator=generator, dtype=value.dtype)
    return moe


def inputs_of(moe, batch):
    how = {"expert_ids": IDS} if moe.config.routing == "enforced" else {}
    return {**batch, **how}


def outputs(moe, batch):
    real = batch["attention_mask"].bool()
    return moe(**inputs_of(moe, batch)).last_hidden_state[real]


@pytest.mark.parametrize("target", ["mlp", "intermediate", "output"])
@pytest.mark.parametrize("settings", ROUTINGS, ids=str)
def test_starts_as_the_dense_model(dense, batch, settings, target):
    dense = dense.double()
    if settings.get("weight_mode") == "probability":  # whose weights do not sum to 1
        settings = {**settings, "weight_mode": "renormalize"}
    moe = mixture(dense=dense, apart=False, target=target, **settings)
    want = dense(**batch).last_hidden_state[batch["attention_mask"].bool()]
    assert relative_error(outputs(moe, batch), want) <= 1e-11


@pytest.mark.parametrize("settings", ROUTINGS, ids=str)
@pytest.mark.parametrize("target", ["mlp", "intermediate", "output"])
def test_equals_the_same_experts_with_weights_of_their_own(batch, settings, target):
    moe = mixture(target=target, **settings)
    full = moe_fast.merge_lora(moe)
    assert full.config.expert_form == "full" and full.config.lora_rank is None
    got, want = outputs(moe, batch), outputs(full, batch)
    assert relative_error(got, want) <= 1e-11
    got.pow(3).sum().backward()
    want.pow(3).sum().backward()
    for layer, mlp in moe.moe_mlps().items():
        own = full.moe_mlps()[layer]
        for name in filter(mlp.has_pair, ("up_proj", "down_proj")):
            a, b, scale = mlp.pair(name)
            grad = getattr(own, name).grad  # the gradient of W + scale B A
            assert relative_error(a.grad, scale * b.mT @ grad) <= 1e-10
            assert relative_error(b.grad, scale * grad @ a.mT) <= 1e-10
        if mlp.router.weight is not None:
            assert relative_error(mlp.router.weight.grad, own.router.weight.grad) <= 1e-9


@pytest.mark.parametrize("settings", ROUTINGS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_packed_equals_padded(batch, name, settings):
    moe = mixture(name, **settings)
    want = outputs(moe, batch)
    moe.set_attn_implementation(ATTENTION)
    assert relative_error(outputs(moe, batch), want) <= 1e-12
    with torch.no_grad():
        assert relative_error(outputs(moe, batch), want) <= 1e-12


def test_only_pairs_and_routers_are_trained(batch, tmp_path):
    moe = mixture()
    moe.save_pretrained(tmp_path)
    again = type(moe).from_pretrained(tmp_path, dtype=torch.float64)
    assert same_weights(moe, again)
    for model in (moe, again):
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trained == {
            n for n in model.state_dict() if n.endswith(("_A", "_B", "router.weight"))
        }
        outputs(model, batch).pow(3).sum().backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == (name in trained), name
    assert torch.equal(outputs(again, batch), outputs(moe, batch))
    set_trainable(again, "all")
    assert all(p.requires_grad for p in again.parameters())
    set_trainable(again, "experts")
    assert not again.encoder.layer[0].mlp.router.weight.requires_grad
    everything = moe_fast.upcycle(build("bert"), num_experts=2, expert_form="lora", trainable="all")
    assert all(p.requires_grad for p in everything.parameters())


def test_a_new_head_is_trained(tmp_path):
    """Only the encoder is frozen."""
    moe = mixture(dense=build_head("bert", "ForSequenceClassification"))
    assert all(p.requires_grad for p in moe.classifier.parameters())
    assert not moe.bert.embeddings.word_embeddings.weight.requires_grad


def test_what_a_block_prints():
    assert "lora" not in repr(moe_fast.MoEMLP(4, 8, 2))
    block = moe_fast.MoEMLP(4, 8, 2, expert_form="lora", lora_rank=3)
    assert "target=mlp, lora_rank=3, lora_alpha=3.0" in repr(block)


def test_counts_and_settings(tmp_path):
    moe = mixture(lora_rank=None, lora_alpha=None)
    assert (moe.config.lora_rank, moe.config.lora_alpha) == (8, 8.0)
    per_expert = 3 * 8 * (32 + 48 + 48 + 32)  # layers, rank, both projections
    dense = build("bert").num_parameters()
    routers = 3 * 3 * 32
    assert moe.num_parameters() == dense + routers + 3 * per_expert
    assert moe.num_parameters(only_active=True) == dense + routers + per_expert
    moe.save_pretrained(tmp_path)
    config = type(moe.config).from_pretrained(tmp_path)
    assert (config.expert_form, config.lora_rank, config.lora_alpha) == ("lora", 8, 8.0)
    assert "LoRA, rank 8, alpha 8, on one shared MLP" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("target", ["mlp", "intermediate", "output"])
def test_an_extracted_expert_is_the_dense_model_with_its_pairs_merged(batch, name, target):
    moe = mixture(name, routing="enforced", target=target)
    expert = moe_fast.extract_expert(moe, 1)
    assert type(expert) is type(build(name))
    real = batch["attention_mask"].bool()
    want = moe(**batch, expert_ids=torch.full((3,), 1)).last_hidden_state[real]
    assert relative_error(expert(**batch).last_hidden_state[real], want) <= 1e-12


def test_domains(batch):
    moe = mixture(routing="enforced", domains=["a", "b", "c"], cls_token_id=4)
    want = moe(**batch, domain="b").last_hidden_state
    real = batch["attention_mask"].bool()
    got = moe_fast.extract_expert(moe, "b")(**batch).last_hidden_state
    assert relative_error(got[real], want[real]) <= 1e-12


def test_growing(batch):
    moe = mixture(routing="enforced")
    larger = moe_fast.add_expert(moe, from_expert=2)
    assert larger.config.num_experts == 4
    assert torch.equal(outputs(larger, batch), outputs(moe, batch))
    trained = {n for n, p in larger.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in moe.named_parameters() if p.requires_grad}
    assert same_weights(moe_fast.remove_expert(larger, 3), moe)
    with pytest.raises(ValueError, match="from_expert must name an expert .*mean of LoRA"):
        moe_fast.add_expert(moe)


def test_seeds_draw_different_experts_and_repeat():
    one, again, other = (mixture(apart=False, seed=seed) for seed in (0, 0, 1))
    assert same_weights(one, again)
    a = one.encoder.layer[0].mlp.up_proj_A
    assert not torch.equal(a, other.encoder.layer[0].mlp.up_proj_A)
    assert not torch.equal(a[0], a[1])
    assert F.relu(a.abs() - 32**-0.5).sum() == 0  # uniform in +- 1 / sqrt(D), as PEFT's


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"expert_form": "low"}, "expert_form must be one of"),
        ({"lora_rank": 4}, "lora_rank must be None with expert_form='full'"),
        ({"lora_alpha": 4}, "lora_alpha must be None with expert_form='full'"),
        ({"expert_form": "lora", "lora_rank": 0}, "lora_rank must be"),
        ({"expert_form": "lora", "lora_alpha": -1.0}, "lora_alpha must be a positive"),
    ],
)
def test_bad_settings(bert, settings, said):
    with pytest.raises((ValueError, TypeError), match=said):
        moe_fast.upcycle(bert, num_experts=2, **settings)
    with pytest.raises((ValueError, TypeError), match=said):
        moe_fast.MoEMLP(4, 8, 2, **settings)


def test_what_lora_experts_cannot_be(bert, tmp_path):
    moe = mixture(dense=bert)
    with pytest.raises(ValueError, match="LoRA experts cannot be quantised.*merge_lora"):
        moe_fast.quantize(moe)
    with pytest.raises(ValueError, match=r"portable must be False: .*merge_lora"):
        moe.save_pretrained(tmp_path, portable=True)
    moe.config.fused_output = True
    with pytest.raises(ValueError, match="fused_output must be False unless"):
        moe.config.check()
    with pytest.raises(ValueError, match="output_block must be None with expert_form='lora'"):
        moe(torch.tensor([[4, 6]]))
    with pytest.raises(ValueError, match="expert_form must be 'full'.*from_adapters"):
        moe_fast.from_experts([bert, bert], expert_form="lora")
    full = moe_fast.upcycle(bert, num_experts=2)
    for convert in (moe_fast.merge_lora, lambda m: moe_fast.write_adapter(m, 0, tmp_path)):
        with pytest.raises(ValueError, match="model must have LoRA experts"):
            convert(full)
    with pytest.raises(ValueError, match="shared_bias must be False with expert_form='lora'"):
        moe_fast.MoEMLP(4, 8, 2, expert_form="lora", shared_bias=True)


def test_merged_experts_can_be_quantised_and_portable(bert, batch, tmp_path):
    merged = moe_fast.merge_lora(mixture(dense=bert))
    moe_fast.quantize(merged)
    merged.save_pretrained(tmp_path, portable=True)
