"""ListwiseDistillationLoss: the columns, masks and metrics around the function."""

from __future__ import annotations

import pytest
import torch
from loss_checks import F64, assert_close
from toy_encoder import ANCHORS, HARD, POSITIVES, BagEncoder, column, embed

from moe_fast.losses import (
    CachedLoss,
    ContrastiveLearningPenaltyLoss,
    InfoNCELoss,
    ListwiseDistillationLoss,
)
from moe_fast.losses.functional import listwise_distillation

COLUMNS = [column(*texts) for texts in (ANCHORS, POSITIVES, *HARD)]
SCORES = torch.tensor([[3.0, 1.0, 0.5], [0.2, 0.1, -4.0], [1.0, 1.0, 1.0]], dtype=F64)


def expected(encoder, temperature=0.05, teacher_temperature=1.0, columns=COLUMNS, **masks):
    a, *passages = embed(encoder, *columns[:4])
    teacher = SCORES / teacher_temperature
    return listwise_distillation(
        a, torch.stack(passages, 1), teacher, scale=1 / temperature, **masks
    )


def test_is_the_function_of_its_columns():
    encoder = BagEncoder()
    loss = ListwiseDistillationLoss(
        encoder, temperature=0.7, teacher_temperature=2.0, coefficient=0.5, mask_duplicates=False
    )
    want = expected(encoder, 0.7, 2.0)
    value = loss(COLUMNS, SCORES)
    assert_close(value, 0.5 * want)
    assert_close(loss.last_metrics["distillation"], want.detach())
    ours, theirs = (torch.autograd.grad(v, encoder.embedding)[0] for v in (value, 0.5 * want))
    assert_close(ours, theirs)
    config = loss.get_config_dict()
    assert config["teacher_temperature"] == 2.0 and config["negatives_from"] == "all"
    assert "2402.03216" in loss.citation


def test_copies_of_a_text_are_no_candidates():
    """The second row's positive is the first row's hard negative."""
    encoder = BagEncoder()
    copied = [COLUMNS[0], dict(COLUMNS[1]), *COLUMNS[2:]]
    texts = [list(t) for t in POSITIVES]
    texts[1] = list(HARD[0][0])
    copied[1] = column(*texts)
    masked, unmasked = (
        ListwiseDistillationLoss(encoder, mask_duplicates=m)(copied, SCORES) for m in (True, False)
    )
    ids = torch.arange(9).view(3, 3)
    ids[1, 0] = ids[0, 1]
    row_ids = torch.tensor([20, 21, 22])
    assert_close(masked, expected(encoder, columns=copied, row_ids=row_ids, col_ids=ids))
    assert_close(unmasked, expected(encoder, columns=copied))
    assert abs(masked - unmasked) > 1e-6


def test_domains():
    encoder = BagEncoder()
    domain_ids = torch.tensor([0, 1, 0])
    columns = [{**c, "domain_ids": domain_ids} for c in COLUMNS]
    loss = ListwiseDistillationLoss(encoder, negatives_from="same_domain", mask_duplicates=False)
    assert_close(loss(columns, SCORES), expected(encoder, domain_ids=domain_ids))
    with pytest.raises(ValueError, match="needs domain_ids"):
        loss(COLUMNS, SCORES)
    with pytest.raises(ValueError, match="negatives_from must be one of"):
        ListwiseDistillationLoss(encoder, negatives_from="none")


def test_beside_other_losses_and_in_a_cache():
    encoder = BagEncoder()
    total = ListwiseDistillationLoss(InfoNCELoss(encoder), mask_duplicates=False)
    want = InfoNCELoss(encoder)(COLUMNS) + expected(encoder)
    assert_close(total(COLUMNS, SCORES), want)
    columns = [*COLUMNS, column([31], [32], [33]), column([34], [35], [36])]
    inner = ContrastiveLearningPenaltyLoss(encoder, queries_per_negative=1)
    beside = ListwiseDistillationLoss(inner, mask_duplicates=False)(columns, SCORES)
    assert_close(beside, inner(columns) + expected(encoder))
    whole = torch.autograd.grad(total(COLUMNS, SCORES), encoder.embedding)[0]
    CachedLoss(total, tokens_per_chunk=8)(COLUMNS, SCORES).backward()
    assert_close(encoder.embedding.grad, whole)
