"""MoESentenceTransformer: one domain or one per text, saved so that the stock class loads it."""

import copy
import logging

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.util import quantize_embeddings

import moe_fast

TEXTS = ["w3 w4 w5", "w6", "w7 w8 w9 w10 w11 w12", "w13 w14", "w3"]
DOMAINS = ["a", "b", "c"]
PER_TEXT = ["c", "a", "c", "b", "a"]


@pytest.fixture
def enforced(dense):
    """Three experts that differ, one per domain."""
    model = moe_fast.upcycle(dense, num_experts=3, routing="enforced", domains=DOMAINS)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for mlp in model.transformers_model.moe_mlps().values():
            mlp.down_proj += 0.2 * torch.randn(mlp.down_proj.shape, generator=generator)
    return model


def _relative_error(got, want):
    return np.abs(got - want).max() / np.abs(want).max()


@pytest.mark.parametrize(
    ("settings", "domain", "tolerance"),
    [
        ({"routing": "enforced", "domains": DOMAINS}, PER_TEXT, 1e-6),
        ({"num_experts_per_tok": 1}, None, 1e-6),
        ({"num_experts_per_tok": 2}, None, 1e-5),
        ({"domains": ["p", "q"]}, "q", 1e-6),
    ],
)
def test_upcycled_embeddings_equal_the_dense_ones(dense, settings, domain, tolerance):
    want = dense.encode(TEXTS)
    model = moe_fast.upcycle(dense, num_experts=3, **settings)
    assert type(model) is moe_fast.MoESentenceTransformer
    assert _relative_error(model.encode(TEXTS, domain=domain), want) <= tolerance
    assert np.array_equal(dense.encode(TEXTS), want), "the input was changed"


def test_from_a_folder(folder, dense):
    model = moe_fast.upcycle(folder, num_experts=3)
    assert type(model) is moe_fast.MoESentenceTransformer
    assert _relative_error(model.encode(TEXTS), dense.encode(TEXTS)) <= 1e-6
    assert model.max_seq_length == dense.max_seq_length == 32
    assert model.prompts == dense.prompts


def test_one_domain_per_text_is_each_text_with_its_domain(enforced):
    got = enforced.encode(TEXTS, domain=PER_TEXT)
    alone = [enforced.encode(t, domain=d) for t, d in zip(TEXTS, PER_TEXT, strict=True)]
    assert _relative_error(got, np.stack(alone)) <= 1e-6
    assert _relative_error(got, enforced.encode(TEXTS, domain="a")) > 1e-2


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, np.ndarray),
        ({"convert_to_tensor": True}, torch.Tensor),
        ({"convert_to_numpy": False}, list),
        ({"output_value": "token_embeddings"}, list),
        ({"output_value": None}, list),
    ],
)
def test_results_keep_the_order_and_the_type(enforced, options, kind):
    got = enforced.encode(TEXTS, domain=PER_TEXT, batch_size=2, **options)
    assert isinstance(got, kind) and len(got) == len(TEXTS)
    if options.get("output_value") == "token_embeddings":
        assert [len(x) for x in got] == [5, 3, 8, 4, 3]


def test_queries_and_documents_take_a_domain(enforced):
    queries = enforced.encode_query(TEXTS, domain=PER_TEXT)
    want = enforced.encode([f"w1 {t}" for t in TEXTS], domain=PER_TEXT)
    assert _relative_error(queries, want) <= 1e-6
    assert enforced.encode_document(TEXTS, domain="a").shape == (5, 32)


def test_no_texts(enforced):
    assert len(enforced.encode([], domain=[])) == 0
    assert len(enforced.encode([], domain="a")) == 0


def test_the_stock_class_loads_what_was_saved(enforced, tmp_path):
    enforced.save_pretrained(str(tmp_path))
    stock = SentenceTransformer(str(tmp_path), device="cpu")
    assert type(stock) is SentenceTransformer
    want = enforced.encode(TEXTS, domain="b")
    # It pads and takes torch's attention: the same but for rounding.
    assert _relative_error(stock.encode(TEXTS, domain="b"), want) <= 1e-6
    with pytest.raises(TypeError, match="domain must be one name .* got list.*one domain per text"):
        stock.encode(TEXTS, domain=PER_TEXT)
    with pytest.raises(ValueError, match=r"needs expert_ids or a domain \(known: a, b, c\)"):
        stock.encode(TEXTS)
    ours = moe_fast.MoESentenceTransformer(str(tmp_path), device="cpu")
    got = ours.encode(TEXTS, domain=PER_TEXT)
    assert np.array_equal(got, enforced.encode(TEXTS, domain=PER_TEXT))


