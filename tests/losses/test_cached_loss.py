"""CachedLoss: the whole batch's step, whatever the loss, the model, the chunks and the wrappers."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

pytest.importorskip("sentence_transformers")

from cached_checks import (
    COEFFICIENTS,
    TOKENS,
    assert_cached_equals_whole,
    assert_same,
    gradients,
    make_batch,
    make_model,
    same_chunks,
)
from loss_checks import property_test
from sentence_transformers.sentence_transformer import losses as theirs
from toy_encoder import BagEncoder, column

from moe_fast.layers import MoEMLP, MoERouter
from moe_fast.losses import (
    CachedLoss,
    ContrastiveLearningPenaltyLoss,
    DistillationLoss,
    InfoNCELoss,
    MatryoshkaLoss,
    MultipleNegativesRankingPlusLoss,
    RouterLoss,
    SigmoidLoss,
)
from moe_fast.losses.routing_replay import RoutingChoices

LEARNED = ("k1", "k2", "sentence")


def router_loss(model, **settings) -> RouterLoss:
    inner = InfoNCELoss(model, symmetric=True, learn_temperature=True)
    return RouterLoss(inner, **(COEFFICIENTS | {"num_domains": 3} | settings))


# --- without dropout: the step of the whole batch ------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "enforced", *LEARNED])
def test_equals_the_whole_batch(kind):
    model = make_model(kind)
    loss = InfoNCELoss(model, symmetric=True, learn_temperature=True)
    columns = make_batch(model, columns=4)
    cached = assert_cached_equals_whole(loss, columns, sizes=(7, 10**6, TOKENS))
    assert {"in_batch_accuracy", "temperature"} <= cached.last_metrics.keys()


@pytest.mark.parametrize("kind", LEARNED)
def test_router_losses_are_those_of_the_whole_batch(kind):
    model = make_model(kind)
    loss = router_loss(model)
    columns = make_batch(model)
    loss(columns)
    terms = dict(loss.last_metrics)
    cached = assert_cached_equals_whole(loss, columns)
    for name, term in terms.items():
        torch.testing.assert_close(cached.last_metrics[name], term, rtol=1e-5, atol=1e-6)
    grads = gradients(loss, cached(columns))
    assert all(g.norm() > 1e-4 for name, g in grads.items() if "router" in name)


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_each_router_loss_alone_and_in_float64(name):
    model = make_model("k2").double()
    loss = RouterLoss(InfoNCELoss(model), **{name: 2.0}, num_domains=3)
    assert_cached_equals_whole(loss, make_batch(model), tolerance=1e-11)  # float64 rounding


def test_the_mean_of_the_chunks_losses_would_be_another_loss():
    """The balance of a batch is not the mean of its parts': what is compared above can differ."""
    model = make_model("k1")
    loss = RouterLoss(InfoNCELoss(model), load_balance=1.0)
    columns = make_batch(model)
    first = columns[0]["domain_ids"] == 0
    halves = [[rows_of(column, rows) for column in columns] for rows in (first, ~first)]
    loss(columns)
    whole = loss.last_metrics["load_balance"].item()
    parts = [(loss(half), loss.last_metrics["load_balance"].item())[1] for half in halves]
    assert abs(sum(parts) / 2 - whole) > 1e-3 * whole


def rows_of(column: dict, rows: torch.Tensor) -> dict:
    return {k: v[rows] if isinstance(v, torch.Tensor) else v for k, v in column.items()}


MAKES = {
    "one direction": (lambda m: InfoNCELoss(m), 3),
    "penalty": (lambda m: ContrastiveLearningPenaltyLoss(m, queries_per_negative=1), 6),
    "penalty in the batch": (lambda m: ContrastiveLearningPenaltyLoss(m, penalty_weight=0.5), 2),
    "sigmoid": (lambda m: SigmoidLoss(m), 3),
    "plus": (lambda m: MultipleNegativesRankingPlusLoss(m, learn_temperature=True), 2),
    "matryoshka": (lambda m: MatryoshkaLoss(InfoNCELoss(m), [16, 8, 3]), 3),
    "same domain": (lambda m: InfoNCELoss(m, negatives_from="same_domain"), 2),
}


@pytest.mark.parametrize("name", MAKES)
def test_around_any_loss(name):
    make, columns = MAKES[name]
    model = make_model("k1")
    assert_cached_equals_whole(make(model), make_batch(model, columns=columns))


