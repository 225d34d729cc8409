"""A run goes on exactly where it stopped, whatever its data are and in whatever pass it was."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformerTrainingArguments
from tiny_models import make_dense, make_flag_rows, make_pairs
from torch.utils.data import DataLoader
from transformers import PrinterCallback

from moe_fast.losses import InfoNCELoss
from moe_fast.training import DomainBatchSampler, MoESentenceTransformerTrainer
from moe_fast.training.position import POSITION_NAME, DataPosition

STEPS = 7


def pairs(rows=11, seed=0):
    return make_pairs(rows, seed).remove_columns("domain")


def repeated():
    """So many equal texts that batches without duplicates are fewer than rows / batch size."""
    return Dataset.from_dict(
        {"a": ["apple"] * 6 + list("xyzuvw"), "b": ["pear"] * 6 + list("stqrno")}
    )


def single():
    return functools.partial(DomainBatchSampler, mode="single")


FORMS = {
    "a dataset": lambda: (pairs(), {}),
    "no duplicates": lambda: (repeated(), {"batch_sampler": "no_duplicates"}),
    "lists of passages": lambda: (make_flag_rows(11).remove_columns("domain"), {}),
    "several datasets": lambda: (DatasetDict(x=pairs(7), y=pairs(4, 3)), {}),
    "taking turns": lambda: (
        DatasetDict(x=pairs(7), y=pairs(5, 3)),
        {"multi_dataset_batch_sampler": "round_robin"},
    ),
    "several, by domain": lambda: (
        DatasetDict(x=make_pairs(7), y=make_pairs(4, 3)),
        {"batch_sampler": single()},
    ),
    "a stream": lambda: (pairs().to_iterable_dataset(), {}),
    "a shuffled stream": lambda: (
        pairs().to_iterable_dataset(num_shards=3).shuffle(seed=1, buffer_size=4),
        {},
    ),
    "a stream, accumulated": lambda: (
        pairs().to_iterable_dataset(),
        {"gradient_accumulation_steps": 2},
    ),
}


def make_trainer(form, folder, **settings):
    data, special = FORMS[form]()
    model = make_dense(dropout=0.2, layers=1)
    arguments = {
        "per_device_train_batch_size": 4,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "save_strategy": "steps",
        "save_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 7,
    }
    args = SentenceTransformerTrainingArguments(str(folder), **arguments | special | settings)
    loss = InfoNCELoss(model, learn_temperature=True)
    trainer = MoESentenceTransformerTrainer(model, args, data, loss=loss)
    trainer.remove_callback(PrinterCallback)
    return trainer


def weights(folder):
    path = folder / f"checkpoint-{STEPS}"
    tensors = load_file(path / "model.safetensors") | load_file(path / "loss_state.safetensors")
    return tensors | {"random state": torch.load(path / "rng_state.pth", weights_only=False)["cpu"]}


@pytest.mark.parametrize("form", FORMS)
def test_stopped_in_any_pass(form, tmp_path):
    make_trainer(form, tmp_path / "whole").train()
    expected = weights(tmp_path / "whole")
    for step in (2, 3, 5):  # a pass has three batches or more: within, at the end, in a later one
        place = tmp_path / f"from {step}"
        trainer = make_trainer(form, place, save_steps=STEPS)
        trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        ours = weights(place)
        assert [key for key in expected if not torch.equal(ours[key], expected[key])] == []


def test_a_checkpoint_with_gradients_left_is_refused(tmp_path):
    """A pass of three batches, two per step: the third's gradients are in no file."""
    settings = {"save_strategy": "epoch", "max_steps": 2}
    make_trainer("a stream, accumulated", tmp_path, **settings).train()
    assert DataPosition(1, 0, 1) == DataPosition(
        **json.loads((tmp_path / "checkpoint-1" / POSITION_NAME).read_text())
    )
    trainer = make_trainer("a stream, accumulated", tmp_path, **settings)
    with pytest.raises(ValueError, match=r"gradients of 1 batches not applied.*by steps"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_what_a_failed_training_was_reading_does_not_matter(tmp_path):
    """accelerate keeps one list of dataloaders for all trainers of a process."""
    loader = Accelerator(cpu=True).prepare(DataLoader(range(3)))
    reading = iter(loader)
    next(reading)
    make_trainer("a stream", tmp_path, save_strategy="epoch", max_steps=4).train()
    assert len(list(reading)) == 2  # it is off the list again
    saved = json.loads((tmp_path / "checkpoint-3" / POSITION_NAME).read_text())
    assert DataPosition(**saved) == DataPosition(1, 0)


def test_a_stream_needs_to_know_where_it_was(tmp_path):
    make_trainer("a stream", tmp_path, max_steps=1).train()
    (tmp_path / "checkpoint-1" / POSITION_NAME).unlink()
    with pytest.raises(ValueError, match="does not say where in the streamed data"):
        make_trainer("a stream", tmp_path).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("text", ["{", "[]", '{"epoch": -1, "batches": 0}', '{"epoch": 0}'])
def test_damaged_positions(text, tmp_path):
    (tmp_path / POSITION_NAME).write_text(text)
    with pytest.raises(ValueError, match=f"{POSITION_NAME} cannot be read"):
        DataPosition.load(tmp_path)
