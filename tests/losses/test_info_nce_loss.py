"""InfoNCELoss on a bag-of-words encoder: no sentence-transformers needed."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from toy_encoder import ANCHORS, HARD, POSITIVES, BagEncoder, column, embed

from moe_fast import ops
from moe_fast.losses import InfoNCELoss, functional

# --- what it computes ----------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_is_ops_info_nce_of_the_embeddings(similarity, symmetric):
    encoder = BagEncoder()
    columns = [column(*ANCHORS), column(*POSITIVES), *(column(*texts) for texts in HARD)]
    loss = InfoNCELoss(encoder, temperature=0.2, similarity=similarity, symmetric=symmetric)
    a, b, *negatives = embed(encoder, *columns)
    rows = torch.stack([negatives[g][i] for i in range(3) for g in range(2)])  # i * G + g
    expected = functional.info_nce(
        a, b, rows, scale=5.0, similarity=similarity, symmetric=symmetric
    )
    torch.testing.assert_close(loss(columns, None), expected, rtol=1e-12, atol=0)
    assert functional.info_nce is ops.info_nce


def test_a_lone_pair_is_said_and_does_not_end_a_training(caplog):
    """The op refuses it; a data set of 33 rows in batches of 32 ends with one."""
    encoder = BagEncoder()
    loss = InfoNCELoss(encoder, learn_temperature=True)
    alone = loss([column([1]), column([2])])
    assert alone.item() == 0.0 and "nothing to learn from" in caplog.text
    alone.backward()
    assert all(not p.grad.any() for p in [*encoder.parameters(), *loss.parameters()])
    assert loss([column([1]), column([2]), column([3])]).item() > 0.0
    with pytest.raises(ValueError, match="needs negatives: .* got B = 1"):
        ops.info_nce(*embed(encoder, column([1]), column([2])), scale=1.0)


def test_one_process_gathers_nothing():
    columns = [column(*ANCHORS), column(*POSITIVES)]
    alone = InfoNCELoss(BagEncoder())
    gathering = InfoNCELoss(BagEncoder(), gather_across_devices=True, exchange="ring")
    assert not gathering.gathers
    assert torch.equal(gathering(columns), alone(columns))


def test_label_smoothing_reaches_the_op():
    encoder = BagEncoder()
    columns = [column(*ANCHORS), column(*POSITIVES)]
    smoothed = InfoNCELoss(encoder, label_smoothing=0.2)(columns)
    a, b = embed(encoder, *columns)
    expected = ops.info_nce(a, b, scale=20.0, symmetric=False, label_smoothing=0.2)
    torch.testing.assert_close(smoothed, expected, rtol=1e-12, atol=0)


# --- duplicates and domains ----------------------------------------------------------------------


@pytest.mark.parametrize("by_text_hash", [True, False])
def test_a_text_is_never_its_own_negative(by_text_hash):
    """Row 1's positive is row 0's, and row 1's hard negative is row 0's anchor."""
    encoder = BagEncoder()
    columns = [
        column([1, 2], [3]),
        column([4], [4], width=3),
        column([5, 6], [1, 2], left=True, width=4),
    ]
    if by_text_hash:
        for features, hashes in zip(columns, ([10, 11], [12, 12], [13, 10]), strict=True):
            features["text_hash"] = torch.tensor(hashes)
    a, b, n = embed(encoder, *columns)
    cos = nn.functional.cosine_similarity
    # Row 0 sees its positive and row 0's negative; row 1 its positive and both negatives.
    logits = [
        torch.stack([cos(a[0], b[0], 0), cos(a[0], n[0], 0)]) * 20,
        torch.stack([cos(a[1], b[1], 0), cos(a[1], n[0], 0), cos(a[1], n[1], 0)]) * 20,
    ]
    expected = torch.stack([-row.log_softmax(0)[0] for row in logits]).mean()
    loss = InfoNCELoss(encoder)(columns)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert InfoNCELoss(encoder, mask_duplicates=False)(columns) > loss


def test_texts_are_told_apart_by_order_and_length():
    """Another order, or one text with the other's padding token at its end, is another text."""
    encoder = BagEncoder()
    columns = [column([1], [2], [3]), column([4, 5], [5, 4], [4, 5, 7])]
    loss = InfoNCELoss(encoder)
    unmasked = InfoNCELoss(encoder, mask_duplicates=False)
    torch.testing.assert_close(loss(columns), unmasked(columns), rtol=0, atol=0)


