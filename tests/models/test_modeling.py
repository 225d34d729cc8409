"""The models: what AutoModel loads, what forward takes and returns, what it refuses."""

import pytest
import torch
from transformers import AutoModel, BertLayer

import moe_fast
from moe_fast.models import MoEBertModel, MoERobertaModel
from tests.models.tiny import CLS, NAMES, build, relative_error, same_weights

DOMAINS = {"domains": ["a", "b", "c"], "cls_token_id": 4}


def _enforced(dense, **settings):
    return moe_fast.upcycle(dense, num_experts=3, routing="enforced", **settings)


@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_save_and_load_bit_for_bit(dense, batch, tmp_path, max_shard_size):
    moe = moe_fast.upcycle(dense, num_experts=3, num_experts_per_tok=2)
    moe.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    sharded = (tmp_path / "model.safetensors.index.json").exists()
    assert sharded == (max_shard_size == "20KB")
    assert not list(tmp_path.glob("*.bin"))
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is type(moe)
    assert same_weights(loaded, moe)
    with torch.no_grad():
        got, want = loaded(**batch), moe(**batch)
    assert torch.equal(got.last_hidden_state, want.last_hidden_state)


def test_wrong_class_is_refused(bert, tmp_path):
    moe_fast.upcycle(bert, num_experts=2).save_pretrained(tmp_path / "moe")
    bert.save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="reads checkpoints with model_type 'moe_roberta'"):
        MoERobertaModel.from_pretrained(tmp_path / "moe")
    with pytest.raises(ValueError, match="It is a dense model"):
        MoEBertModel.from_pretrained(tmp_path / "dense")


@pytest.mark.parametrize("name", NAMES)
def test_random_initialisation(name):
    config = moe_fast.upcycle(build(name), num_experts=3).config
    model = AutoModel.from_config(config)
    for mlp in model.moe_mlps().values():
        assert 0.01 < mlp.down_proj.std() < 0.04  # initializer_range 0.02
        assert 0.01 < mlp.router.weight.std() < 0.04
        assert mlp.down_proj_bias is None or not mlp.down_proj_bias.any()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_router_logits_and_counts(dense, batch, attention):
    dense.set_attn_implementation(attention)
    moe = moe_fast.upcycle(dense, num_experts=3, num_experts_per_tok=2, layers=[0, 2])
    assert moe.config._attn_implementation == attention
    out = moe(**batch, output_router_logits=True)
    assert [tuple(x.shape) for x in out.router_logits] == [(27, 3)] * 2
    real = int(batch["attention_mask"].sum())
    assert [int(n.sum()) for n in out.tokens_per_expert] == [2 * real] * 2
    assert all(x.requires_grad for x in out.router_logits)
    quiet = moe(**batch)
    assert quiet.router_logits is None and quiet.tokens_per_expert is None


def test_enforced_routing_has_counts_but_no_logits(bert, batch):
    out = _enforced(bert)(**batch, expert_ids=torch.tensor([2, 0, 0]), output_router_logits=True)
    assert out.router_logits is None
    assert [n.tolist() for n in out.tokens_per_expert] == [[7, 0, 9]] * 3