def test_labels_and_ids_stay_with_their_rows():
    model = make_model("k1")
    columns = make_batch(model, columns=4)
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(24, 3, generator=generator)
    loss = DistillationLoss(InfoNCELoss(model), coefficient=3.0, learn_temperature=True)
    assert_cached_equals_whole(loss, columns, scores)
    columns = make_batch(model, columns=2)
    columns[0]["group_ids"] = torch.randint(0, 6, (24,), generator=generator)
    hashes = torch.randint(0, 9, (24,), generator=generator)
    for number, features in enumerate(columns):
        features["text_hash"] = hashes + 100 * number
    assert_cached_equals_whole(InfoNCELoss(model), columns)


TEXTS = st.lists(st.integers(0, 49), min_size=1, max_size=7)


@property_test
@given(
    rows=st.lists(st.tuples(TEXTS, TEXTS, TEXTS), min_size=2, max_size=9), tokens=st.integers(1, 30)
)
def test_any_batch_and_any_chunk(rows, tokens):
    encoder = BagEncoder()
    columns = [column(*texts) for texts in zip(*rows, strict=True)]
    loss = InfoNCELoss(encoder, symmetric=True, similarity="dot", temperature=1.0)
    expected = loss(columns)
    (wanted,) = torch.autograd.grad(expected, encoder.embedding)
    value = CachedLoss(loss, tokens_per_chunk=tokens)(columns)
    value.backward()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(encoder.embedding.grad, wanted, rtol=1e-10, atol=1e-12)


def test_equals_sentence_transformers_cached_loss():
    model = make_model("dense")
    columns = make_batch(model, columns=3)
    cached = CachedLoss(InfoNCELoss(model, mask_duplicates=False), tokens_per_chunk=TOKENS)
    peer = theirs.CachedMultipleNegativesRankingLoss(model, mini_batch_size=5)
    wanted = gradients(peer, peer([dict(c) for c in columns], None))
    found = gradients(cached, cached(columns))
    assert_same({n.removeprefix("loss."): g for n, g in found.items()}, wanted)


def test_packed_texts_equal_padded_ones():
    """Features as sentence-transformers packs them, through an encoder that understands both."""

    class PackedBag(BagEncoder):
        def forward(self, features):
            if "cu_seq_lens_q" not in features:
                return super().forward(features)
            tokens = self.embedding[features["input_ids"][0]]
            parts = tokens.split(features["cu_seq_lens_q"].diff().tolist())
            return {"sentence_embedding": torch.stack([part.mean(0) for part in parts])}

    texts = [[[1, 2], [3], [4, 5, 6, 1]], [[9], [8, 8, 7, 2], [3, 1]]]
    padded = [column(*t, text_hash=[n, n + 1, n + 2]) for n, t in zip((0, 10), texts, strict=True)]
    packed = [
        {
            "input_ids": torch.tensor([[token for text in t for token in text]]),
            "cu_seq_lens_q": torch.tensor([0, *map(len, t)]).cumsum(0).int(),
            "text_hash": features["text_hash"],
        }
        for t, features in zip(texts, padded, strict=True)
    ]
    loss = InfoNCELoss(PackedBag())
    wanted = gradients(loss, loss(padded))
    for tokens in (1, 5, 100):
        cached = CachedLoss(loss, tokens_per_chunk=tokens)
        assert_same(gradients(loss, cached(packed)), wanted, 1e-12)
        assert "padding_avoided" not in cached.last_metrics


# --- with dropout: the same chunks under the same random state -----------------------------------


@pytest.mark.parametrize("kind", ["dense", *LEARNED])
def test_with_dropout_equals_the_same_chunks_with_their_graph(kind):
    model = make_model(kind, dropout=0.2)
    loss = InfoNCELoss(model, learn_temperature=True) if kind == "dense" else router_loss(model)
    columns = make_batch(model)
    torch.manual_seed(5)
    expected = same_chunks(loss, columns)
    wanted = gradients(loss, expected)
    state = torch.get_rng_state()
    torch.manual_seed(5)
    value = CachedLoss(loss, tokens_per_chunk=TOKENS)(columns)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
    torch.rand(3)  # what is drawn between the passes is nobody's
    drawn = torch.get_rng_state()
    assert_same(gradients(loss, value), wanted)
    assert torch.equal(torch.get_rng_state(), drawn)  # the second pass leaves no trace
    torch.manual_seed(5)
    CachedLoss(loss, tokens_per_chunk=TOKENS)(columns).backward()
    assert torch.equal(torch.get_rng_state(), state)