def test_negatives_from_the_same_domain_only():
    """With two negatives a row: candidate B + i * G + g has row i's domain, not row g's."""
    encoder = BagEncoder()
    columns = [
        column(*ANCHORS, domain_ids=[0, 1, 0]),
        *(column(*texts) for texts in (POSITIVES, *HARD)),
    ]
    a, b, *hard = embed(encoder, *columns)
    visible = {0: [0, 2], 1: [1], 2: [2, 0]}  # own row first
    rows = []
    for row, others in visible.items():
        texts = [b[i] for i in others] + [negatives[i] for i in others for negatives in hard]
        logits = 20 * nn.functional.cosine_similarity(a[row], torch.stack(texts), dim=-1)
        rows.append(-logits.log_softmax(0)[0])
    loss = InfoNCELoss(encoder, negatives_from="same_domain")(columns)
    torch.testing.assert_close(loss, torch.stack(rows).mean(), rtol=1e-12, atol=0)
    assert not torch.isclose(loss, InfoNCELoss(encoder)(columns))


# --- what reaches the encoder --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        (None, set()),
        (SimpleNamespace(hidden_size=6), set()),
        (SimpleNamespace(num_experts=2, domains=None, routing="token_topk"), set()),
        (SimpleNamespace(num_experts=2, domains=["x"], routing="token_topk"), {"domain_ids"}),
        (
            SimpleNamespace(num_experts=2, domains=["x"], routing="enforced"),
            {"domain_ids", "expert_ids"},
        ),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_only_what_the_encoder_knows_reaches_it(config, kept, wrapped):
    encoder = BagEncoder(config)
    extra = {"text_hash": [1, 2, 3], "domain_ids": [0, 0, 0], "expert_ids": [0, 0, 0]}
    columns = [column(*texts, **extra) for texts in (ANCHORS, POSITIVES)]

    class Wrapper(nn.Module):  # as DistributedDataParallel holds its module
        def __init__(self) -> None:
            super().__init__()
            self.module = encoder

        def forward(self, features):
            return self.module(features)

    InfoNCELoss(Wrapper() if wrapped else encoder)(columns)
    assert encoder.seen == [{"input_ids", "attention_mask"} | kept] * 2
    assert set(columns[0]) == {"input_ids", "attention_mask", *extra}  # the caller's, untouched


# --- temperature ---------------------------------------------------------------------------------


def test_the_learned_temperature_has_the_exact_gradient():
    encoder = BagEncoder()
    columns = [column(*ANCHORS), column(*POSITIVES)]
    loss = InfoNCELoss(encoder, temperature=0.3, learn_temperature=True).double()
    loss(columns).backward()

    def value(log_temperature: float) -> float:
        a, b = embed(encoder, *columns)
        return ops.info_nce(a, b, scale=math.exp(-log_temperature), symmetric=False).item()

    at, step = loss.log_temperature.item(), 1e-5
    numeric = (value(at + step) - value(at - step)) / (2 * step)
    assert loss.log_temperature.grad.item() == pytest.approx(numeric, rel=1e-7)


@pytest.mark.parametrize(("pushed_to", "bound"), [(1e-4, 0.01), (50.0, 1.0)])
def test_a_learned_temperature_is_clamped_and_can_come_back(pushed_to, bound):
    loss = InfoNCELoss(BagEncoder(), learn_temperature=True)
    with torch.no_grad():
        loss.log_temperature.fill_(math.log(pushed_to))
    assert loss.temperature == pytest.approx(bound)
    loss([column(*ANCHORS), column(*POSITIVES)]).backward()
    assert loss.log_temperature.item() == pytest.approx(math.log(bound))
    assert loss.log_temperature.grad.item() != 0.0


def test_a_fixed_temperature_is_no_parameter():
    loss = InfoNCELoss(BagEncoder(), temperature=0.07)
    assert loss.temperature == 0.07
    assert loss.scale == pytest.approx(1 / 0.07)
    assert {name for name, _ in loss.named_parameters()} == {"model.embedding"}


# --- logs and model card -------------------------------------------------------------------------


def test_keeps_detached_metrics():
    loss = InfoNCELoss(BagEncoder(), learn_temperature=True, temperature=0.1)
    assert loss.last_metrics == {}
    same = [column(*ANCHORS), column(*ANCHORS)]
    loss(same)
    assert set(loss.last_metrics) == {"in_batch_accuracy", "temperature"}
    assert not any(value.requires_grad for value in loss.last_metrics.values())
    assert loss.last_metrics["in_batch_accuracy"].item() == 1.0
    assert loss.last_metrics["temperature"].item() == pytest.approx(0.1)


