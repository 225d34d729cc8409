"""Fixtures over the small models of tests/models/tiny.py."""

import pytest
import torch

from tests.models.tiny import CLS, NAMES, build


@pytest.fixture(params=NAMES)
def dense(request):
    return build(request.param)


@pytest.fixture
def bert():
    return build("bert")


@pytest.fixture
def batch():
    """Three texts of 9, 5 and 2 tokens, each starting with [CLS], padded to 9."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(5, 60, (3, 9), generator=generator)
    input_ids[:, 0] = CLS
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 5:] = 0
    attention_mask[2, 2:] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}
