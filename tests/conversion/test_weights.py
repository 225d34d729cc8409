"""The mean of weights: exact where they are equal, a float64 mean rounded once where not."""

import torch

from moe_fast.conversion.weights import mean_of


def test_equal_tensors_give_themselves():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        value = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        value = value.to(dtype)
        for count in (1, 2, 3, 7):
            assert torch.equal(mean_of([value] * count), value)


def test_rounded_once():
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(200, generator=generator).bfloat16() for _ in range(5)]
    want = torch.stack([v.double() for v in values]).mean(0).bfloat16()
    assert torch.equal(mean_of(values), want)


def test_the_inputs_are_untouched():
    values = [torch.zeros(3), torch.ones(3)]
    mean_of(values)
    mean_of(values[:1]).add_(1)
    assert torch.equal(values[0], torch.zeros(3)) and torch.equal(values[1], torch.ones(3))