def test_other_masks_would_be_noticed():
    model = make_model("k1", dropout=0.2)
    loss, columns = router_loss(model), make_batch(model)
    torch.manual_seed(5)
    wanted = gradients(loss, same_chunks(loss, columns))
    torch.manual_seed(6)
    found = gradients(loss, CachedLoss(loss, tokens_per_chunk=TOKENS)(columns))
    with pytest.raises(AssertionError):
        assert_same(found, wanted, 1e-2)


@pytest.mark.parametrize("kind", LEARNED)
def test_the_second_pass_makes_the_choices_of_the_first(kind, monkeypatch):
    """Between the passes every logit moves, as rounding would move those of a near tie."""
    model = make_model(kind)
    loss, columns = router_loss(model), make_batch(model, rows=6)
    shift, seen = [], []
    for module in model.modules():
        if isinstance(module, MoERouter):
            module.register_forward_pre_hook(lambda m, inputs: (inputs[0] + shift[-1], inputs[1]))
    cached = CachedLoss(loss, tokens_per_chunk=TOKENS)
    for module in model.modules():
        if isinstance(module, MoERouter):
            module.register_forward_hook(lambda m, i, output: seen.append(output.top_k_index))

    def are_the_same() -> bool:
        seen.clear()
        shift.append(0.0)
        value = cached(columns)
        shift.append(5.0)
        value.backward()
        first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
        assert len(first) == len(second)
        return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    assert are_the_same()
    monkeypatch.setattr(RoutingChoices, "replay", lambda self, router, inputs, output: output)
    assert not are_the_same()


# --- wrappers and modes --------------------------------------------------------------------------


@pytest.mark.parametrize("backward_inside", [False, True])
@pytest.mark.parametrize("kind", ["dense", "k2"])
def test_autocast(kind, backward_inside):
    """The second pass computes in the dtype of the first, wherever ``backward`` is called."""
    model = make_model(kind)
    loss = InfoNCELoss(model, learn_temperature=True) if kind == "dense" else router_loss(model)
    columns = make_batch(model)
    dtypes = set()
    query = model[0].model.encoder.layer[0].attention.self.query
    query.register_forward_hook(lambda m, i, output: dtypes.add(output.dtype))
    cached = CachedLoss(loss, tokens_per_chunk=TOKENS)
    found = []
    # Without autocast's cache of casts gradients add up in float32, as they do over chunks.
    for step, cache in (
        (lambda: same_chunks(loss, columns), False),
        (lambda: cached(columns), True),
    ):
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=cache):
            value = step()
            if backward_inside:
                found.append(gradients(loss, value))
        if not backward_inside:
            found.append(gradients(loss, value))
    assert dtypes == {torch.bfloat16}
    assert_same(found[1], found[0])


@pytest.mark.parametrize("cache", [False, True])
def test_the_second_pass_keeps_autocasts_setting_of_its_cache(cache):
    """It decides in which precision the gradients of a weight's uses add up."""
    model = make_model("dense")
    settings = []
    query = model[0].model.encoder.layer[0].attention.self.query
    query.register_forward_hook(lambda *_: settings.append(torch.is_autocast_cache_enabled()))
    cached = CachedLoss(InfoNCELoss(model), tokens_per_chunk=TOKENS)
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=cache):
        value = cached(make_batch(model))
    first = len(settings)
    value.backward()
    assert settings == [cache] * (2 * first)


def test_a_loss_scale_reaches_every_chunk():
    model = make_model("k2")
    loss, columns = router_loss(model), make_batch(model)
    cached = CachedLoss(loss, tokens_per_chunk=TOKENS)
    expected = gradients(loss, cached(columns))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    scaled = gradients(loss, scaler.scale(cached(columns)))
    assert_same({name: g / 2**12 for name, g in scaled.items()}, expected, 1e-6)


def test_gradient_accumulation_adds_up():
    model = make_model("k1")
    loss = router_loss(model)
    batches = [make_batch(model, seed=seed) for seed in (0, 1)]
    cached = CachedLoss(loss, tokens_per_chunk=TOKENS)
    parts = [gradients(loss, loss(batch)) for batch in batches]
    loss.zero_grad()
    for batch in batches:
        (cached(batch) / 2).backward()
    found = {n: p.grad.clone() for n, p in loss.named_parameters() if p.grad is not None}
    assert_same(found, {name: (parts[0][name] + parts[1][name]) / 2 for name in parts[0]})


def test_two_batches_before_either_backward():
    model = make_model("k1", dropout=0.2)
    loss = router_loss(model)
    cached = CachedLoss(loss, tokens_per_chunk=TOKENS)
    batches = [make_batch(model, seed=seed) for seed in (0, 1)]
    torch.manual_seed(0)
    apart = []
    for batch in batches:
        apart.append(gradients(loss, cached(batch)))
    torch.manual_seed(0)
    values = [cached(batch) for batch in batches]
    assert_same(gradients(loss, values[1]), apart[1])
    assert_same(gradients(loss, values[0]), apart[0])


