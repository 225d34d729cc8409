"""An encoder with three heads in training: all heads learn, checkpoints and the loss's state."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from real_texts import make_dense, passages, tokenizer
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from test_cached_training import unequal_pairs
from test_trainer import make_trainer
from tiny_models import make_moe
from transformers import BertModel

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


def encoder_of_real_texts(folder) -> SentenceTransformer:
    """A random BERT of width 32, whose tokens' hidden states have a large common part."""
    make_dense(BertModel, initializer_range=0.2).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    modules = [Transformer(str(folder)), Pooling(32, "mean")]
    return SentenceTransformer(modules=modules, device="cpu")


@pytest.mark.slow
@pytest.mark.parametrize("floor", [0.0, 0.6])
def test_the_floor_keeps_the_sparse_head_alive(tmp_path, floor):
    """300 steps on real texts, from torch's own initialisation of the head.

    With the published loss every text loses its weights within a few steps; with the floor the
    median number of non-zero weights stays above half of what it was.
    """
    model = add_three_heads(encoder_of_real_texts(tmp_path))
    model.heads.sparse_linear.reset_parameters()
    columns = [[row[i] for row in passages()] for i in (1, 2)]

    def nonzeros() -> list[float]:
        rows = [model.encode(c, outputs="sparse", truncate=True).sparse for c in columns]
        return [float(np.median(np.diff(r.indptr))) for r in rows]

    before = nonzeros()
    loss = MultiHeadInfoNCELoss(model, sparse_floor=floor)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(300):
        batch = [(step * 12 + i) % len(columns[0]) for i in range(12)]
        optimizer.zero_grad()
        loss([model.preprocess([column[i] for i in batch]) for column in columns]).backward()
        optimizer.step()
    kept = [now / then for now, then in zip(nonzeros(), before, strict=True)]
    assert min(kept) >= 0.5 if floor else max(kept) == 0.0, (before, kept)