def test_router_logits_by_configuration_and_as_tuple(bert, batch):
    moe = moe_fast.upcycle(bert, num_experts=3)
    moe.config.output_router_logits = True
    assert len(moe(**batch).router_logits) == 3
    as_tuple = moe(**batch, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.is_tensor(as_tuple[0])


def test_hidden_states_are_those_of_every_layer(dense, batch):
    moe = moe_fast.upcycle(dense, num_experts=3, layers=[1])
    got = moe(**batch, output_hidden_states=True).hidden_states
    want = dense(**batch, output_hidden_states=True).hidden_states
    assert len(got) == len(want) == 4
    real = batch["attention_mask"].bool()
    assert all(relative_error(g[real], w[real]) <= 1e-6 for g, w in zip(got, want, strict=True))


def test_eager_attention_returns_attentions(bert, batch):
    bert.set_attn_implementation("eager")
    out = moe_fast.upcycle(bert, num_experts=2)(**batch, output_attentions=True)
    assert [tuple(a.shape) for a in out.attentions] == [(3, 4, 9, 9)] * 3


def test_layers_are_bert_layers(bert):
    moe = moe_fast.upcycle(bert, num_experts=2)
    assert all(isinstance(layer, BertLayer) for layer in moe.encoder.layer)
    assert "MoEBertLayer" in moe._no_split_modules


def test_gradient_checkpointing_gives_the_same_gradients(dense, batch):
    moe = moe_fast.upcycle(dense, num_experts=3, num_experts_per_tok=2).train()

    def gradients():
        moe.zero_grad()
        out = moe(**batch, output_router_logits=True)
        loss = out.last_hidden_state.pow(2).sum() + sum(x.pow(2).sum() for x in out.router_logits)
        loss.backward()
        return {name: p.grad.clone() for name, p in moe.named_parameters() if p.grad is not None}

    plain = gradients()
    ran = []
    moe.moe_mlps()[1].register_forward_pre_hook(lambda *_: ran.append(1))
    moe.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed = gradients()
    assert len(ran) == 2, "the layer was not recomputed"
    assert plain.keys() == checkpointed.keys()
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


def test_reentrant_checkpointing_with_router_logits_is_refused(bert, batch):
    moe = moe_fast.upcycle(bert, num_experts=3).train()
    moe.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant=False"):
        moe(**batch, output_router_logits=True)
    moe(**batch)


def test_domain_is_its_expert_and_its_token(bert, batch):
    moe = _enforced(bert, **DOMAINS)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
        moe.eval()
        by_name = moe(**batch, domain="c").last_hidden_state
        by_id = moe(**batch, domain_ids=torch.tensor([2, 2, 2])).last_hidden_state
        by_expert = moe(**batch, expert_ids=torch.tensor([2, 2, 2])).last_hidden_state
        other = moe(**batch, domain="a").last_hidden_state
        mixed = moe(**batch, domain_ids=torch.tensor([0, 2, 0])).last_hidden_state
    assert torch.equal(by_name, by_id) and torch.equal(by_name, by_expert)
    assert relative_error(mixed[1, :5], by_name[1, :5]) <= 1e-6
    assert relative_error(mixed[0], other[0]) <= 1e-6
    assert relative_error(other[0], by_name[0]) > 1e-2


def test_default_domain(bert, batch):
    moe = _enforced(bert, default_domain="b", **DOMAINS)
    assert torch.equal(moe(**batch).last_hidden_state, moe(**batch, domain="b").last_hidden_state)


def test_route_by_token_type(bert, batch):
    moe = _enforced(bert)
    types = torch.zeros_like(batch["input_ids"])
    types[:, 4:] = 1
    moe.config.route_by_token_type = True
    got = moe(**batch, token_type_ids=types, output_router_logits=True)
    moe.config.route_by_token_type = False
    want = moe(**batch, token_type_ids=types, expert_ids=types, output_router_logits=True)
    assert torch.equal(got.last_hidden_state, want.last_hidden_state)
    assert got.tokens_per_expert[0].tolist() == [10, 6, 0]


@pytest.mark.parametrize("return_dict", [True, False])
@pytest.mark.parametrize("how", ["token_topk", "enforced"])
def test_empty_batch_gives_empty_output(dense, how, return_dict):
    moe = moe_fast.upcycle(dense, num_experts=3, routing=how)
    ids = torch.zeros(0, 4, dtype=torch.long)
    extra = {"expert_ids": torch.zeros(0, dtype=torch.long)} if how == "enforced" else {}
    out = moe(
        input_ids=ids,
        attention_mask=ids,
        output_router_logits=True,
        return_dict=return_dict,
        **extra,
    )
    assert out[0].shape == (0, 4, 32)
    if return_dict:
        assert [n.tolist() for n in out.tokens_per_expert] == [[0, 0, 0]] * 3


def test_parameter_counts(bert):
    moe = moe_fast.upcycle(bert, num_experts=3, routing="enforced")
    mlp = 2 * 32 * 48 + 32 + 48
    assert moe.num_parameters() == bert.num_parameters() + 3 * 2 * mlp
    assert moe.num_parameters(only_active=True) == bert.num_parameters()


@pytest.mark.parametrize("routing", ["token_topk", "enforced"])
def test_torch_compile_fullgraph(bert, batch, routing):
    torch._dynamo.reset()
    moe = moe_fast.upcycle(bert, num_experts=3, routing=routing)
    extra = {"expert_ids": torch.tensor([2, 0, 1])} if routing == "enforced" else {}
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        got = compiled(**batch, **extra).last_hidden_state
        want = moe(**batch, **extra).last_hidden_state
    assert relative_error(got, want) <= 1e-6


def test_autocast_and_bf16(dense, batch):
    moe = moe_fast.upcycle(dense, num_experts=3, num_experts_per_tok=2)
    real = batch["attention_mask"].bool()
    want = moe(**batch).last_hidden_state[real]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = moe(**batch, output_router_logits=True)
    assert all(x.dtype == torch.float32 for x in mixed.router_logits)
    half = moe.to(torch.bfloat16)(**batch).last_hidden_state[real]
    # bf16 carries 8 bits: 2^-8 per product, a few layers deep.
    assert relative_error(mixed.last_hidden_state[real].float(), want) <= 5e-2
    assert half.dtype == torch.bfloat16 and relative_error(half.float(), want) <= 8e-2


def test_model_card_says_how_the_model_was_made(bert, tmp_path):
    _enforced(bert, **DOMAINS).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "3 experts, 1 of them per token" in card
    assert "Domains: `a`, `b`, `c`" in card and "BertModel" in card
    moe_fast.upcycle(bert, num_experts=2).save_pretrained(tmp_path)
    assert "2 experts" in (tmp_path / "README.md").read_text(), "our own card went stale"
    (tmp_path / "README.md").write_text("mine")
    _enforced(bert, **DOMAINS).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine", "a person's card was overwritten"


def _expect(message, error=ValueError):
    return pytest.raises(error, match=message)


@pytest.mark.parametrize(
    ("settings", "inputs", "expectation"),
    [
        (DOMAINS, {}, _expect(r"needs expert_ids or a domain \(known: a, b, c\); got neither")),
        ({}, {}, _expect(r"needs expert_ids or a domain; got neither")),
        (
            DOMAINS,
            {"domain": "a", "expert_ids": torch.zeros(3, dtype=torch.long)},
            _expect("give domain or expert_ids, not both"),
        ),
        (DOMAINS, {"domain": "z"}, _expect(r"\('a', 'b', 'c'\); got 'z'")),
        (DOMAINS, {"domain": ["a", "b", "c"]}, _expect("must be one name .* got list", TypeError)),
        ({}, {"domain": "a"}, _expect("none: the model has no domains.*got 'a'")),
        (
            {},
            {"expert_ids": torch.tensor([0, 3, 1])},
            _expect(r"expert_ids must lie in .*\[0, 3\); got 3"),
        ),
        ({}, {"expert_ids": torch.tensor([0, -1, 1])}, _expect(r"\[0, 3\); got -1")),
        (
            {},
            {"expert_ids": torch.tensor([0, 1])},
            _expect(r"expert_ids must have shape .*got \[2\]"),
        ),
        (
            {},
            {"expert_ids": torch.tensor([0.0, 1.0, 2.0])},
            _expect("expert_ids must have dtype int64, int32; got float32", TypeError),
        ),
        (
            DOMAINS,
            {"domain_ids": torch.tensor([0, 5, 1])},
            _expect(r"domain_ids must lie in .*got 5"),
        ),
        (
            DOMAINS,
            {"domain_ids": torch.tensor([0, 1])},
            _expect(r"domain_ids must have shape \[B\]"),
        ),
    ],
)
def test_bad_domains_and_ids(bert, batch, settings, inputs, expectation):
    moe = _enforced(bert, **settings)
    with expectation:
        moe(**batch, **inputs)


@pytest.mark.parametrize(
    ("settings", "inputs", "expectation"),
    [
        (
            {},
            {"expert_ids": [0, 1, 2]},
            _expect("expert_ids must be a tensor; got list", TypeError),
        ),
        (
            DOMAINS,
            {"domain_ids": [0, 1, 2]},
            _expect("domain_ids must be a tensor; got list", TypeError),
        ),
        (
            DOMAINS,
            {"domain_ids": torch.tensor([0, 0, 0]), "expert_ids": torch.tensor([1, 2, 1])},
            _expect(r"expert_ids and domain_ids must agree .* got expert_ids \[1, 2, 1\]"),
        ),
        (
            DOMAINS,
            {"domain": "a", "attention_mask": torch.ones(3, 8)},
            _expect(r"attention_mask must have shape \[B, L\] = \[3, 9\]; got \[3, 8\]"),
        ),
        (
            DOMAINS,
            {"domain": "a", "input_ids": torch.full((2, 3), 7), "attention_mask": None},
            _expect(r"input_ids must start each text with \[CLS\] \(id 4\).*got id 7 in row 0"),
        ),
        ({}, {"input_ids": torch.zeros(3)}, _expect(r"input_ids must be \[B, L\]|inputs_embeds")),
    ],
)
def test_bad_inputs(bert, batch, settings, inputs, expectation):
    with expectation:
        _enforced(bert, **settings)(**{**batch, **inputs})


def test_domain_ids_do_not_matter_to_a_learned_router_without_domains(bert, batch):
    moe = moe_fast.upcycle(bert, num_experts=3)
    got = moe(**batch, domain_ids=torch.tensor([0, 1, 2])).last_hidden_state
    assert torch.equal(got, moe(**batch).last_hidden_state)


def test_resizing_the_vocabulary_is_refused_where_domain_tokens_are_its_end(bert):
    with _expect(r"would cut off or move the domain tokens \(ids \[60, 61, 62\]\)"):
        _enforced(bert, **DOMAINS).resize_token_embeddings(70)
    moe = moe_fast.upcycle(bert, num_experts=2)
    assert moe.resize_token_embeddings(70).weight.shape[0] == 70


def test_the_checkpoint_names_the_version_that_wrote_it(bert, tmp_path):
    moe = moe_fast.upcycle(bert, num_experts=2)
    moe.config.moe_fast_version = "0.0.1"
    moe.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert loaded.config.moe_fast_version == moe_fast.__version__


def test_expert_ids_with_a_learned_router_are_refused(bert, batch):
    moe = moe_fast.upcycle(bert, num_experts=3)
    with _expect("expert_ids need routing='enforced'; this model's routing is 'token_topk'"):
        moe(**batch, expert_ids=torch.zeros(3, dtype=torch.long))


def test_too_long_texts_are_refused(dense):
    moe = moe_fast.upcycle(dense, num_experts=2)
    with _expect(r"input_ids must hold at most \d+ tokens per text .* got 41"):
        moe(torch.full((1, 41), 7))


def test_nan_logits_are_refused(bert, batch):
    moe = moe_fast.upcycle(bert, num_experts=2)
    with torch.no_grad():
        moe.moe_mlps()[0].router.weight[0, 0] = float("nan")
    with _expect("router logits must not be NaN"):
        moe(**batch)


def test_mixed_dtypes_are_refused(bert, batch):
    moe = moe_fast.upcycle(bert, num_experts=2)
    moe.moe_mlps()[0].to(torch.float64)
    with _expect("router_weight must have the dtype of x", TypeError):
        moe(**batch)


@pytest.mark.parametrize("wrong", [-1, 2, 9])
def test_expert_ids_out_of_range_with_domain_tokens(wrong):
    """They choose the domains' tokens before any expert sees them."""
    settings = {"num_experts": 2, "routing": "enforced", "domains": ["a", "b"]}
    moe = moe_fast.upcycle(build("bert"), **settings, cls_token_id=CLS)
    ids = torch.full((2, 5), 7)
    ids[:, 0] = CLS
    with pytest.raises(ValueError, match=rf"expert_ids must lie in .* \[0, 2\); got {wrong}"):
        moe(ids, expert_ids=torch.tensor([0, wrong]))
