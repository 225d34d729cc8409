from __future__ import annotations

import pytest

pytest.importorskip("sentence_transformers", reason="needs the extra moe-fast[train]")
from moe_fast.data import Retrieval
from moe_fast.evaluation import evaluate_pairs, evaluate_retrieval
from moe_fast.evaluation.evaluator import DomainEvaluator
from tests.training.tiny_models import make_moe, make_pairs


def _pairs() -> dict[str, list[str]]:
    pairs = make_pairs(18, seed=5)
    return {"a": pairs["anchor"], "b": pairs["positive"], "domain": pairs["domain"]}


def test_every_domain_is_reported_with_the_function_s_numbers() -> None:
    model, data = make_moe(routing="enforced"), _pairs()
    evaluator = DomainEvaluator(evaluate_pairs, data, name="dev", metric="F1max")
    found = evaluator(model)
    expected = evaluate_pairs(model, data)
    assert evaluator.primary_metric == "dev_all_F1max"
    assert found == {
        f"dev_{group}_{metric}": score.value
        for group, scores in expected.scores.items()
        for metric, score in scores.items()
    }
    assert "dev_fruit_ROC-AUC" in found


def test_no_name_and_the_functions_options() -> None:
    data = Retrieval({"1": "iron", "2": "apple"}, {"q": "zinc"}, {"q": {"1": 1}})
    evaluator = DomainEvaluator(evaluate_retrieval, data, measures=["MRR@1", "nDCG@2"])
    assert set(evaluator(make_moe(routing="token_topk", domains=None))) == {
        "all_MRR@1", "all_nDCG@2"
    }  # fmt: skip
    assert evaluator.primary_metric == "all_MRR@1"


def test_an_unknown_metric_is_named() -> None:
    evaluator = DomainEvaluator(evaluate_pairs, _pairs(), metric="nDCG@10")
    with pytest.raises(ValueError, match="metric='nDCG@10'; allowed are ROC-AUC, AP, F1max"):
        evaluator(make_moe(routing="enforced"))


def test_the_trainer_calls_it(tmp_path) -> None:
    from sentence_transformers import SentenceTransformerTrainingArguments

    from moe_fast.losses import InfoNCELoss
    from moe_fast.training import MoESentenceTransformerTrainer

    model = make_moe(routing="enforced")
    arguments = SentenceTransformerTrainingArguments(
        tmp_path,
        max_steps=4,
        per_device_train_batch_size=6,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="dev_all_ROC-AUC",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = MoESentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=make_pairs(24),
        loss=InfoNCELoss(model),
        evaluator=DomainEvaluator(evaluate_pairs, _pairs(), name="dev"),
    )
    trainer.train()
    logged = [row for row in trainer.state.log_history if "eval_dev_all_ROC-AUC" in row]
    assert [row["step"] for row in logged] == [2, 4]
    assert trainer.state.best_metric == max(row["eval_dev_all_ROC-AUC"] for row in logged)
