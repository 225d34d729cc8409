"""Pretraining of experts per domain, with transformers' own Trainer and collator."""

import pytest
import torch
from real_texts import DOMAINS, falls, make_dense, pairs, tokenizer
from transformers import (
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

import moe_fast
from moe_fast.training import DomainColumnCollator


def tokenized(rows):
    """Token ids of both texts of each row, and the domain."""
    return rows.map(
        lambda row: tokenizer()(row["anchor"], row["positive"], truncation=True),
        remove_columns=["anchor", "positive"],
    )


def train(moe, rows, tmp_path, steps=24, **settings):
    """The losses of each step, and what `evaluate` says at the end."""
    masked = DataCollatorForLanguageModeling(tokenizer(), seed=0)
    arguments = {
        "output_dir": str(tmp_path),
        "max_steps": steps,
        "per_device_train_batch_size": 16,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        **settings,
    }
    trainer = Trainer(
        moe,
        TrainingArguments(**arguments),
        data_collator=DomainColumnCollator.from_model(moe, masked),
        train_dataset=rows,
        eval_dataset=rows,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    return losses, before, trainer.evaluate()["eval_loss"]


def test_loss_falls_and_the_model_is_evaluated(tmp_path):
    moe = moe_fast.upcycle(
        make_dense(BertForMaskedLM),
        num_experts=len(DOMAINS),
        routing="enforced",
        domains=DOMAINS,
    )
    losses, before, after = train(moe, tokenized(pairs()), tmp_path)
    assert falls(losses) and after < 0.9 * before
    experts = moe.moe_mlps()[0].up_proj
    assert all(not torch.equal(experts[0], expert) for expert in experts[1:])
    assert moe.cls.predictions.decoder.weight is moe.bert.embeddings.word_embeddings.weight


def test_only_the_experts_of_the_domains_seen_are_trained(tmp_path):
    moe = moe_fast.upcycle(
        make_dense(BertForMaskedLM),
        num_experts=len(DOMAINS),
        routing="enforced",
        domains=DOMAINS,
        trainable="experts",
    )
    before = moe.moe_mlps()[1].down_proj.detach().clone()
    rows = tokenized(pairs().filter(lambda row: row["domain"] == "threads"))
    train(moe, rows, tmp_path, steps=2)
    moved = (moe.moe_mlps()[1].down_proj != before).flatten(1).any(1)
    assert moved.tolist() == [name == "threads" for name in DOMAINS]


def test_domains_of_a_learned_router_place_tokens(tmp_path):
    moe = moe_fast.upcycle(
        make_dense(BertForMaskedLM), num_experts=3, num_experts_per_tok=2, domains=DOMAINS
    )
    losses, *_ = train(moe, tokenized(pairs()), tmp_path, learning_rate=5e-3)
    assert falls(losses)
    table = moe.bert.embeddings.word_embeddings.weight[-len(DOMAINS) :]
    assert not torch.equal(table[0], table[1])


def test_batches_have_ids_for_the_routing():
    rows = list(tokenized(pairs()).select(range(4)))
    masked = DataCollatorForLanguageModeling(tokenizer(), seed=0)
    settings = {"num_experts": len(DOMAINS), "domains": DOMAINS}
    for routing, name in (("enforced", "expert_ids"), ("token_topk", "domain_ids")):
        moe = moe_fast.upcycle(make_dense(BertForMaskedLM), routing=routing, **settings)
        collator = DomainColumnCollator.from_model(moe, masked)
        batch = collator(rows)
        assert batch[name].tolist() == [0, 1, 2, 3] and "domain" not in batch
        assert batch.keys() >= {"input_ids", "attention_mask", "labels"}
        assert torch.isfinite(moe(**batch).loss)
    assert "domain" in rows[0], "the rows are the dataset's"


def test_wrong_columns_and_domains_are_refused():
    collator = DomainColumnCollator(dict, ["a", "b"], domain_column="subject")
    message = r"no column 'subject' .*\['x'\].* remove_unused_columns=False"
    with pytest.raises(ValueError, match=message):
        collator([{"x": 1}])
    with pytest.raises(ValueError, match=r"unknown domain 'c'; the known ones are \['a', 'b'\]"):
        collator([{"subject": "c"}])
    with pytest.raises(ValueError, match=r"domain id 2 is out of range"):
        collator([{"subject": 2}])
    for domains, message in (((), "at least one"), (["a", "a"], "must differ")):
        with pytest.raises(ValueError, match=message):
            DomainColumnCollator(dict, domains)
    with pytest.raises(TypeError, match=r"must be a list of names; got 'ab'"):
        DomainColumnCollator(dict, "ab")
