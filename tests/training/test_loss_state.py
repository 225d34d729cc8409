"""A loss's own tensors: found among the model's, written whole, restored or refused."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from tiny_models import folder_names, make_dense
from torch import nn

from moe_fast.losses import InfoNCELoss
from moe_fast.training.loss_state import (
    LOSS_STATE_NAME,
    load_loss_state,
    own_state,
    save_loss_state,
)


class Wrapper(nn.Module):
    """A loss around a loss, with a running average (a buffer) beside."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss
        self.model = loss.model
        self.register_buffer("average", torch.tensor([1.0, 2.0]))
        self.register_buffer("scratch", torch.tensor(3.0), persistent=False)


@pytest.fixture(scope="module")
def model():
    return make_dense()


def learned(model, value: float = 0.05) -> InfoNCELoss:
    return InfoNCELoss(model, learn_temperature=True, temperature=value)


def test_own_state_is_what_is_not_an_encoders(model):
    assert set(own_state(learned(model))) == {"log_temperature"}
    assert own_state(InfoNCELoss(model)) == {}
    assert own_state(MultipleNegativesRankingLoss(model)) == {}
    assert set(own_state(Wrapper(learned(model)))) == {"loss.log_temperature", "average"}
    losses = {"a": learned(model), "b": InfoNCELoss(model), "c": Wrapper(learned(model))}
    assert set(own_state(losses)) == {"a.log_temperature", "c.average", "c.loss.log_temperature"}
    wrapped = learned(model)
    wrapped.model = nn.Sequential(model)  # as a data-parallel wrapper stands between
    assert set(own_state(wrapped)) == {"log_temperature"}


def test_round_trip_bit_for_bit(model, tmp_path):
    loss = Wrapper(learned(model, 0.1234567))
    loss.average.copy_(torch.tensor([0.1, torch.pi]))
    expected = {key: tensor.clone() for key, tensor in own_state(loss).items()}
    save_loss_state(loss, tmp_path)
    assert folder_names(tmp_path) == {LOSS_STATE_NAME}
    fresh = Wrapper(learned(model))
    parameter = fresh.loss.log_temperature
    load_loss_state(fresh, tmp_path)
    for key, tensor in own_state(fresh).items():
        assert torch.equal(tensor, expected[key])
    assert fresh.loss.log_temperature is parameter  # the one the optimizer holds


def test_a_loss_without_state_writes_and_needs_nothing(model, tmp_path):
    save_loss_state(InfoNCELoss(model), tmp_path)
    assert folder_names(tmp_path) == set()
    load_loss_state(InfoNCELoss(model), tmp_path)


def test_a_missing_state_is_an_error(model, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"loss_state.safetensors.*\['log_temperature'\]"):
        load_loss_state(learned(model), tmp_path)


@pytest.mark.parametrize("other", ["none", "wrapper"])
def test_another_losss_state_is_an_error(model, tmp_path, other):
    save_loss_state(learned(model), tmp_path)
    loss = InfoNCELoss(model) if other == "none" else Wrapper(learned(model))
    with pytest.raises(ValueError, match="belongs to another loss: it holds"):
        load_loss_state(loss, tmp_path)


def test_an_interrupted_write_leaves_the_old_state(model, tmp_path, monkeypatch):
    save_loss_state(learned(model, 0.2), tmp_path)

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_loss_state(learned(model, 0.3), tmp_path)
    assert folder_names(tmp_path) == {LOSS_STATE_NAME}
    saved = load_file(tmp_path / LOSS_STATE_NAME)["log_temperature"]
    assert torch.equal(saved, learned(model, 0.2).log_temperature.detach())
