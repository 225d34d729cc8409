"""SPLADE and a reranker on mixtures, by sentence-transformers' own trainers, losses, evaluators."""

import copy
import pickle

import pytest
import torch
from real_texts import (
    DOMAINS,
    MAX_LENGTH,
    falls,
    labelled_pairs,
    make_dense,
    pairs,
    passages,
    tokenizer,
)
from sentence_transformers import CrossEncoder, SparseEncoder
from sentence_transformers.cross_encoder import (
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
)
from sentence_transformers.cross_encoder import losses as cross_losses
from sentence_transformers.cross_encoder.evaluation import CrossEncoderClassificationEvaluator
from sentence_transformers.sparse_encoder import (
    SparseEncoderTrainer,
    SparseEncoderTrainingArguments,
)
from sentence_transformers.sparse_encoder import losses as sparse_losses
from sentence_transformers.sparse_encoder.evaluation import SparseInformationRetrievalEvaluator
from transformers import BertForMaskedLM, BertForSequenceClassification

import moe_fast
from moe_fast import MoECrossEncoder, MoESparseEncoder
from moe_fast.encoding.domain_texts import DomainText
from moe_fast.encoding.loading import load_as_saved
from moe_fast.training import CrossEncoderDomainCollator, DomainDataCollator

ENFORCED = {"num_experts": len(DOMAINS), "routing": "enforced", "domains": DOMAINS}
KINDS = [
    (SparseEncoder, BertForMaskedLM, {}),
    (CrossEncoder, BertForSequenceClassification, {"num_labels": 1, "initializer_range": 0.2}),
]
stock_kinds = pytest.mark.parametrize(("stock", "model_class", "settings"), KINDS)


def make_stock(folder, stock, model_class, settings):
    """A stock model on a random BERT."""
    make_dense(model_class, **settings).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return stock(str(folder), device="cpu")


@pytest.fixture(scope="module")
def stocks(tmp_path_factory):
    """Both stock models by class; tests leave them as they are."""
    return {kind[0]: make_stock(tmp_path_factory.mktemp("dense"), *kind) for kind in KINDS}


@pytest.fixture
def splade(stocks):
    return moe_fast.upcycle(stocks[SparseEncoder], **ENFORCED)


@pytest.fixture
def reranker(stocks):
    return moe_fast.upcycle(stocks[CrossEncoder], **ENFORCED)


@pytest.fixture(autouse=True)
def _no_model_cards(monkeypatch, request):
    if "card" not in request.node.name:
        for model in (MoESparseEncoder, MoECrossEncoder, SparseEncoder, CrossEncoder):
            monkeypatch.setattr(model, "_create_model_card", lambda *_, **__: None)


def arguments(kind, folder, **settings):
    return kind(
        output_dir=str(folder),
        **{
            "max_steps": 12,
            "per_device_train_batch_size": 12,
            "learning_rate": 5e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            **settings,
        },
    )


def losses_of(trainer):
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def set_apart(model):
    """Experts that differ, so that a domain matters."""
    torch.manual_seed(1)
    with torch.no_grad():
        for mlp in model.transformers_model.moe_mlps().values():
            for parameter in mlp.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
    return model.eval()


def outputs(model, texts, **options):
    """What the model gives for texts, each beside itself for a reranker."""
    if isinstance(model, CrossEncoder):
        paired = [(text, "any text") for text in texts]
        return model.predict(paired, convert_to_tensor=True, **options)
    return model.encode(texts, convert_to_sparse_tensor=False, **options)


# --- trained and evaluated -----------------------------------------------------------------------


def test_splade_predicts_domains(splade):
    pytest.importorskip("sklearn", reason="needs the extra moe-fast[eval]")
    domains, texts, _ = zip(*passages(), strict=True)
    set_apart(splade).fit_domain_predictor(texts, domains)
    names = splade.predict_domain(texts).domains
    assert len(set(names)) == len(DOMAINS)
    assert torch.equal(outputs(splade, texts, domain="auto"), outputs(splade, texts, domain=names))


