"""extract_expert undoes upcycle, bit for bit, and gives what the mixture gives for that expert."""

import pytest
import torch

import moe_fast
from tests.models.tiny import relative_error, same_weights


def _perturb(model):
    """Change every parameter, each expert differently."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


@pytest.mark.parametrize("target", ["mlp", "intermediate", "output"])
@pytest.mark.parametrize(
    "settings",
    [
        {"num_experts_per_tok": 2},
        {"routing": "enforced"},
        {"routing": "enforced", "domains": ["a", "b", "c"], "cls_token_id": 4},
        {"domains": ["a", "b"], "cls_token_id": 4, "layers": "single"},
    ],
)
def test_round_trip_bit_for_bit(dense, target, settings):
    moe = moe_fast.upcycle(dense, num_experts=3, target=target, **settings)
    back = moe_fast.extract_expert(moe, 1)
    assert type(back) is type(dense)
    assert same_weights(back, dense)
    want, got = dense.config.to_dict(), back.config.to_dict()
    assert {k: got[k] for k in want if k != "architectures"} == {
        k: want[k] for k in want if k != "architectures"
    }


@pytest.mark.parametrize("target", ["mlp", "intermediate", "output"])
def test_gives_the_mixtures_output_for_its_domain(dense, batch, target):
    moe = moe_fast.upcycle(
        dense.double(),
        num_experts=3,
        routing="enforced",
        domains=["a", "b", "c"],
        cls_token_id=4,
        target=target,
    )
    moe = _perturb(moe)
    real = batch["attention_mask"].bool()
    for domain in ("a", "c"):
        alone = moe_fast.extract_expert(moe, domain)
        got = alone(**batch).last_hidden_state[real]
        want = moe(**batch, domain=domain).last_hidden_state[real]
        assert relative_error(got, want) <= 1e-12


def test_keep_domain_tokens(bert, batch):
    moe = moe_fast.upcycle(
        bert, num_experts=2, routing="enforced", domains=["a", "b"], cls_token_id=4
    )
    moe = _perturb(moe)
    kept = moe_fast.extract_expert(moe, "b", keep_domain_tokens=True)
    assert kept.config.vocab_size == 62
    assert torch.equal(kept.get_input_embeddings().weight, moe.get_input_embeddings().weight)
    placed = batch["input_ids"].clone()
    placed[:, 0] = moe.config.domain_token_ids[1]
    got = kept(placed, attention_mask=batch["attention_mask"]).last_hidden_state
    want = moe(**batch, domain="b").last_hidden_state
    real = batch["attention_mask"].bool()
    assert relative_error(got[real], want[real]) <= 1e-6


@pytest.mark.parametrize(
    ("expert", "error", "message"),
    [
        (3, ValueError, r"expert must lie in \[0, 3\); got 3"),
        (-1, ValueError, r"expert must lie in \[0, 3\); got -1"),
        ("z", ValueError, r"domain must be one of .*'a', 'b', 'c'.*got 'z'"),
        (1.0, TypeError, r"expert must be an int or a domain's name; got 1.0"),
    ],
)
def test_unknown_expert(bert, expert, error, message):
    moe = moe_fast.upcycle(
        bert, num_experts=3, routing="enforced", domains=["a", "b", "c"], cls_token_id=4
    )
    with pytest.raises(error, match=message):
        moe_fast.extract_expert(moe, expert)


def test_a_domain_has_no_expert_where_routing_is_learned(bert):
    moe = moe_fast.upcycle(bert, num_experts=3, domains=["a"], cls_token_id=4)
    with pytest.raises(ValueError, match="expert must be an index where routing is learned"):
        moe_fast.extract_expert(moe, "a")


def test_a_dense_model_is_refused(bert):
    with pytest.raises(TypeError, match="model must be a mixture of experts; got BertModel"):
        moe_fast.extract_expert(bert, 0)
