"""Before training: the model can learn, and in a precision that keeps what it learns."""

from __future__ import annotations

import warnings

import pytest
import torch
from sentence_transformers import SentenceTransformerTrainingArguments
from tiny_models import make_dense, make_pairs
from torch import nn

from moe_fast.losses import InfoNCELoss
from moe_fast.training import MoESentenceTransformerTrainer
from moe_fast.training.trainable import check_precision


def make_trainer(model, loss, tmp_path):
    args = SentenceTransformerTrainingArguments(
        str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=4,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    data = make_pairs(4).remove_columns("domain")
    return MoESentenceTransformerTrainer(model, args, data, loss=loss)


@pytest.mark.parametrize("learn_temperature", [False, True])
def test_a_frozen_model_is_refused_also_with_a_temperature_to_learn(learn_temperature, tmp_path):
    model = make_dense(layers=1).requires_grad_(False)
    loss = InfoNCELoss(model, learn_temperature=learn_temperature)
    trainer = make_trainer(model, loss, tmp_path)
    with pytest.raises(ValueError, match=r"frozen.*requires_grad_\(True\).*is_trainable=True.*--t"):
        trainer.train()


class Detached(nn.Module):
    """A loss of a parameter of its own, and of embeddings without a way back."""

    def __init__(self, model):
        super().__init__()
        self.model, self.own = model, nn.Parameter(torch.ones(()))

    def forward(self, features, labels=None):
        embeddings = self.model(dict(next(iter(features))))["sentence_embedding"]
        return embeddings.detach().sum() * self.own


def test_a_loss_that_does_not_reach_the_model_is_refused_before_the_first_step(tmp_path):
    model = make_dense(layers=1)
    loss = Detached(model)
    with pytest.raises(ValueError, match="depends on no trainable parameter of the model"):
        make_trainer(model, loss, tmp_path).train()
    assert loss.own.item() == 1


def test_float16_is_refused_and_bfloat16_draws_a_warning():
    model = nn.Linear(2, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_precision(model, nn.Module())
        check_precision(nn.Linear(2, 2).half().requires_grad_(False), {"x": nn.Module()})
    with pytest.warns(UserWarning, match=r"bfloat16.*model\.float\(\)"):
        check_precision(model.bfloat16(), nn.Module())
    with pytest.raises(ValueError, match=r"are float16.*model\.float\(\)"):
        check_precision(model.half(), nn.Module())
