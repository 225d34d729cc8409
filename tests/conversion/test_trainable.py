"""set_trainable: what keeps requires_grad."""

import pytest

import moe_fast
from moe_fast.conversion import set_trainable
from tests.models.tiny import CLS, NAMES, build

EXPERTS = {"up_proj", "up_proj_bias", "down_proj", "down_proj_bias"}


def _trainable(model):
    return {name.split("mlp.")[-1] for name, p in model.named_parameters() if p.requires_grad}


def test_all(bert):
    assert all(p.requires_grad for p in moe_fast.upcycle(bert, num_experts=2).parameters())


@pytest.mark.parametrize(
    ("target", "names"),
    [
        ("mlp", EXPERTS),
        ("intermediate", {"up_proj", "up_proj_bias"}),
        ("output", {"down_proj", "down_proj_bias"}),
    ],
)
def test_experts_and_router(bert, target, names):
    moe = moe_fast.upcycle(bert, num_experts=2, target=target, trainable="experts")
    assert _trainable(moe) == names
    set_trainable(moe, "experts+router")
    assert _trainable(moe) == names | {"router.weight"}
    set_trainable(moe, "all")
    assert all(p.requires_grad for p in moe.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_frozen_embeddings(name):
    moe = moe_fast.upcycle(build(name), num_experts=2, domains=["a", "b"], cls_token_id=CLS)
    set_trainable(moe, freeze_embeddings=True)
    frozen = {name for name, p in moe.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, _ in moe.named_parameters() if name.startswith("embeddings.")}
    assert not moe.get_input_embeddings().weight.requires_grad
    set_trainable(moe)
    assert all(p.requires_grad for p in moe.parameters())


@pytest.mark.parametrize("freeze_embeddings", [False, True])
def test_experts_never_include_the_embeddings(bert, freeze_embeddings):
    moe = moe_fast.upcycle(bert, num_experts=2)
    set_trainable(moe, "experts", freeze_embeddings=freeze_embeddings)
    assert _trainable(moe) == EXPERTS


def test_only_trainable_parameters_get_gradients(bert, batch):
    moe = moe_fast.upcycle(bert, num_experts=2, trainable="experts+router")
    moe(**batch).last_hidden_state.pow(2).sum().backward()
    assert _trainable(moe) == {
        name.split("mlp.")[-1] for name, p in moe.named_parameters() if p.grad is not None
    }
