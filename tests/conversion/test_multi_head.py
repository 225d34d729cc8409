"""Models with multi-head blocks: made, saved, packed, grown; no dense model comes back."""

import pytest
import torch

import moe_fast
from moe_fast.conversion import set_trainable
from moe_fast.layers import ATTENTION
from moe_fast.losses.routing_record import record_routing
from tests.models.tiny import NAMES, build, relative_error, same_weights

E, HEADS = 3, 4


def mixture(name="bert", **settings):
    settings = {"num_experts_per_tok": 2, **settings}
    dense = build(name).double()
    return moe_fast.upcycle(
        dense, num_experts=E, moe_block="multi_head", moe_heads=HEADS, **settings
    )


def outputs(moe, batch):
    how = {"expert_ids": torch.tensor([2, 0, 1])} if moe.config.routing == "enforced" else {}
    real = batch["attention_mask"].bool()
    out = moe(**batch, **how, output_router_logits=True)
    subs = real.flatten().repeat_interleave(HEADS)
    return [out.last_hidden_state[real], *(x[subs] for x in out.router_logits or ())]


@pytest.mark.parametrize("name", NAMES)
def test_blocks_are_new_and_all_else_is_the_dense_models(name):
    one, again, other = (mixture(name, layers=[1], seed=seed) for seed in (0, 0, 1))
    assert same_weights(one, again) and not same_weights(one, other)
    mlp, dense, state = one.moe_mlps()[1], build(name).double().state_dict(), one.state_dict()
    for parameter_name, value in mlp.named_parameters():
        if parameter_name.endswith("bias"):
            assert not value.any()
        else:
            assert 0.5 * 0.02 < value.std() < 1.5 * 0.02, parameter_name
    gone = [n for parts in one.architecture.mlp_names.values() for n in parts]
    left = dense.keys() - {one.architecture.join(1, n) for n in gone}
    assert all(torch.equal(state[n], dense[n]) for n in left)
    assert {n for n in state.keys() - left if ".mlp." not in n} == set()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"routing": "sentence_topk"},
        {"routing": "dense"},
        {"routing": "enforced", "num_experts_per_tok": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_packed_equals_padded_and_the_file_the_model(name, settings, batch, tmp_path):
    moe = mixture(name, **settings)
    want = outputs(moe, batch)
    moe.save_pretrained(tmp_path)
    again = type(moe).from_pretrained(tmp_path, dtype=torch.float64)
    assert same_weights(moe, again)
    assert all(torch.equal(a, b) for a, b in zip(outputs(again, batch), want, strict=True))
    assert "route each of 4 parts of a token apart" in (tmp_path / "README.md").read_text()
    moe.set_attn_implementation(ATTENTION)
    for got, expected in zip(outputs(moe, batch), want, strict=True):
        assert relative_error(got, expected) <= 1e-12


def test_every_parameter_is_trained(batch):
    moe = mixture()
    outputs(moe, batch)[0].pow(3).sum().backward()
    for name, parameter in moe.named_parameters():
        used = "pooler" not in name and "token_type" not in name
        assert not used or parameter.grad is not None, name
    set_trainable(moe, "experts")
    trained = {n.split(".mlp.")[1] for n, p in moe.named_parameters() if p.requires_grad}
    assert trained == {
        *("up_proj", "up_proj_bias", "down_proj", "down_proj_bias"),
        *("head_in.weight", "head_in.bias", "head_out.weight", "head_out.bias"),
    }


def test_router_losses_count_sub_tokens(batch):
    moe = mixture()
    with record_routing(moe) as recorder:
        moe(**batch)
    record = recorder.result()
    real = int(batch["attention_mask"].sum())
    assert int(record.token_mask.sum()) == real * HEADS
    assert record.num_sentences == 3
    sizes = torch.bincount(record.sentence_ids[record.token_mask]).tolist()
    assert sizes == [HEADS * n for n in batch["attention_mask"].sum(1).tolist()]


def test_counts():
    moe = mixture()
    assert moe.num_parameters(only_active=True) == moe.num_parameters()  # 8 visits of 3 experts
    narrow = moe_fast.upcycle(build("bert"), num_experts=3, moe_block="multi_head", moe_heads=1)
    idle = narrow.num_parameters() - narrow.num_parameters(only_active=True)
    assert idle == 2 * 3 * (32 * 48 + 48 + 48 * 32 + 32)


def test_growing(batch):
    moe = mixture(routing="enforced", num_experts_per_tok=1)
    larger = moe_fast.add_expert(moe, from_expert=1)
    assert torch.equal(outputs(larger, batch)[0], outputs(moe, batch)[0])
    assert same_weights(moe_fast.remove_expert(larger, 3), moe)


def test_what_it_cannot_be(bert, tmp_path):
    moe = mixture()
    with pytest.raises(ValueError, match="multi-head block see parts of tokens"):
        moe_fast.extract_expert(moe, 0)
    with pytest.raises(ValueError, match="multi-head blocks cannot be quantised"):
        moe_fast.quantize(moe)
    with pytest.raises(ValueError, match="portable must be False: the file has no multi-head"):
        moe.save_pretrained(tmp_path, portable=True)
    with pytest.raises(ValueError, match="moe_block must be 'mlp'"):
        moe_fast.from_experts([bert, bert], moe_block="multi_head")
    for settings, said in (
        ({"moe_heads": 3}, "moe_heads must be None with moe_block='mlp'"),
        ({"moe_block": "heads"}, "moe_block must be one of"),
        ({"moe_block": "multi_head", "moe_heads": 33}, "moe_heads must be at most hidden_size"),
        ({"moe_block": "multi_head", "target": "output"}, "target must be 'mlp' with moe_block"),
        ({"moe_block": "multi_head", "expert_form": "lora"}, "expert_form must be 'full' with"),
    ):
        with pytest.raises((ValueError, TypeError), match=said):
            moe_fast.upcycle(bert, num_experts=2, **settings)