def test_the_model_card_says_how_the_model_was_made(enforced, tmp_path, caplog):
    enforced.save_pretrained(str(tmp_path))
    card = (tmp_path / "README.md").read_text()
    assert card.count("## Mixture of experts") == 1
    assert "Domains: `a`, `b`, `c`" in card and "3 experts, 1 of them per token" in card
    assert "model.encode_query(queries, domain='a')" in card and "import moe_fast" in card
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    reloaded = moe_fast.MoESentenceTransformer(str(tmp_path), device="cpu")
    reloaded.save_pretrained(str(tmp_path / "again"))
    assert (tmp_path / "again" / "README.md").read_text().count("## Mixture of experts") == 1


def test_default_domain(dense):
    model = moe_fast.upcycle(
        dense, num_experts=3, routing="enforced", domains=DOMAINS, default_domain="b"
    )
    assert np.array_equal(model.encode(TEXTS), model.encode(TEXTS, domain="b"))


@pytest.mark.parametrize("expert", [1, "b"])
def test_extract_expert(dense, enforced, expert):
    alone = moe_fast.extract_expert(enforced, expert)
    assert type(alone) is SentenceTransformer and alone.get_model_kwargs() == []
    assert _relative_error(alone.encode(TEXTS), enforced.encode(TEXTS, domain="b")) <= 1e-6
    untrained = moe_fast.upcycle(dense, num_experts=3, routing="enforced", domains=DOMAINS)
    assert np.array_equal(
        moe_fast.extract_expert(untrained, expert).encode(TEXTS), dense.encode(TEXTS)
    )


@pytest.mark.parametrize(
    ("domain", "error", "message"),
    [
        ("z", ValueError, r"'a', 'b', 'c'\); got 'z'"),
        (["a", "b", "c", "z", "a"], ValueError, r"'a', 'b', 'c'\); got 'z'"),
        (["a"], ValueError, "one per text; got 1 names for 5 texts"),
        (None, ValueError, "domain must be given.*Known domains: a, b, c; got None"),
        (["a", "a", "a", "a", 3], TypeError, "domain must be a name .*got .*3"),
        (["a", "a", "a", "a", None], TypeError, "domain must be a name .*got .*None"),
        (dict.fromkeys(TEXTS, "a"), TypeError, "domain must be a name .*got {"),
        (1, TypeError, "domain must be a name .*; got 1"),
    ],
)
def test_bad_domains_are_refused_before_any_work(enforced, domain, error, message):
    enforced.transformers_model.forward = None
    with pytest.raises(error, match=message):
        enforced.encode(TEXTS, domain=domain)


def test_long_texts_are_cut_only_when_asked_and_said(dense, caplog):
    model = moe_fast.upcycle(dense, num_experts=2)
    texts = ["w3", "w4 " * 40]
    with pytest.raises(ValueError, match=r"max_seq_length = 32 .* text 1 has 42 \(1 of 2"):
        model.encode(texts)
    with caplog.at_level(logging.WARNING):
        got = model.encode(texts, truncate=True)
    assert "1 of 2 texts are longer than max_seq_length = 32" in caplog.text
    assert _relative_error(got, dense.encode(texts)) <= 1e-6
    # The prompt counts: 30 words fit, 30 words behind a prompt do not.
    model.encode(["w4 " * 30])
    with pytest.raises(ValueError, match="text 0 has 33"):
        model.encode(["w4 " * 30], prompt_name="query")


def test_long_texts_in_a_script_that_tokenizes_to_many_tokens(dense):
    model = moe_fast.upcycle(dense, num_experts=2)
    with pytest.raises(ValueError, match="text 0 has"):
        model.encode([",".join("한국어" for _ in range(16))])


def test_evaluators_can_have_texts_cut(dense):
    model = moe_fast.upcycle(dense, num_experts=2)
    model.truncate = True
    evaluator = InformationRetrievalEvaluator({"q": "w1"}, {"d": "w1 " * 50}, {"q": {"d"}})
    assert evaluator(model)
    with pytest.raises(ValueError, match="too long"):
        model.encode("w1 " * 50, truncate=False)


@pytest.mark.parametrize("precision", ["int8", "uint8", "ubinary"])
@pytest.mark.parametrize("kind", [np.ndarray, torch.Tensor])
def test_quantization_ranges_are_those_of_all_texts(enforced, precision, kind):
    texts = [f"w{i} w{i + 1}" for i in range(3, 33)]
    domains = [DOMAINS[i % 3] for i in range(30)]
    options = {"convert_to_tensor": kind is torch.Tensor}
    got = enforced.encode(texts, domain=domains, precision=precision, **options)
    want = quantize_embeddings(enforced.encode(texts, domain=domains), precision)
    assert isinstance(got, kind)
    assert np.array_equal(np.asarray(got), want)