def test_a_reranker_predicts_none(reranker):
    with pytest.raises(
        ValueError, match=r"domain must be one of the model's domains .* got 'auto'"
    ):
        reranker.predict([("a", "b")], domain="auto")


def test_splade_is_trained_and_evaluated(splade, tmp_path):
    loss = sparse_losses.SpladeLoss(
        splade,
        sparse_losses.SparseMultipleNegativesRankingLoss(splade),
        query_regularizer_weight=5e-5,
        document_regularizer_weight=3e-5,
    )
    trainer = SparseEncoderTrainer(
        splade,
        arguments(SparseEncoderTrainingArguments, tmp_path),
        train_dataset=pairs(),
        eval_dataset=pairs(),
        loss=loss,
        data_collator=DomainDataCollator.from_model(splade),
    )
    before = trainer.evaluate()["eval_loss"]
    assert falls(losses_of(trainer))
    assert trainer.evaluate()["eval_loss"] < 0.9 * before
    # Evaluators hand texts alone to the model: these say their domain themselves.
    queries = {str(i): DomainText(q, d) for i, (d, q, _) in enumerate(passages())}
    corpus = {str(i): DomainText(p, d) for i, (d, _, p) in enumerate(passages())}
    evaluator = SparseInformationRetrievalEvaluator(
        queries, corpus, {i: {i} for i in queries}, ndcg_at_k=[10], show_progress_bar=False
    )
    scores = splade.evaluate(evaluator)
    assert scores["dot_ndcg@10"] > 0.3, "chance is 0.1"


@pytest.mark.parametrize(
    ("loss_class", "columns", "steps"),
    [
        (cross_losses.BinaryCrossEntropyLoss, ["query", "answer", "domain", "label"], 48),
        (cross_losses.MultipleNegativesRankingLoss, ["anchor", "positive", "domain"], 18),
    ],
)
def test_a_reranker_is_trained_and_evaluated(reranker, tmp_path, loss_class, columns, steps):
    rows = labelled_pairs() if "label" in columns else pairs()
    trainer = CrossEncoderTrainer(
        reranker,
        arguments(
            CrossEncoderTrainingArguments,
            tmp_path,
            max_steps=steps,
            per_device_train_batch_size=24,
            learning_rate=2e-3,
            lr_scheduler_type="constant",
        ),
        train_dataset=rows.select_columns(columns),
        eval_dataset=rows.select_columns(columns),
        loss=loss_class(reranker),
        data_collator=CrossEncoderDomainCollator.from_model(reranker),
    )
    before = trainer.evaluate()["eval_loss"]
    assert falls(losses_of(trainer))
    assert trainer.evaluate()["eval_loss"] < 0.9 * before
    if "label" not in columns:
        return
    marked = [[DomainText(r["query"], r["domain"]), r["answer"]] for r in rows]
    evaluator = CrossEncoderClassificationEvaluator(
        marked, [int(row["label"]) for row in rows], show_progress_bar=False
    )
    assert reranker.evaluate(evaluator)["average_precision"] > 0.7


# --- domains -------------------------------------------------------------------------------------


@stock_kinds
def test_upcycled_gives_the_stock_models_outputs(stocks, stock, model_class, settings):
    model = stocks[stock]
    moe = moe_fast.upcycle(model, **ENFORCED)
    assert type(moe).__name__ == f"MoE{stock.__name__}"
    texts = [query for _, query, _ in passages()[:8]]
    want, got = outputs(model, texts), outputs(moe, texts, domain="files")
    assert got.shape[1:] == ((len(tokenizer()) + len(DOMAINS),) if want.dim() > 1 else ())
    got = got[:, : len(tokenizer())] if want.dim() > 1 else got
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    back = moe_fast.extract_expert(moe, "files")
    assert type(back) is stock and torch.equal(outputs(back, texts), want)
    assert back.activation_fn is model.activation_fn if stock is CrossEncoder else True


