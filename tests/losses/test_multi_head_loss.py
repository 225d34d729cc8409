"""MultiHeadInfoNCELoss: the published loss, its gradients, in chunks and over processes."""

from __future__ import annotations

import pytest
import three_head_oracle as oracle
import torch
from cached_checks import assert_cached_equals_whole, gradients
from loss_checks import assert_close
from three_head_oracle import ThreeHeadEncoder, texts
from toy_encoder import BagEncoder

from moe_fast.losses import CachedLoss, DistillationLoss, MatryoshkaLoss, MultiHeadInfoNCELoss
from moe_fast.losses.functional import lexical
from moe_fast.losses.functional.sparse_floor import sparse_floor
from moe_fast.losses.head_embeddings import head_embeddings
from moe_fast.ops.maxsim import tiled

F64 = torch.float64


@pytest.fixture(autouse=True, params=[None, 3], ids=["one tile", "many tiles"])
def tiles(request, monkeypatch):
    """Each test runs with all scores in one tile, and in tiles of a few tokens."""
    if request.param is not None:
        monkeypatch.setitem(tiled.TILE, "cpu", request.param)
        monkeypatch.setattr(lexical, "_GROUP_ENTRIES", 40)


def loss_of(model, **settings):
    return MultiHeadInfoNCELoss(model, **({"sparse_floor": 0.0} | settings))


def assert_equal(loss, columns, expected, labels=None):
    value = loss(columns, labels)
    assert_close(value, expected)
    ours = gradients(loss, value)
    theirs = gradients(loss, expected)
    assert ours.keys() == theirs.keys() and len(ours) == 5
    for name, grad in theirs.items():
        assert grad.abs().max() > 1e-6, name
        assert_close(ours[name], grad)


@pytest.mark.parametrize("columns", [2, 4])
@pytest.mark.parametrize("temperature", [0.02, 1.0])
@pytest.mark.parametrize("distils", [False, True])
def test_equals_the_published_loss(columns, temperature, distils):
    model, batch = ThreeHeadEncoder(), texts(5, columns)
    loss = loss_of(model, temperature=temperature, self_distillation_from=0 if distils else None)
    expected = oracle.loss(model, batch, temperature=temperature, distils=distils)
    assert_equal(loss, batch, expected)


def test_a_teachers_scores():
    model, batch = ThreeHeadEncoder(), texts(4, 4)
    teacher = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=F64)
    loss = loss_of(model, temperature=0.5, teacher_scores=True, teacher_temperature=2.0)
    expected = oracle.loss(model, batch, temperature=0.5, teacher=teacher / 2)
    assert_equal(loss, batch, expected, teacher)


def test_self_distillation_begins_at_its_step_and_the_step_is_saved():
    model, batch = ThreeHeadEncoder(), texts(4, 2)
    loss = loss_of(model, self_distillation_from=2)
    found = [loss(batch).item() for _ in range(3)]
    with torch.no_grad():
        loss(batch)
    assert "steps" in loss.state_dict() and loss.steps == 3, "evaluation is no step"
    assert found[0] == found[1] != found[2]
    assert found[2] == pytest.approx(oracle.loss(model, batch).item(), rel=1e-10)


def test_the_same_text_is_no_negative():
    model = ThreeHeadEncoder()
    batch = texts(4, 3)
    for key in batch[1]:  # positive 2 is positive 0; each row's negative is its positive
        batch[1][key][2] = batch[1][key][0]
    batch[2] = {k: v.clone() for k, v in batch[1].items()}
    loss = loss_of(model, self_distillation_from=None, temperature=1.0)
    s = oracle.scores(model, batch[0], batch[1])
    ids = [0, 1, 0, 3]
    total = torch.zeros((), dtype=F64)
    for name, weight in (("dense", 1.0), ("sparse", 0.1), ("multi", 1.0), ("all", 1.0)):
        for i in range(4):
            others = [j for j in range(4) if ids[j] != ids[i]]
            logits = torch.cat([s[name][i, [i]], s[name][i, others], s[name][i, others]])
            total = total + weight * (logits.logsumexp(0) - s[name][i, i]) / 16
    assert_equal(loss, batch, total)


def test_the_queries_of_hard_negatives():
    model, batch = ThreeHeadEncoder(), texts(4, 4)
    loss = loss_of(model, queries_per_negative=1, penalty_weight=0.25)
    plain = oracle.loss(model, batch[:3])
    h, q = (torch.nn.functional.normalize(model.hidden(c)[:, 0], dim=-1) for c in batch[2:])
    penalty = (1 - (h * q).sum(-1)).mean()
    assert_equal(loss, batch, 0.75 * plain + 0.25 * penalty)


@pytest.mark.parametrize("settings", [{}, {"sparse_floor": 1.0, "sparse_margin": 5.0}])
def test_in_chunks(settings):
    loss = loss_of(ThreeHeadEncoder(), learn_temperature=True, temperature=0.1, **settings)
    if settings:
        loss(texts(9, 3))  # measures the share that is kept
    cached = assert_cached_equals_whole(loss, texts(9, 3), tolerance=1e-9, sizes=(1, 25, 10**6))
    assert {"in_batch_accuracy", "sparse_nonzeros", "temperature"} <= cached.last_metrics.keys()


def test_metrics():
    model, batch = ThreeHeadEncoder(), texts(6, 3)
    loss = loss_of(model)
    loss(batch)
    s = torch.cat([oracle.scores(model, batch[0], c)["all"] for c in batch[1:]], 1)
    hits = (s.argmax(1) == torch.arange(6)).double().mean()
    assert loss.last_metrics["in_batch_accuracy"] == hits
    counts = []
    for features in batch:
        positive = model.sparse(model.hidden(features))[..., 0] > 0
        for ids, kept in zip(features["input_ids"], positive, strict=True):
            counts.append(len({i for i, k in zip(ids.tolist(), kept, strict=True) if k and i > 2}))
    assert loss.last_metrics["sparse_nonzeros"] == pytest.approx(sum(counts) / len(counts))


