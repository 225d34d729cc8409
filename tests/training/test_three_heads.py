"""An encoder with three heads in training: all heads learn, checkpoints and the loss's state."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from test_cached_training import unequal_pairs
from test_trainer import make_trainer
from tiny_models import make_moe

from moe_fast import MoEThreeHeadEncoder, add_three_heads, load_three_heads
from moe_fast.losses import CachedLoss, MultiHeadInfoNCELoss, RouterLoss


@pytest.mark.parametrize("cached", [False, True])
def test_heads_and_routers_learn_and_are_saved(tmp_path, cached):
    mixture = make_moe(routing="token_topk", num_experts_per_tok=2)
    model = add_three_heads(mixture, multi_vector_dim=8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    inner = MultiHeadInfoNCELoss(model, self_distillation_from=2)
    loss = RouterLoss(inner, load_balance=0.1)
    trainer = make_trainer(
        tmp_path,
        model,
        loss=CachedLoss(loss, tokens_per_chunk=40) if cached else loss,
        dataset=unequal_pairs(48),
        args={"save_strategy": "epoch", "num_train_epochs": 1, "learning_rate": 1e-2},
    )
    trainer.train()
    for name, value in model.state_dict().items():
        if "linear.weight" in name or "router.weight" in name:
            assert not torch.equal(value, before[name]), f"{name} was not trained"
    assert inner.steps >= 3 and 0 < inner.first_share <= 1
    (checkpoint,) = tmp_path.glob("**/checkpoint-*")
    saved = load_three_heads(str(checkpoint), device="cpu")
    assert type(saved) is MoEThreeHeadEncoder
    assert all(torch.equal(v, model.state_dict()[n]) for n, v in saved.state_dict().items())
    state = load_file(next(checkpoint.glob("loss_state*.safetensors")))
    assert any(name.endswith("first_share") for name in state)
    logged = set().union(*trainer.state.log_history)
    assert {"sparse_nonzeros", "loss_multi_vector", "load_balance"} <= logged
