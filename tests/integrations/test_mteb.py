"""MTEB on tasks made of local data: nothing is downloaded."""

import random

import numpy as np
import pytest
import torch

pytest.importorskip("mteb")
pytest.importorskip("ir_measures")

import mteb
from datasets import Dataset, DatasetDict
from mteb.abstasks.pair_classification import AbsTaskPairClassification
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.sts import AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata

import moe_fast
from moe_fast.data import Retrieval
from moe_fast.evaluation import (
    Bootstrap,
    EncodeOptions,
    evaluate_pairs,
    evaluate_retrieval,
    evaluate_sts,
)
from moe_fast.integrations.mteb import MTEBEncoder

NONE = Bootstrap(resamples=0)
RNG = random.Random(0)
TEXTS = [" ".join(f"w{RNG.randrange(3, 54)}" for _ in range(6)) for _ in range(60)]
PAIRS = {"a": TEXTS[:30], "b": TEXTS[30:], "label": [i % 2 for i in range(30)]}
SCORED = {"a": TEXTS[:30], "b": TEXTS[30:], "score": [float(i * 7 % 6) for i in range(30)]}
SEARCH = Retrieval(
    corpus={f"d{i}": text for i, text in enumerate(TEXTS[:40])},
    queries={f"q{i}": text for i, text in enumerate(TEXTS[40:])},
    qrels={f"q{i}": {f"d{i}": 1, f"d{2 * i % 40}": 1} for i in range(20)},
)


def _metadata(name: str, kind: str, score: str) -> TaskMetadata:
    return TaskMetadata(
        name=name,
        type=kind,
        main_score=score,
        description="Local data.",
        reference="https://example.org",
        dataset={"path": "local", "revision": "1"},
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        date=("2026-01-01", "2026-01-01"),
        category="t2t",
        modalities=["text"],
        license="cc-by-4.0",
        annotations_creators="derived",
        dialect=[],
        domains=[],
        task_subtypes=[],
        sample_creation="created",
        bibtex_citation="",
    )


class LocalPairs(AbsTaskPairClassification):
    metadata = _metadata("LocalPairs", "PairClassification", "similarity_ap")

    def load_data(self, **kwargs) -> None:
        columns = {"sentence1": PAIRS["a"], "sentence2": PAIRS["b"], "labels": PAIRS["label"]}
        self.dataset = DatasetDict(test=Dataset.from_dict(columns))
        self.data_loaded = True


class LocalSTS(AbsTaskSTS):
    metadata = _metadata("LocalSTS", "STS", "cosine_spearman")

    def load_data(self, **kwargs) -> None:
        columns = {"sentence1": SCORED["a"], "sentence2": SCORED["b"], "score": SCORED["score"]}
        self.dataset = DatasetDict(test=Dataset.from_dict(columns))
        self.data_loaded = True


class LocalSearch(AbsTaskRetrieval):
    metadata = _metadata("LocalSearch", "Retrieval", "ndcg_at_10")

    def load_data(self, **kwargs) -> None:
        queries, corpus = (
            Dataset.from_dict({"id": list(texts), "text": list(texts.values())})
            for texts in (SEARCH.queries, SEARCH.corpus)
        )
        split = {
            "queries": queries,
            "corpus": corpus,
            "relevant_docs": SEARCH.qrels,
            "top_ranked": None,
        }
        self.dataset = {"default": {"test": split}}
        self.data_loaded = True


@pytest.fixture
def mixture(dense):
    model = moe_fast.upcycle(dense, num_experts=2, routing="enforced", domains=["law", "medicine"])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("down_proj"):
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def _run(encoder: MTEBEncoder, *tasks) -> list[dict]:
    result = mteb.evaluate(encoder, tasks, cache=None, show_progress_bar=False)
    return [task.scores["test"][0] for task in result.task_results]