def test_the_floor_holds_the_largest_tokens_of_each_text():
    logits = torch.tensor([0.3, -0.2, 0.05, -1.0, -0.4], dtype=F64, requires_grad=True)
    starts = torch.tensor([0, 3, 3, 5])
    found = sparse_floor(logits, starts, 0.6, 0.1)  # 2 of 3 tokens, none of none, 2 of 2
    assert_close(found, torch.tensor([0.25, 0.0, (11.0 + 5.0) / 2], dtype=F64))
    found.sum().backward()
    assert_close(logits.grad, torch.tensor([0.0, 0.0, -5.0, -5.0, -5.0], dtype=F64))


def test_a_dead_sparse_head_comes_back_with_the_floor_alone():
    for floor, returns in ((0.0, False), (0.8, True)):
        model, batch = ThreeHeadEncoder(), texts(6, 2)
        loss = MultiHeadInfoNCELoss(model, temperature=1.0, sparse_floor=floor)
        loss.first_share.fill_(1.0)
        with torch.no_grad():
            model.sparse.weight.mul_(0.1)
            model.sparse.bias.fill_(-3.0)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        for _ in range(100):
            optimizer.zero_grad()
            loss(batch).backward()
            optimizer.step()
        loss(batch)
        assert (loss.last_metrics["sparse_nonzeros"] > 2) == returns


def test_a_lone_pair_trains_nothing(caplog):
    loss = loss_of(ThreeHeadEncoder())
    value = loss(texts(1, 2))
    value.backward()
    assert value == 0 and "nothing to learn from" in caplog.text
    assert all(not p.grad.any() for p in loss.parameters() if p.grad is not None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype):
    model, batch = ThreeHeadEncoder(), texts(6, 3)
    expected = oracle.loss(model, batch, temperature=0.5)
    want = gradients(model, expected)
    narrow = ThreeHeadEncoder().to(dtype)
    narrow.hidden = lambda f: model.hidden(f).to(dtype)  # rounded once, as a head's input is
    loss = loss_of(narrow, temperature=0.5)
    value = loss(batch)
    assert value.dtype == torch.float32
    value.backward()
    bound = 1e-5 if dtype == torch.float32 else 0.05
    assert abs(value.item() / expected.item() - 1) < bound
    for name, parameter in narrow.named_parameters():
        if name != "embedding":
            error = (parameter.grad.double() - want[name]).norm() / want[name].norm()
            assert error < 4 * bound, name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"score_weights": (1, 1)}, "score_weights must be three numbers; got"),
        ({"sparse_weight": -1}, "sparse_weight must be at least 0"),
        ({"sparse_floor": 1.5}, "sparse_floor must lie in"),
        ({"sparse_margin": 0}, "sparse_margin must be a positive"),
        ({"temperature": 0}, "temperature must be a positive"),
        ({"queries_per_negative": -1}, "queries_per_negative must be at least 0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        MultiHeadInfoNCELoss(ThreeHeadEncoder(), **settings)


def test_bad_columns_and_models():
    loss = loss_of(ThreeHeadEncoder(), queries_per_negative=1)
    with pytest.raises(ValueError, match="needs at least two text columns"):
        loss(texts(3, 1))
    with pytest.raises(ValueError, match="needs a multiple of 2 columns"):
        loss(texts(3, 3))
    taught = loss_of(ThreeHeadEncoder(), teacher_scores=True)
    with pytest.raises(ValueError, match=r"labels must hold .* \[B, 2\]; got \[3\]"):
        taught(texts(3, 3), torch.ones(3))
    with pytest.raises(ValueError, match="must be finite"):
        taught(texts(3, 3), torch.full((3, 2), torch.nan))
    with pytest.raises(TypeError, match="must have three heads, .* BagEncoder lack token_logits"):
        MultiHeadInfoNCELoss(BagEncoder())(texts(3, 2))


@pytest.mark.parametrize("wrap", [lambda x: MatryoshkaLoss(x, [3]), DistillationLoss])
def test_wrappers_that_change_embeddings_refuse_it(wrap):
    with pytest.raises(TypeError, match="MultiHeadInfoNCELoss compares several outputs"):
        wrap(loss_of(ThreeHeadEncoder()))


def test_packed_features_are_the_padded_ones():
    model, (padded,) = ThreeHeadEncoder(), texts(5, 1)
    outputs = model(padded)
    real = padded["attention_mask"].bool()
    packed = {
        name: value[real][None]
        for name, value in outputs.items()
        if name not in ("sentence_embedding", "attention_mask")
    }
    packed["sentence_embedding"] = outputs["sentence_embedding"]
    packed["cu_seq_lens_q"] = torch.nn.functional.pad(real.sum(1).cumsum(0), (1, 0)).int()
    got, want = head_embeddings(packed, model), head_embeddings(outputs, model)
    for name in ("dense", "logits", "vectors", "ids", "token_starts", "vector_starts"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name


def test_memory_holds_no_product_of_all_tokens():
    """What stays for the backward pass: the outputs, and matrices of B x N."""
    model, batch = ThreeHeadEncoder(), texts(16, 2, longest=30)
    loss = loss_of(model)
    embeddings = loss.embed_columns(batch)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss.from_embeddings(embeddings, batch, None)
    outputs = sum(t.nbytes for e in embeddings for t in e.tensors)
    assert sum(kept.values()) < 3 * outputs + 40 * 8 * 16 * 16
    assert isinstance(CachedLoss(loss).loss, MultiHeadInfoNCELoss)