@pytest.mark.parametrize("kind", ["dense", "k2"])
def test_gradient_checkpointing(kind):
    model = make_model(kind, dropout=0.2)
    encoder = model[0].model
    loss = InfoNCELoss(model) if kind == "dense" else router_loss(model)
    columns = make_batch(model)
    cached = CachedLoss(loss, tokens_per_chunk=TOKENS)
    torch.manual_seed(0)
    expected = gradients(loss, cached(columns))
    encoder.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(0)
    assert_same(gradients(loss, cached(columns)), expected)
    encoder.gradient_checkpointing_enable({"use_reentrant": True})
    value = cached(columns)
    if kind == "k2":
        with pytest.raises(ValueError, match='"use_reentrant": False'):
            value.backward()


@pytest.mark.parametrize("kind", ["dense", "k1"])
def test_frozen_parts(kind):
    model = make_model(kind)
    loss = InfoNCELoss(model, learn_temperature=True)
    columns = make_batch(model)
    encoder = model[0].model
    for parameter in encoder.embeddings.parameters():
        parameter.requires_grad_(False)
    assert_cached_equals_whole(loss, columns)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert gradients(loss, CachedLoss(loss, tokens_per_chunk=TOKENS)(columns)).keys() == {
        "log_temperature"
    }
    fixed = CachedLoss(InfoNCELoss(model), tokens_per_chunk=TOKENS)
    assert not fixed(columns).requires_grad  # there is nothing to train


def test_lora():
    peft = pytest.importorskip("peft")
    model = make_model("dense")
    config = peft.LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, model.transformers_model)
    loss = InfoNCELoss(model)
    assert_cached_equals_whole(loss, make_batch(model))
    assert all("lora" in name for name in gradients(loss, loss(make_batch(model))))


class OneLayer(nn.Module):
    """An encoder that compiles quickly: embeddings, one mixture, their mean."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(30, 8)
        self.mlp = MoEMLP(8, 8, 3)

    def forward(self, features):
        return {"sentence_embedding": self.mlp(self.embedding(features["input_ids"])).mean(1)}


def test_compiled_models():
    model = OneLayer()
    texts = torch.randint(0, 30, (2, 6, 5), generator=torch.Generator().manual_seed(0))
    columns = [{"input_ids": ids, "domain_ids": torch.arange(6) % 3} for ids in texts]
    loss = router_loss(model)
    expected = gradients(loss, loss(columns))
    cached = CachedLoss(loss, tokens_per_chunk=10)
    loss.loss.model = torch.compile(model, backend="eager")
    found = gradients(loss, cached(columns))
    assert_same({n.replace("_orig_mod.", ""): g for n, g in found.items()}, expected)


def test_without_gradients_and_in_evaluation():
    model = make_model("k1", dropout=0.2).eval()
    loss, columns = router_loss(model), make_batch(model)
    expected = loss(columns)
    for cached in (CachedLoss(loss, tokens_per_chunk=TOKENS), CachedLoss(loss)):
        with torch.no_grad():
            value = cached(columns)
        assert not value.requires_grad
        torch.testing.assert_close(value, expected)
        assert cached.tokens_per_chunk in (TOKENS, None)  # evaluation chooses nothing


def test_an_encoder_that_changes_its_features():
    class Careless(BagEncoder):
        def forward(self, features):
            result = super().forward(features)
            features["attention_mask"].zero_()  # as Pooling does with a prompt's tokens
            features["extra"] = None
            return result

    loss = InfoNCELoss(Careless())
    columns = [column([1, 2], [3], [4, 5, 6]), column([9], [8, 8], [7, 3, 1])]
    cached = CachedLoss(loss, tokens_per_chunk=3)
    found = gradients(loss, cached(columns))
    plain = InfoNCELoss(BagEncoder())
    assert_same(found, gradients(plain, plain(columns)), 1e-12)
    assert columns[0].keys() == {"input_ids", "attention_mask"}


def test_what_happens_to_the_batch_before_the_backward_pass_does_not_matter():
    loss = InfoNCELoss(BagEncoder())
    columns = [column([1, 2], [3], [4, 5, 6]), column([9], [8, 8], [7, 3, 1])]
    expected = gradients(loss, loss(columns))
    value = CachedLoss(loss, tokens_per_chunk=3)(columns)
    for features in columns:  # a trainer is done with them
        features.clear()
    assert_same(gradients(loss, value), expected, 1e-12)


def test_a_copied_loss_is_a_loss_of_its_own():
    model = make_model("k1")
    cached = CachedLoss(router_loss(model), tokens_per_chunk=TOKENS)
    columns = make_batch(model)
    expected = gradients(cached, cached(columns))
    copied = copy.deepcopy(cached)
    assert_same(gradients(copied, copied(columns)), expected)


# --- what it is for ------------------------------------------------------------------------------


class LiveBytes:
    """How many bytes are kept for a backward pass, at the most."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def pack(self, tensor):
        held = Held(tensor)
        size = tensor.nbytes
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(held, self._free, size)
        return held

    def _free(self, size):
        self.now -= size


