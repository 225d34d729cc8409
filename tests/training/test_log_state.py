"""The logs of a run that stopped between two of them are those of an uninterrupted one."""

from __future__ import annotations

import pytest
from sentence_transformers import SentenceTransformerTrainingArguments
from tiny_models import make_moe, make_pairs
from transformers import PrinterCallback

from moe_fast.losses import InfoNCELoss
from moe_fast.training import ExpertUsageCallback, MoESentenceTransformerTrainer
from moe_fast.training.log_state import LOG_STATE_NAME, load_log_state, save_log_state

STEPS, LOGGED = 8, 3
TIMES = ("_per_second", "_runtime")


def run(folder, resume=None, **settings):
    """(log without its times, tokens per expert, what train() gives back) of eight steps."""
    arguments = {
        "max_steps": STEPS,
        "logging_steps": LOGGED,
        "save_strategy": "steps",
        "save_steps": 1,
        "per_device_train_batch_size": 4,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    args = SentenceTransformerTrainingArguments(str(folder), **arguments | settings)
    model, usage = make_moe(), ExpertUsageCallback()
    trainer = MoESentenceTransformerTrainer(
        model, args, make_pairs(12), loss=InfoNCELoss(model), callbacks=[usage]
    )
    trainer.remove_callback(PrinterCallback)
    output = trainer.train(resume_from_checkpoint=resume)
    return timeless(trainer.state.log_history), usage.total_tokens(), output


def timeless(log):
    return [
        {name: value for name, value in entry.items() if not name.endswith(TIMES)} for entry in log
    ]


def test_a_run_that_stopped_anywhere_logs_the_same(tmp_path):
    log, tokens, output = run(tmp_path / "whole")
    assert [entry["step"] for entry in log] == [3, 6, 8]
    assert {"loss", "in_batch_accuracy", "expert_load_imbalance"} <= log[1].keys()
    assert output.training_loss == log[-1]["train_loss"] == output.metrics["train_loss"]
    for step in (2, 3, 5, STEPS):  # before, at and after a log; with no step left
        checkpoint = str(tmp_path / "whole" / f"checkpoint-{step}")
        resumed = run(tmp_path / f"from {step}", checkpoint, save_strategy="no")
        assert resumed[0] == log
        assert resumed[1] == tokens
        assert resumed[2].training_loss == output.training_loss


def test_without_what_was_added_up_the_logs_are_of_the_rest_and_it_is_said(tmp_path, caplog):
    log, _, _ = run(tmp_path / "whole")
    checkpoint = tmp_path / "whole" / "checkpoint-5"
    (checkpoint / LOG_STATE_NAME).unlink()
    rest, _, _ = run(tmp_path / "rest", str(checkpoint), save_strategy="no")
    assert "does not say what 1 processes had added up for their logs" in caplog.text
    assert rest[0] == log[0]
    assert rest[1]["loss"] != log[1]["loss"]
    last_two = STEPS * log[-1]["train_loss"] - LOGGED * (log[0]["loss"] + log[1]["loss"])
    three = rest[1]["loss"] + last_two
    assert rest[-1]["train_loss"] == pytest.approx(three / 3, rel=1e-4)


def test_each_process_has_its_own(tmp_path):
    save_log_state([{"loss": [0.1, 2.0, 3]}, {"loss": [0.2, 2.0, 3]}], tmp_path)
    assert load_log_state(tmp_path, 1, 2) == {"loss": [0.2, 2.0, 3]}
    assert load_log_state(tmp_path, 0, 3) == {}


@pytest.mark.parametrize("text", ["{", "{}", "[1]", "[" * 100_000])
def test_damaged(text, tmp_path):
    (tmp_path / LOG_STATE_NAME).write_text(text)
    with pytest.raises(ValueError, match=f"{LOG_STATE_NAME} cannot be read"):
        load_log_state(tmp_path, 0, 1)