@stock_kinds
def test_each_text_has_its_domain(stocks, stock, model_class, settings):
    """One call with many domains gives what one call for each gives, in a batch of its own."""
    moe = set_apart(moe_fast.upcycle(stocks[stock], **ENFORCED))
    domains, texts, _ = zip(*passages()[:8], strict=True)
    got = outputs(moe, list(texts), domain=list(domains))
    for i, name in enumerate(domains):
        alone = outputs(moe, [texts[i]], domain=name)[0]
        assert (got[i] - alone).abs().max() <= 1e-5 * alone.abs().max()
    other = outputs(moe, list(texts), domain="words")
    assert (got[0] - other[0]).abs().max() > 1e-3
    marked = [DomainText(text, name) for text, name in zip(texts, domains, strict=True)]
    assert torch.equal(outputs(moe, marked), got)


@stock_kinds
def test_a_saved_one_is_a_stock_one(stocks, stock, model_class, settings, tmp_path):
    moe = set_apart(moe_fast.upcycle(stocks[stock], **ENFORCED))
    moe.save_pretrained(str(tmp_path))
    texts = [query for _, query, _ in passages()[:4]]
    want = outputs(moe, texts, domain="threads")
    ours, loaded = type(moe)(str(tmp_path), device="cpu"), stock(str(tmp_path), device="cpu")
    assert torch.equal(outputs(ours, texts, domain="threads"), want)
    assert torch.equal(outputs(loaded, texts, domain="threads"), want)
    assert "moe_fast" not in (tmp_path / "modules.json").read_text("utf-8")
    with pytest.raises(ValueError, match=f"without a head; got {type(ours[0].model).__name__}"):
        ours.save_pretrained(str(tmp_path / "portable"), portable=True)
    assert not (tmp_path / "portable").exists()


@stock_kinds
def test_from_a_folder_it_is_what_was_saved(stocks, stock, model_class, settings, tmp_path):
    stocks[stock].save_pretrained(str(tmp_path / "dense"))
    moe = moe_fast.upcycle(tmp_path / "dense", **ENFORCED)
    assert type(moe).__name__ == f"MoE{stock.__name__}"
    texts = [query for _, query, _ in passages()[:4]]
    want = outputs(moe_fast.upcycle(stocks[stock], **ENFORCED), texts, domain="files")
    assert torch.equal(outputs(moe, texts, domain="files"), want)
    moe.save_pretrained(str(tmp_path / "moe"))
    again = load_as_saved(str(tmp_path / "moe"))
    assert type(again) is type(moe)
    assert torch.equal(outputs(again, texts, domain="files"), want)


@stock_kinds
def test_the_card_shows_a_call_that_runs(stocks, stock, model_class, settings, tmp_path):
    moe_fast.upcycle(stocks[stock], **ENFORCED).save_pretrained(str(tmp_path))
    card = (tmp_path / "README.md").read_text("utf-8")
    assert f"from moe_fast import MoE{stock.__name__}" in card and "## Mixture of experts" in card
    code = card.split("```python\n", 1)[1].split("```", 1)[0]
    assert "domain='numbers'" in code
    code = code.replace(f'"{stocks[stock].model_card_data.model_id}"', repr(str(tmp_path)))
    start, end = code.index(f"MoE{stock.__name__}("), code.index(")\n", code.index("model = "))
    code = code[:start] + f"MoE{stock.__name__}({str(tmp_path)!r}" + code[end:]
    exec(compile(code, "README.md", "exec"), {"print": lambda *_: None})