def test_positional_options_and_the_old_name_of_the_texts(enforced):
    want = enforced.encode(TEXTS, prompt_name="query", domain=PER_TEXT)
    assert np.array_equal(enforced.encode(TEXTS, "query", domain=PER_TEXT), want)
    assert np.array_equal(
        enforced.encode(sentences=TEXTS, prompt_name="query", domain=PER_TEXT), want
    )


@pytest.mark.parametrize("name", ["c\\x", "c\\1", 'a"b', "o'clock", "new\nline", "数学"])
def test_domains_with_odd_names(dense, tmp_path, name):
    model = moe_fast.upcycle(dense, num_experts=2, routing="enforced", domains=[name, "z"])
    model.save_pretrained(str(tmp_path))
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    code = card.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    loaded = moe_fast.MoESentenceTransformer(str(tmp_path), device="cpu")
    assert np.array_equal(loaded.encode(TEXTS, domain=name), model.encode(TEXTS, domain=name))


def test_enforced_routing_needs_domains(dense):
    with pytest.raises(ValueError, match="domains must be given with routing='enforced'"):
        moe_fast.upcycle(dense, num_experts=2, routing="enforced")


def test_a_dense_encoder_is_refused(folder):
    with pytest.raises(TypeError, match="needs a mixture of experts; got BertModel"):
        moe_fast.MoESentenceTransformer(folder, device="cpu")


