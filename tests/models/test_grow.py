"""add_expert and remove_expert: one expert more or fewer, nothing else changed."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import moe_fast
from tests.models.tiny import CLS, NAMES, build, relative_error, same_weights

DOMAINS = ["a", "b", "c"]


def mixture(dense, **changes):
    """Three experts that differ, with tokens that differ."""
    given_ = {"routing": "enforced", "domains": DOMAINS, "cls_token_id": CLS, **changes}
    if given_["routing"] != "enforced":
        del given_["domains"], given_["cls_token_id"]
    moe = moe_fast.upcycle(dense, num_experts=3, **given_)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return moe


def output(model, batch, **options):
    return model(**batch, **options).last_hidden_state[batch["attention_mask"].bool()]


def same_config(a, b):
    return a.config.to_dict() == b.config.to_dict()


@pytest.mark.parametrize("target", ["mlp", "intermediate", "output"])
@pytest.mark.parametrize("domain_tokens", [True, False])
def test_old_domains_are_unchanged_and_the_new_one_is_its_source(
    dense, batch, target, domain_tokens
):
    old = mixture(dense, target=target, domain_tokens=domain_tokens, layers="alternate")
    new = moe_fast.add_expert(old, "d", from_expert="b")
    assert new.config.domains == [*DOMAINS, "d"] and new.config.num_experts == 4
    assert new.config.vocab_size == old.config.vocab_size + domain_tokens
    for domain in DOMAINS:
        assert torch.equal(output(new, batch, domain=domain), output(old, batch, domain=domain))
    assert torch.equal(output(new, batch, domain="d"), output(old, batch, domain="b"))
    assert type(new) is type(old)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    name=st.sampled_from(NAMES),
    target=st.sampled_from(["mlp", "intermediate", "output"]),
    layers=st.sampled_from(["all", "single"]),
    routing=st.sampled_from(["enforced", "token_topk", "dense"]),
    from_expert=st.sampled_from([None, 0, 1, 2]),
)
def test_add_then_remove_is_the_same_model_bit_for_bit(name, target, layers, routing, from_expert):
    old = mixture(build(name), target=target, layers=layers, routing=routing)
    domain = "d" if routing == "enforced" else None
    added = moe_fast.add_expert(old, domain, from_expert=from_expert)
    assert not same_weights(added, old)
    again = moe_fast.remove_expert(added, 3 if domain is None else domain)
    assert same_weights(again, old) and same_config(again, old)


def test_removing_one_leaves_the_others_as_they_were(dense, batch):
    old = mixture(dense)
    new = moe_fast.remove_expert(old, "b")
    assert new.config.domains == ["a", "c"]
    assert new.config.domain_token_ids == old.config.domain_token_ids[:2]
    for domain in ("a", "c"):
        assert torch.equal(output(new, batch, domain=domain), output(old, batch, domain=domain))


def test_by_index_where_the_model_has_no_domains(bert, batch):
    old = mixture(bert, domains=None)
    new = moe_fast.add_expert(old, from_expert=2)
    ids = torch.tensor([0, 2, 1])
    assert torch.equal(output(new, batch, expert_ids=ids), output(old, batch, expert_ids=ids))
    got = output(new, batch, expert_ids=torch.tensor([3, 3, 3]))
    assert torch.equal(got, output(old, batch, expert_ids=torch.tensor([2, 2, 2])))


@pytest.mark.parametrize("from_expert", [None, 1])
@pytest.mark.parametrize("weight_mode", ["straight_through", "one"])
def test_a_learned_router_of_weight_one_is_unchanged(dense, batch, from_expert, weight_mode):
    old = mixture(dense.double(), routing="token_topk", weight_mode=weight_mode)
    new = moe_fast.add_expert(old, from_expert=from_expert)
    before = old(**batch, output_router_logits=True)
    after = new(**batch, output_router_logits=True)
    for counts, had in zip(after.tokens_per_expert, before.tokens_per_expert, strict=True):
        assert counts.tolist() == [*had.tolist(), 0], "the new expert loses every tie"
    real = batch["attention_mask"].bool()
    got, want = after.last_hidden_state[real], before.last_hidden_state[real]
    assert relative_error(got, want) <= 1e-12


def test_the_new_router_row_learns(bert, batch):
    new = moe_fast.add_expert(mixture(bert, routing="token_topk"), from_expert=1)
    weights = torch.randn(bert.config.hidden_size, generator=torch.Generator().manual_seed(0))
    (output(new, batch) @ weights).sum().backward()
    gradient = new.moe_mlps()[0].router.weight.grad
    assert gradient[3].abs().max() > 0 and not torch.equal(gradient[3], gradient[1])


def test_the_mean_of_all_experts(bert):
    old = mixture(bert)
    new = moe_fast.add_expert(old, "d")
    for name in ("up_proj", "down_proj_bias"):
        have = getattr(old.moe_mlps()[1], name).double()
        got = getattr(new.moe_mlps()[1], name)[3]
        assert torch.allclose(got.double(), have.mean(0), rtol=0, atol=1e-7)
    tokens = old.get_input_embeddings().weight[old.config.domain_token_ids]
    got = new.get_input_embeddings().weight[new.config.domain_token_ids[3]]
    assert torch.allclose(got.double(), tokens.double().mean(0), rtol=0, atol=1e-7)


def test_what_may_be_trained_the_mode_and_the_input_are_kept(bert):
    old = mixture(bert, trainable="experts").train()
    before = {name: value.clone() for name, value in old.state_dict().items()}
    new = moe_fast.add_expert(old, "d", from_expert=0)
    assert new.training
    for name, parameter in new.named_parameters():
        assert parameter.requires_grad == old.get_parameter(name).requires_grad
        with torch.no_grad():
            parameter.add_(1)
    assert all(torch.equal(value, before[name]) for name, value in old.state_dict().items())


def test_saved_and_loaded(bert, batch, tmp_path):
    new = moe_fast.add_expert(mixture(bert, default_domain="a"), "d", from_expert="c")
    new.save_pretrained(tmp_path)
    again = type(new).from_pretrained(tmp_path)
    assert torch.equal(output(again, batch, domain="d"), output(new, batch, domain="d"))
    assert torch.equal(output(again, batch), output(new, batch, domain="a"))


class TestRefused:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({}, r"domain must name the new expert's domain.*\(a, b, c\)"),
            ({"domain": "b"}, "domain must be a new name; the model has a, b, c"),
            ({"domain": "d", "from_expert": "x"}, "domain must be one of the model's domains"),
            ({"domain": "d", "from_expert": 3}, r"from_expert must lie in \[0, 3\); got 3"),
            ({"domain": ""}, "non-empty names"),
        ],
    )
    def test_add(self, bert, arguments, message):
        with pytest.raises((ValueError, TypeError), match=message):
            moe_fast.add_expert(mixture(bert), **arguments)

    def test_a_domain_without_use(self, bert):
        with pytest.raises(ValueError, match="experts go by index"):
            moe_fast.add_expert(mixture(bert, domains=None), "d")
        with pytest.raises(ValueError, match="a domain has no expert of its own; got 'd'"):
            moe_fast.add_expert(mixture(bert, routing="token_topk"), "d")
        with pytest.raises(ValueError, match="from_expert must be an index"):
            moe_fast.add_expert(mixture(bert, routing="token_topk"), from_expert="a")

    def test_remove(self, bert):
        with pytest.raises(ValueError, match="default_domain='b': set"):
            moe_fast.remove_expert(mixture(bert, default_domain="b"), "b")
        with pytest.raises(ValueError, match="expert must lie in"):
            moe_fast.remove_expert(mixture(bert), 3)
        two = moe_fast.upcycle(bert, num_experts=2, num_experts_per_tok=2)
        with pytest.raises(ValueError, match="1 experts would remain, and num_experts_per_tok=2"):
            moe_fast.remove_expert(two, 0)
        one = moe_fast.upcycle(bert, num_experts=1, routing="enforced")
        with pytest.raises(ValueError, match="0 experts would remain"):
            moe_fast.remove_expert(one, 0)

    def test_a_dense_model(self, bert):
        for change in (moe_fast.add_expert, moe_fast.remove_expert):
            with pytest.raises(TypeError, match="must be a mixture of experts; got BertModel"):
                change(bert, 0)