class Held:
    def __init__(self, tensor):
        self.tensor = tensor


def kept_at_most(step) -> int:
    live = LiveBytes()
    with torch.autograd.graph.saved_tensors_hooks(live.pack, lambda held: held.tensor):
        step()
    return live.peak


def test_memory_is_that_of_a_chunk_whatever_the_batch():
    model = make_model("k2")
    loss = router_loss(model)
    cached = CachedLoss(loss, tokens_per_chunk=TOKENS)
    small, large = (make_batch(model, rows=rows) for rows in (16, 64))
    whole = kept_at_most(lambda: loss(large).backward())
    peaks = [kept_at_most(lambda b=b: cached(b).backward()) for b in (small, large)]
    assert peaks[1] < whole / 8
    # What grows with the batch is the loss's own part: this one holds the B x B logits.
    grown = 64 * 64 * 4 * 40
    assert peaks[1] < peaks[0] + grown < whole / 2


def test_the_padding_that_is_avoided():
    encoder = BagEncoder()
    columns = [column([1] * 9, [2], [3], [4]), column([5, 6], [7, 8], [9, 1], [2, 3])]
    cached = CachedLoss(InfoNCELoss(encoder), tokens_per_chunk=9)
    cached(columns)
    assert cached.last_metrics["padding_avoided"].item() == 1.0
    cached = CachedLoss(InfoNCELoss(encoder), tokens_per_chunk=18)
    cached(columns)  # 9 and 1 together: 8 of the batch's 24 are left
    assert cached.last_metrics["padding_avoided"].item() == pytest.approx(2 / 3)


# --- bad input -----------------------------------------------------------------------------------


def test_other_losses_are_refused():
    model = make_model("k1")
    peer = theirs.MultipleNegativesRankingLoss(model)
    with pytest.raises(TypeError, match="got MultipleNegativesRankingLoss.*its own cached form"):
        CachedLoss(peer)
    with pytest.raises(TypeError, match="got RouterLoss around MultipleNegativesRankingLoss"):
        CachedLoss(RouterLoss(peer, load_balance=1.0))
    with pytest.raises(TypeError, match="got CachedLoss"):
        CachedLoss(CachedLoss(InfoNCELoss(model)))


@pytest.mark.parametrize(("given", "error"), [(0, ValueError), (-4, ValueError), (1.5, TypeError)])
def test_bad_sizes_are_named(given, error):
    with pytest.raises(error, match="tokens_per_chunk"):
        CachedLoss(InfoNCELoss(BagEncoder()), tokens_per_chunk=given)


def test_what_the_loss_refuses_is_refused_before_anything_is_encoded():
    encoder = BagEncoder()
    cached = CachedLoss(InfoNCELoss(encoder, negatives_from="same_domain"), tokens_per_chunk=8)
    with pytest.raises(ValueError, match="at least two text columns"):
        cached([column([1], [2])])
    with pytest.raises(ValueError, match="needs domain_ids"):
        cached([column([1], [2]), column([3], [4])])
    cached = CachedLoss(InfoNCELoss(encoder), tokens_per_chunk=8)
    empty = {k: v[:0] for k, v in column([1]).items()}
    with pytest.raises(ValueError, match=r"at least one text; got \[0, 0\]"):
        cached([empty, empty])
    with pytest.raises(ValueError, match="needs columns of texts"):
        cached([{"pixel_values": torch.zeros(2, 3)}] * 2)
    model = make_model("k1")
    columns = [{k: v for k, v in c.items() if k != "domain_ids"} for c in make_batch(model)]
    with pytest.raises(ValueError, match="mutual_information.*domain_ids must be in the features"):
        CachedLoss(router_loss(model), tokens_per_chunk=8)(columns)
    assert encoder.seen == []