def _changed(model, seed):
    """A copy whose encoder has other weights."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def test_joined_models_and_back(dense):
    models = [_changed(dense, seed) for seed in range(3)]
    joined = moe_fast.from_experts(models, domains=DOMAINS)
    assert type(joined) is moe_fast.MoESentenceTransformer
    assert joined.prompts == dense.prompts and joined.max_seq_length == 32
    assert np.array_equal(
        moe_fast.extract_expert(joined, "a").encode(TEXTS), models[0].encode(TEXTS)
    ), "everything comes from the first model"
    mlp = moe_fast.extract_expert(joined, "c").transformers_model.encoder.layer[1].output.dense
    own = models[2].transformers_model.encoder.layer[1].output.dense
    assert torch.equal(mlp.weight, own.weight)


def test_joined_from_folders(folder, dense, tmp_path):
    other = _changed(dense, 1)
    other.save_pretrained(str(tmp_path))
    joined = moe_fast.from_experts([folder, str(tmp_path)], domains=["a", "b"], shared="mean")
    same = moe_fast.from_experts([dense, other], domains=["a", "b"], shared="mean")
    assert np.array_equal(joined.encode(TEXTS, domain="b"), same.encode(TEXTS, domain="b"))
    equal = moe_fast.from_experts([folder, folder], domains=["a", "b"], shared="mean")
    assert _relative_error(equal.encode(TEXTS, domain="b"), dense.encode(TEXTS)) <= 1e-6


@pytest.mark.parametrize("shared", ["first", "mean"])
def test_modules_behind_the_encoder_follow_shared(dense, shared):
    from sentence_transformers.sentence_transformer.modules import Dense

    dense.append(Dense(32, 8))
    models = [_changed(dense, seed) for seed in range(2)]
    joined = moe_fast.from_experts(models, domains=["a", "b"], shared=shared)
    weights = [model[2].linear.weight for model in models]
    want = weights[0] if shared == "first" else torch.stack(weights).double().mean(0).float()
    assert torch.allclose(joined[2].linear.weight, want, rtol=0, atol=1e-7)


def _other_pooling(model):
    from sentence_transformers.sentence_transformer.modules import Pooling

    model[1] = Pooling(32, pooling_mode="cls")


def _other_vocabulary(model):
    model.tokenizer.add_tokens(["w99"])


def _other_rules(model):
    from tokenizers.normalizers import Lowercase

    model.tokenizer.backend_tokenizer.normalizer = Lowercase()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_other_pooling, "module 1's pooling_mode: 'cls' instead of 'mean'"),
        (lambda m: m.prompts.update(query="other "), "prompts: .*'other '"),
        (lambda m: setattr(m, "max_seq_length", 16), "max_seq_length: 16 instead of 32"),
        (lambda m: setattr(m, "truncate_dim", 8), "truncate_dim: 8 instead of None"),
        (_other_vocabulary, "share one tokenizer; the vocabulary of model 1's differs"),
        (_other_rules, "share one tokenizer; the rules of model 1's differs"),
    ],
)
def test_models_that_do_not_fit_together(dense, change, message):
    other = copy.deepcopy(dense)
    moe_fast.from_experts([dense, other], domains=["a", "b"])
    change(other)
    with pytest.raises(ValueError, match=message):
        moe_fast.from_experts([dense, other], domains=["a", "b"])


def test_joining_needs_domains_and_one_kind(dense):
    with pytest.raises(ValueError, match="domains must be given"):
        moe_fast.from_experts([dense, dense])
    with pytest.raises(TypeError, match="all be encoders or all SentenceTransformers"):
        moe_fast.from_experts([dense, dense.transformers_model], domains=["a", "b"])


def test_an_expert_more_and_one_fewer(enforced):
    enforced.truncate = True
    grown = moe_fast.add_expert(enforced, "d", from_expert="b")
    assert type(grown) is moe_fast.MoESentenceTransformer and grown.truncate
    want = enforced.encode(TEXTS, domain=PER_TEXT)
    assert np.array_equal(grown.encode(TEXTS, domain=PER_TEXT), want)
    assert np.array_equal(grown.encode(TEXTS, domain="d"), enforced.encode(TEXTS, domain="b"))
    again = moe_fast.remove_expert(grown, "d")
    assert np.array_equal(again.encode(TEXTS, domain=PER_TEXT), want)
    with pytest.raises(ValueError, match="one of the model's domains"):
        again.encode(TEXTS, domain="d")


def test_an_imported_checkpoint(enforced, dense):
    like = moe_fast.upcycle(dense, num_experts=3, routing="enforced", domains=DOMAINS)
    rules = [moe_fast.models.KeyRule("(?P<rest>.*)", "{rest}")]
    state = enforced.transformers_model.state_dict()
    got = moe_fast.import_checkpoint(state, like, style=rules)
    assert type(got) is moe_fast.MoESentenceTransformer
    want = enforced.encode(TEXTS, domain=PER_TEXT)
    assert np.array_equal(got.encode(TEXTS, domain=PER_TEXT), want)


def test_saving_over_another_model_keeps_what_is_not_its_own(enforced, dense, tmp_path):
    dense.save_pretrained(str(tmp_path))
    (tmp_path / "notes.txt").write_text("mine")
    enforced.save_pretrained(str(tmp_path), create_model_card=False)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    again = SentenceTransformer(str(tmp_path), device="cpu")
    want = enforced.encode(TEXTS, domain="a")
    assert _relative_error(again.encode(TEXTS, domain="a"), want) <= 1e-6
    assert enforced.save(None) is None


# --- encode leaves padding out -------------------------------------------------------------------


def _layer_inputs(model):
    """Shapes of what reaches the second layer, filled in by each forward."""
    seen = []
    layer = model.transformers_model.encoder_layers[1]
    layer.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    return seen


def test_encode_computes_real_tokens_alone_and_gives_the_same(dense):
    model = moe_fast.upcycle(dense, num_experts=3, num_experts_per_tok=2)
    seen = _layer_inputs(model)
    for mode in ("mean", "cls", "max"):
        model[1].pooling_mode = mode
        packed = model.encode(TEXTS)
        model.packed = False
        padded = model.encode(TEXTS)
        model.packed = True
        assert _relative_error(packed, padded) <= 1e-6
    tokens = sum(len(text.split()) + 2 for text in TEXTS)
    assert seen[:2] == [(1, tokens, 32), (5, 8, 32)]


def test_the_attention_of_the_users_choice_stays(dense, enforced):
    config = enforced.transformers_model.config
    assert config._attn_implementation == "sdpa"
    seen = _layer_inputs(enforced)
    with pytest.raises(ValueError, match="must be one of"):
        enforced.encode(TEXTS, domain="z")
    with pytest.raises(ValueError, match="Unsupported input type"):  # once it has begun
        enforced.encode([3], domain="a", truncate=True)
    assert config._attn_implementation == "sdpa", "an error left it switched"
    enforced.encode(TEXTS, domain=PER_TEXT)
    assert config._attn_implementation == "sdpa" and all(shape[0] == 1 for shape in seen)
    enforced.transformers_model.set_attn_implementation("eager")
    seen.clear()
    enforced.encode(TEXTS, domain="a")
    assert seen == [(5, 8, 32)]


def test_a_compiled_model_is_left_as_it_is(dense):
    model = moe_fast.upcycle(dense, num_experts=3)
    seen = _layer_inputs(model)
    model.compile(backend="eager")
    model.encode(TEXTS)
    assert seen == [(5, 8, 32)]


def test_cut_texts_are_counted_over_all_batches_and_domains(enforced, caplog):
    texts = ["w1 " * n for n in (30, 31, 40, 2, 29, 90)]  # with [CLS] and [SEP]: 32 is the limit
    domain = ["a", "b", "c", "a", "b", "a"]
    for options in ({}, {"batch_size": 2}, {"precision": "int8"}):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            got = enforced.encode(texts, domain=domain, truncate=True, **options)
        assert [r.getMessage() for r in caplog.records if "truncated" in r.getMessage()] == [
            "3 of 6 texts are longer than max_seq_length = 32 tokens and were truncated."
        ]
    assert len(got) == 6
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        enforced.encode(texts[3], domain="a", truncate=True)
    assert "truncated" not in caplog.text


def test_a_tokenizer_that_does_not_tell_is_asked_beforehand(enforced, caplog, monkeypatch):
    monkeypatch.setattr(type(enforced.tokenizer), "is_fast", False)
    with caplog.at_level(logging.WARNING):
        enforced.encode(["w1 " * 40, "w2"], domain="a", truncate=True)
    assert caplog.text.count("1 of 2 texts are longer than max_seq_length = 32") == 1


# --- what one text, or one encoder too many, can spoil -------------------------------------------


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_the_text_that_gives_nan_is_named(dense, packed, backend):
    """By its place in what the caller gave, whatever batch and order it was computed in."""
    model = moe_fast.upcycle(dense, num_experts=3, domains=DOMAINS)
    with torch.no_grad():
        model.transformers_model.embeddings.word_embeddings.weight[6 + 13] = float("nan")  # w13
    texts, domains = [*TEXTS, "w5 " * 9], [*PER_TEXT, "a"]
    options = {"packed": packed, "batch_size": 4}
    with moe_fast.use_backend(backend):
        for domain in ("a", domains):
            with pytest.raises(ValueError, match=r"text 3: router logits must not be NaN"):
                model.encode(texts, domain=domain, **options)
        del texts[3], domains[3]
        assert np.isfinite(model.encode(texts, domain=domains, **options)).all()


def test_no_card_is_written_where_none_is_wanted(enforced, tmp_path):
    enforced.save_pretrained(str(tmp_path / "a"), create_model_card=False)
    enforced.save(str(tmp_path / "b"), None, False)
    assert not list(tmp_path.rglob("README.md"))
    (tmp_path / "a" / "README.md").write_text("mine")
    enforced.save_pretrained(str(tmp_path / "a"), create_model_card=False)
    assert (tmp_path / "a" / "README.md").read_text() == "mine"


def _routed(model):
    """One encoder for queries and one for documents."""
    from sentence_transformers.base.modules import Router

    return Router.for_query_document(list(copy.deepcopy(model)), list(model))


def test_models_of_several_encoders_are_refused_by_name(dense, enforced, tmp_path):
    message = r"one encoder; got a \w+ of 2: \w+ at '0[.]sub_modules.*Router"
    both = SentenceTransformer(modules=[_routed(dense)], device="cpu")
    both.save_pretrained(str(tmp_path), create_model_card=False)
    for model in (both, str(tmp_path)):
        with pytest.raises(TypeError, match=message):
            moe_fast.upcycle(model, num_experts=2)
        with pytest.raises(TypeError, match=message):
            moe_fast.from_experts([model, model], domains=["a", "b"])
    mixtures = SentenceTransformer(modules=[_routed(enforced)], device="cpu")
    with pytest.raises(TypeError, match=message):
        moe_fast.extract_expert(mixtures, "a")
    with pytest.raises(TypeError, match=message):
        moe_fast.MoESentenceTransformer(modules=[_routed(enforced)], device="cpu")
    with pytest.raises(TypeError, match=message):
        moe_fast.MoESentenceTransformer(str(tmp_path), device="cpu")
    twice = SentenceTransformer(modules=[*dense, copy.deepcopy(dense[0])], device="cpu")
    with pytest.raises(TypeError, match="of 2: BertModel at '0.model', BertModel at '2.model'"):
        moe_fast.upcycle(twice, num_experts=2)


@pytest.mark.slow
def test_several_processes_give_the_same(enforced):
    texts = [*TEXTS, "w1 " * 50]
    want = enforced.encode(texts, domain="b", truncate=True)
    pool = enforced.start_multi_process_pool(["cpu"])
    try:
        got = enforced.encode(texts, domain="b", truncate=True, pool=pool)
    finally:
        enforced.stop_multi_process_pool(pool)
    assert _relative_error(got, want) <= 1e-6
