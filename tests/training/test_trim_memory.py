"""TrimMemoryCallback: every so many steps, and harmless where there is no glibc."""

import warnings

import pytest
import torch
from sentence_transformers.sentence_transformer.training_args import (
    SentenceTransformerTrainingArguments,
)
from tiny_models import make_moe, make_pairs
from transformers import TrainerState

from moe_fast import malloc
from moe_fast.losses import InfoNCELoss
from moe_fast.training import MoESentenceTransformerTrainer, TrimMemoryCallback, trim_memory


@pytest.fixture
def trims(monkeypatch):
    """The calls of a replaced malloc_trim."""
    calls = []
    monkeypatch.setattr(trim_memory, "malloc_trim", lambda: calls.append)
    return calls


@pytest.mark.parametrize(("every", "expected"), [(1, 6), (2, 3), (4, 1), (7, 0)])
def test_it_trims_after_so_many_steps(trims, every, expected):
    callback = TrimMemoryCallback(every)
    for step in range(1, 7):
        callback.on_step_end(None, TrainerState(global_step=step), None)
    assert trims == [0] * expected


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "2", None])
def test_other_numbers_are_refused(every):
    with pytest.raises(ValueError, match="every_steps must be an integer of at least 1; got"):
        TrimMemoryCallback(every)


def test_without_glibc_it_warns_and_does_nothing(monkeypatch):
    monkeypatch.setattr(malloc.sys, "platform", "darwin")
    with pytest.warns(UserWarning, match="has no malloc_trim"):
        callback = TrimMemoryCallback()
    callback.on_step_end(None, TrainerState(global_step=1), None)


def test_training_gives_the_same_weights(tmp_path):
    def train(callbacks):
        model = make_moe()
        trainer = MoESentenceTransformerTrainer(
            model=model,
            args=SentenceTransformerTrainingArguments(
                str(tmp_path),
                max_steps=2,
                save_strategy="no",
                report_to="none",
                use_cpu=True,
                disable_tqdm=True,
            ),
            train_dataset=make_pairs(8),
            loss=InfoNCELoss(model),
            callbacks=callbacks,
        )
        trainer.train()
        return dict(model.named_parameters())

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="TrimMemoryCallback")  # not on this system
        trimmed = train([TrimMemoryCallback()])
    torch.testing.assert_close(trimmed, train([]), rtol=0, atol=0)
