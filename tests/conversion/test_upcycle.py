"""Before any training, an upcycled model gives the dense model's output."""

import pytest
import torch
from transformers import BertForQuestionAnswering

import moe_fast
from tests.models.tiny import NAMES, build, relative_error, same_weights

# K = 1 with weight 1 runs the same products in another order of rows: rounding of one product
# per layer, 1e-6 relative in float32 and 1e-12 in float64. For K = 2, w1 * y + w2 * y with
# w1 + w2 = 1 to rounding: 1e-5.
CASES = [
    ({"routing": "token_topk"}, {}, 1e-6),
    ({"routing": "sentence_switch"}, {}, 1e-6),
    ({"routing": "enforced"}, {"expert_ids": torch.tensor([2, 0, 1])}, 1e-6),
    ({"routing": "enforced", "domains": ["a", "b", "c"], "cls_token_id": 4}, {"domain": "b"}, 1e-6),
    ({"routing": "token_topk", "num_experts_per_tok": 2}, {}, 1e-5),
    ({"routing": "sentence_topk", "num_experts_per_tok": 2}, {}, 1e-5),
    ({"routing": "dense"}, {}, 1e-5),
]


@pytest.mark.parametrize(
    ("dtype", "target"),
    [
        (torch.float32, "mlp"),
        (torch.float64, "mlp"),
        (torch.float64, "intermediate"),
        (torch.float64, "output"),
    ],
)
@pytest.mark.parametrize(("settings", "how", "tolerance"), CASES)
def test_output_equals_the_dense_models(dense, batch, dtype, target, settings, how, tolerance):
    dense = dense.to(dtype)
    moe = moe_fast.upcycle(dense, num_experts=3, target=target, **settings)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        got = moe(**batch, **how).last_hidden_state[real]
        want = dense(**batch).last_hidden_state[real]
    if dtype == torch.float64:
        tolerance = 1e-12 if tolerance == 1e-6 else 1e-11
    assert relative_error(got, want) <= tolerance


def test_padding_does_not_change_a_text(dense, batch):
    moe = moe_fast.upcycle(dense.double(), num_experts=3, num_experts_per_tok=2)
    alone = batch["input_ids"][1:2, :5]
    with torch.no_grad():
        got = moe(**batch).last_hidden_state[1, :5]
        want = moe(input_ids=alone, attention_mask=torch.ones_like(alone)).last_hidden_state[0]
    assert relative_error(got, want) <= 1e-12


@pytest.mark.parametrize("target", ["mlp", "intermediate", "output"])
def test_every_expert_is_a_copy(bert, target):
    moe = moe_fast.upcycle(bert, num_experts=3, target=target)
    layer, mlp = bert.encoder.layer[1], moe.encoder.layer[1].mlp
    pairs = [
        ("up_proj", layer.intermediate.dense.weight),
        ("up_proj_bias", layer.intermediate.dense.bias),
        ("down_proj", layer.output.dense.weight),
        ("down_proj_bias", layer.output.dense.bias),
    ]
    for name, original in pairs:
        value = getattr(mlp, name)
        if mlp.is_expert(name.removesuffix("_bias")):
            assert value.shape == (3, *original.shape)
            assert all(torch.equal(expert, original) for expert in value)
        else:
            assert torch.equal(value, original)


def test_the_input_is_untouched(dense, batch):
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    config = dense.config.to_dict()
    moe = moe_fast.upcycle(dense, num_experts=3)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.add_(1)
    assert all(torch.equal(before[name], value) for name, value in dense.state_dict().items())
    assert dense.config.to_dict() == config


@pytest.mark.parametrize(
    ("layers", "indices"),
    [("all", [0, 1, 2]), ("single", [1]), ("alternate", [1]), ([0, 2], [0, 2])],
)
def test_layers(bert, layers, indices):
    moe = moe_fast.upcycle(bert, num_experts=2, layers=layers)
    assert moe.config.moe_layers == indices
    assert list(moe.moe_mlps()) == indices
    dense_left = [i for i in range(3) if i not in indices]
    assert all(hasattr(moe.encoder.layer[i], "intermediate") for i in dense_left)