def test_the_scores_are_ours_in_the_task_s_domain(mixture) -> None:
    encoder = MTEBEncoder(
        mixture, "me/mixture", domain="law", task_domains={"LocalSTS": "medicine"}
    )
    pairs, sts, search = _run(encoder, LocalPairs(), LocalSTS(), LocalSearch())
    law, medicine = EncodeOptions(domain="law"), EncodeOptions(domain="medicine")

    ours = evaluate_pairs(mixture, PAIRS, encode=law, bootstrap=NONE).scores["all"]
    assert pairs["cosine_ap"] == pytest.approx(ours["AP"].value, abs=1e-5)
    found = evaluate_sts(mixture, SCORED, encode=medicine, bootstrap=NONE).scores["all"]
    assert sts["cosine_spearman"] == pytest.approx(found["Spearman"].value, abs=1e-5)
    assert sts["cosine_pearson"] == pytest.approx(found["Pearson"].value, abs=1e-5)
    other = evaluate_sts(mixture, SCORED, encode=law, bootstrap=NONE).scores["all"]
    assert abs(sts["cosine_pearson"] - other["Pearson"].value) > 1e-3
    # with the model's prompts for queries and documents, as both of us find them
    measures = ("nDCG@10", "MAP@10", "Recall@5")
    ours = evaluate_retrieval(mixture, SEARCH, measures=measures, encode=law, bootstrap=NONE)
    for name, theirs in zip(measures, ("ndcg_at_10", "map_at_10", "recall_at_5"), strict=True):
        assert search[theirs] == pytest.approx(ours.scores["all"][name].value, abs=1e-5)


def test_prompts_by_role(mixture) -> None:
    encoder = MTEBEncoder(mixture, "me/mixture", domain="law")
    (with_prompts,) = _run(encoder, LocalSearch())
    plain = EncodeOptions(domain="law", roles=False)
    without = evaluate_retrieval(mixture, SEARCH, encode=plain, bootstrap=NONE)
    assert abs(with_prompts["ndcg_at_10"] - without.scores["all"]["nDCG@10"].value) > 1e-3


def test_long_texts_are_cut_unless_forbidden(mixture, monkeypatch: pytest.MonkeyPatch) -> None:
    long = [" ".join([text] * 8) for text in PAIRS["a"]]
    monkeypatch.setitem(PAIRS, "a", long)
    assert np.isfinite(
        _run(MTEBEncoder(mixture, "me/m", domain="law"), LocalPairs())[0]["cosine_ap"]
    )
    with pytest.raises(ValueError, match="truncate=True"):
        _run(MTEBEncoder(mixture, "me/m", domain="law", truncate=False), LocalPairs())


def test_another_model_or_domain_has_another_revision(mixture) -> None:
    def revision(**options) -> str:
        meta = MTEBEncoder(mixture, "me/mixture", **options).mteb_model_meta
        assert meta.name == "me/mixture"
        return meta.revision

    first = revision(domain="law")
    assert first == revision(domain="law")
    assert first != revision(domain="medicine")
    assert first != revision(domain="law", task_domains={"LocalSTS": "medicine"})
    with torch.no_grad():
        next(mixture.parameters()).add_(1e-3)
    assert first != revision(domain="law")


def test_results_are_kept_by_that_revision(mixture, tmp_path) -> None:
    cache = mteb.ResultCache(tmp_path)

    def scores(domain: str) -> dict:
        encoder = MTEBEncoder(mixture, "me/mixture", domain=domain)
        result = mteb.evaluate(encoder, LocalSTS(), cache=cache, show_progress_bar=False)
        return result.task_results[0].scores["test"][0]

    assert scores("law")["cosine_pearson"] != scores("medicine")["cosine_pearson"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("me/m", {"domain": "physics"}, "physics"),
        ("me/m", {"task_domains": {"LocalSTS": "physics"}}, "physics"),
        ("mixture", {}, "'organisation/model'; got 'mixture'"),
    ],
)
def test_bad_arguments(mixture, name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MTEBEncoder(mixture, name, **options)


def test_a_dense_model_needs_no_adapter(dense) -> None:
    with pytest.raises(TypeError, match="got SentenceTransformer. MTEB takes"):
        MTEBEncoder(dense, "me/dense")


def test_no_domain_for_a_model_that_needs_one_is_an_error(mixture) -> None:
    with pytest.raises(ValueError, match="domain must be given"):
        _run(MTEBEncoder(mixture, "me/mixture"), LocalPairs())