def test_config_and_citation_are_for_the_model_card():
    loss = InfoNCELoss(BagEncoder(), temperature=0.1, symmetric=True)
    config = loss.get_config_dict()
    assert config["temperature"] == 0.1
    assert config["symmetric"] is True
    assert InfoNCELoss(BagEncoder(), **config).get_config_dict() == config
    assert "1807.03748" in loss.citation


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, r"temperature must be a positive, finite number; got 0\.0"),
        ({"temperature": -1.0}, r"temperature must be a positive"),
        ({"temperature": math.nan}, r"temperature must be a positive"),
        ({"temperature": math.inf}, r"temperature must be a positive"),
        (
            {"temperature": 2.0, "learn_temperature": True},
            r"must start within \[min_temperature, max_temperature\] = \[0\.01, 1\.0\]; got .*2\.0",
        ),
        (
            {"learn_temperature": True, "min_temperature": 0.5, "max_temperature": 0.1},
            r"min_temperature and max_temperature must satisfy 0 < min < max; got 0\.5 and 0\.1",
        ),
        ({"similarity": "l2"}, r"similarity must be one of 'cosine', 'dot'; got 'l2'"),
        ({"negatives_from": "none"}, r"negatives_from must be one of 'all', 'same_domain'"),
        ({"exchange": "star"}, r"exchange must be one of 'gather', 'ring'; got 'star'"),
        ({"label_smoothing": 1.0}, r"label_smoothing must lie in \[0, 1\); got 1\.0"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        InfoNCELoss(BagEncoder(), **settings)


@pytest.mark.parametrize(
    ("columns", "settings", "message"),
    [
        ([], {}, r"at least two text columns .* got 0"),
        ([column([1])], {}, r"at least two text columns .* got 1"),
        (
            [column([1]), column([2])],
            {"negatives_from": "same_domain"},
            r"needs domain_ids in the features; got \['attention_mask', 'input_ids'\]",
        ),
        (
            [column([1], [2]), column([2], [3]), column([4], [5]), column([6])],
            {},
            r"negative columns must have one shape; got \[\(1,\), \(2,\)\]",
        ),
        ([column([1], [2]), column([2])], {"mask_duplicates": False}, r"b must have shape"),
    ],
)
def test_bad_batches_are_named(columns, settings, message):
    with pytest.raises(ValueError, match=message):
        InfoNCELoss(BagEncoder(), **settings)(columns, None)


# --- groups, halves, precision -------------------------------------------------------------------


def test_rows_of_one_group_are_each_others_positives():
    encoder = BagEncoder()
    columns = [column(*ANCHORS, group_ids=[5, 6, 5]), column(*POSITIVES)]
    a, b = embed(encoder, *columns)
    expected = ops.info_nce(a, b, scale=20.0, symmetric=False, group_ids=torch.tensor([5, 6, 5]))
    torch.testing.assert_close(InfoNCELoss(encoder)(columns), expected, rtol=1e-12, atol=0)
    assert not torch.isclose(expected, ops.info_nce(a, b, scale=20.0, symmetric=False))
    assert "group_ids" not in encoder.seen[-1]


def test_the_second_half_alone_is_the_loss():
    encoder = BagEncoder()
    columns = [column(*ANCHORS), column(*POSITIVES), column(*HARD[0])]
    loss = InfoNCELoss(encoder)
    embeddings = loss.embed_columns(columns)
    assert torch.equal(loss.from_embeddings(embeddings, columns, None), loss(columns))
    assert len(encoder.seen) == 6


@pytest.mark.parametrize("autocast", [False, True])
def test_low_precision_embeddings_have_float32_logits(autocast):
    embeddings = [e.bfloat16() for e in embed(BagEncoder(), column(*ANCHORS), column(*POSITIVES))]
    loss = InfoNCELoss(BagEncoder(), mask_duplicates=False)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        value = loss.from_embeddings(embeddings, [{}, {}], None)
    assert value.dtype == torch.float32
    exact = ops.info_nce(*(e.double() for e in embeddings), scale=20.0, symmetric=False)
    assert value.item() == pytest.approx(exact.item(), rel=1e-6)