def test_alternate_is_every_other_layer():
    moe = moe_fast.upcycle(build("bert", num_hidden_layers=5), num_experts=2, layers="alternate")
    assert moe.config.moe_layers == [1, 3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_is_kept(bert, dtype):
    moe = moe_fast.upcycle(bert.to(dtype), num_experts=2)
    assert {p.dtype for p in moe.parameters()} == {dtype}


def test_router_depends_on_the_seed_alone(bert):
    state = torch.get_rng_state()
    one = moe_fast.upcycle(bert, num_experts=3, seed=1)
    assert torch.equal(state, torch.get_rng_state())
    assert same_weights(one, moe_fast.upcycle(bert, num_experts=3, seed=1))
    other = moe_fast.upcycle(bert, num_experts=3, seed=2)
    router = "encoder.layer.0.mlp.router.weight"
    assert not torch.equal(one.state_dict()[router], other.state_dict()[router])


@pytest.mark.parametrize("router_init", ["normal", "kaiming_uniform"])
def test_router_init(bert, router_init):
    moe = moe_fast.upcycle(bert, num_experts=3, router_init=router_init)
    assert all(mlp.router.weight.std() > 0 for mlp in moe.moe_mlps().values())


def test_enforced_routing_has_no_router_weight(bert):
    moe = moe_fast.upcycle(bert, num_experts=3, routing="enforced")
    assert not any("router" in name for name in moe.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_from_a_folder(tmp_path, name, batch):
    dense = build(name)
    dense.save_pretrained(tmp_path)
    moe = moe_fast.upcycle(tmp_path, num_experts=2)
    assert moe.config.upcycled_from == tmp_path.name
    assert same_weights(moe, moe_fast.upcycle(dense, num_experts=2))


def test_model_without_pooler(batch):
    from transformers import BertModel

    dense = BertModel(build("bert").config, add_pooling_layer=False).eval()
    moe = moe_fast.upcycle(dense, num_experts=2)
    assert moe.pooler is None
    assert moe(**batch).pooler_output is None


def test_unsupported_architecture_lists_the_supported(bert):
    with pytest.raises(
        TypeError, match=r"BertModel, RobertaModel, XLMRobertaModel, .*ModernBertModel"
    ):
        moe_fast.upcycle(torch.nn.Linear(2, 2), num_experts=2)
    with pytest.raises(
        TypeError,
        match=r"got BertForQuestionAnswering. Pass its encoder, model.bert, .* BertForMaskedLM",
    ):
        moe_fast.upcycle(BertForQuestionAnswering(bert.config), num_experts=2)
    with pytest.raises(TypeError, match=r"must be dense; got MoEBertModel"):
        moe_fast.upcycle(moe_fast.upcycle(bert, num_experts=2), num_experts=2)
    with pytest.raises(TypeError, match=r"must be a model or a path; got int"):
        moe_fast.upcycle(3, num_experts=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"num_experts_per_tok": 3},
            r"num_experts_per_tok must lie in 1 .. num_experts = 2; got 3",
        ),
        ({"routing": "best"}, r"^routing must be one of 'token_topk'.*got 'best'"),
        ({"weight_mode": "two"}, r"weight_mode must be one of 'auto'.*got 'two'"),
        ({"target": "head"}, r"target must be one of 'mlp', 'intermediate', 'output'; got 'head'"),
        ({"layers": "some"}, r"layers .* must be one of 'all', 'single', 'alternate'; got 'some'"),
        ({"layers": [5]}, r"layers must be .*\[0, 3\), at least one; got \[5\]"),
        ({"layers": []}, r"layers must be .* at least one; got \[\]"),
        ({"layers": [-1]}, r"layers must be .* at least one; got \[-1\]"),
        ({"layers": 1}, r"layers must be .* at least one; got 1"),
        ({"num_experts": 0}, r"num_experts must be at least 1; got 0"),
        ({"num_experts": 2.0}, r"num_experts must be .*; got 2.0"),
        ({"num_experts_per_tok": "1"}, r"num_experts_per_tok must be .*; got '1'"),
        ({"routing": "enforced", "num_experts_per_tok": 2}, r"must be 1 with routing='enforced'"),
        (
            {"domains": [1, 2], "cls_token_id": 4},
            r"domains must be non-empty names .*; got \[1, 2\]",
        ),
        ({"domains": [""], "cls_token_id": 4}, r"domains must be non-empty names"),
        ({"default_domain": "q"}, r"default_domain needs domains; got 'q' and no domains"),
        ({"router_init": "x"}, r"router_init must be one of 'normal', 'kaiming_uniform'; got 'x'"),
        ({"trainable": "head"}, r"trainable must be one of 'all', 'experts', .*; got 'head'"),
        ({"domains": "ab"}, r"domains must be a sequence of names; got the str 'ab'"),
        ({"domains": ["a", "a"], "cls_token_id": 4}, r"domains must be distinct names"),
        (
            {"routing": "enforced", "domains": ["a"], "cls_token_id": 4},
            r"domains must name one domain per expert .* got 1 domains and num_experts=2",
        ),
        ({"domains": ["a", "b"]}, r"cls_token_id must be given"),
        (
            {"domains": ["a"], "cls_token_id": 60},
            r"cls_token_id must lie in \[0, vocab_size = 60\)",
        ),
        ({"domains": ["a"], "cls_token_id": 0}, r"must not be the padding's id; got 0"),
        (
            {"domains": ["a"], "domain_tokens": False},
            r"domains with routing='token_topk' need domain",
        ),
        (
            {"domains": ["a"], "cls_token_id": 4, "default_domain": "b"},
            r"default_domain must be one of 'a'; got 'b'",
        ),
    ],
)
def test_bad_settings_name_the_argument(bert, settings, message):
    with pytest.raises((ValueError, TypeError), match=message):
        moe_fast.upcycle(bert, **{"num_experts": 2, **settings})


def test_mlp_dropout_is_refused():
    with pytest.raises(ValueError, match=r"mlp_dropout must be 0.*got 0.1"):
        moe_fast.upcycle(build("modernbert", mlp_dropout=0.1), num_experts=2)