def test_documents_are_ranked_in_the_querys_domain(reranker):
    set_apart(reranker)
    documents = [text for _, _, text in passages()[:5]]
    ranked = reranker.rank("some query", documents, domain="files")
    pairs_ = [("some query", document) for document in documents]
    scores = reranker.predict(pairs_, domain="files")
    assert [r["corpus_id"] for r in ranked] == list((-scores).argsort())
    single = reranker.predict(("some query", documents[0]), domain="files")
    assert abs(float(single) - float(scores[0])) <= 1e-6


def test_queries_and_documents_have_domains(splade):
    set_apart(splade)
    texts = ["some text", "another one"]
    want = outputs(splade, texts, domain=["files", "words"])
    for encode in (splade.encode_query, splade.encode_document):
        got = encode(texts, domain=["files", "words"], convert_to_sparse_tensor=False)
        assert torch.equal(got, want)
    one = splade.encode("some text", domain="files", convert_to_sparse_tensor=False)
    assert one.shape == want[0].shape and (one - want[0]).abs().max() <= 1e-6


def test_wrong_domains_are_refused(splade, reranker):
    for model in (splade, reranker):
        with pytest.raises(ValueError, match=r"numbers, files, threads, words"):
            outputs(model, ["a text"])
        with pytest.raises(ValueError, match=r"got 'letters'"):
            outputs(model, ["a text"], domain="letters")
        with pytest.raises(ValueError, match=r"got 2 names for 1 texts"):
            outputs(model, ["a text"], domain=["files", "words"])
        mixed = [DomainText("a text", "files"), "a text"]
        with pytest.raises(ValueError, match=r"text 1 has none"):
            outputs(model, mixed)
    with pytest.raises(TypeError, match=r"domain must be one name"):
        reranker.rank("query", ["document"], domain=["files"])


def test_a_text_with_a_domain_is_a_text():
    text = DomainText("some text", "files")
    assert text == "some text" and hash(text) == hash("some text") and text.domain == "files"
    for same in (pickle.loads(pickle.dumps(text)), copy.deepcopy(text)):
        assert same == text and same.domain == "files"
    assert type(text + "!") is str


# --- the collator --------------------------------------------------------------------------------


def test_the_collator_takes_the_domain_out(reranker):
    collator = CrossEncoderDomainCollator.from_model(reranker)
    rows = [
        {"query": "a", "answer": "b", "domain": "files", "label": 1},
        {"query": "c", "answer": "d", "domain": 3, "label": 0},
    ]
    batch = collator(rows)
    assert list(batch) == ["label", "query", "answer"] and batch["label"].tolist() == [1, 0]
    assert [text.domain for text in batch["query"]] == ["files", "words"]
    assert all(type(text) is str for text in batch["answer"])
    features = reranker.preprocess(list(zip(batch["query"], batch["answer"], strict=True)))
    assert features["domain_ids"].tolist() == [1, 3]
    assert collator([]) == {}


def test_the_collator_refuses_what_it_cannot_do(reranker, stocks):
    with pytest.raises(TypeError, match="must be a MoECrossEncoder; got CrossEncoder"):
        CrossEncoderDomainCollator.from_model(stocks[CrossEncoder])
    collator = CrossEncoderDomainCollator.from_model(reranker)
    with pytest.raises(ValueError, match=r"no column 'domain'"):
        collator([{"query": "a", "answer": "b"}])
    with pytest.raises(ValueError, match=r"first column .* must hold texts"):
        collator([{"answers": ["a"], "query": "b", "domain": "files"}])


def test_dense_models_are_refused(stocks):
    for stock, ours in ((SparseEncoder, MoESparseEncoder), (CrossEncoder, MoECrossEncoder)):
        modules = list(stocks[stock])
        with pytest.raises(TypeError, match=rf"{ours.__name__} needs a mixture of experts; got Be"):
            ours(modules=modules, device="cpu")


def test_texts_are_cut_as_the_stock_model_cuts_them(reranker):
    long = " ".join(["word"] * 100)
    assert reranker.preprocess([(long, long)])["input_ids"].shape == (1, MAX_LENGTH)
