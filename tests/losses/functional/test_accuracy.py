"""in_batch_accuracy: who counts as a better candidate."""

import pytest
import torch

from moe_fast.losses.functional.accuracy import in_batch_accuracy

NAN = float("nan")


@pytest.mark.parametrize(
    ("second_row", "better"),
    [
        ([0.5, 1.0, 0.0], False),
        ([1.0, 1.0, 0.0], True),  # a tie: a collapsed encoder does not look perfect
        ([0.5, 1.0, 2.0], True),
        ([0.5, 1.0, NAN], True),
        ([0.5, NAN, 0.0], True),
    ],
)
def test_ties_and_nan_count_against_the_row(second_row, better):
    logits = torch.tensor([[1.0, 0.0, 0.0], second_row])
    positive = torch.eye(2, 3, dtype=torch.bool)
    accuracy = in_batch_accuracy(logits, positive, torch.ones(2, 3, dtype=torch.bool))
    assert accuracy.item() == (0.5 if better else 1.0)


def test_masked_candidates_and_other_positives_do_not_count():
    logits = torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, 0.0]])
    positive = torch.eye(2, 3, dtype=torch.bool)
    positive[0, 1] = True
    candidate = torch.ones(2, 3, dtype=torch.bool)
    assert in_batch_accuracy(logits, positive, candidate).item() == 0.5
    candidate[0, 2] = False
    assert in_batch_accuracy(logits, positive, candidate).item() == 1.0
