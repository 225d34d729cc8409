"""Tile sizes: the heuristic, and what fits shared memory."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.ops.helpers import assert_says

pytest.importorskip("triton", reason="triton is not installed")

from moe_fast.triton_ops import config as c


@pytest.mark.parametrize("target", [*c.SHARED_MEMORY, "sm_86", "sm_120", "interpreter"])
@pytest.mark.parametrize("n", [768, 1019])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_heuristic_fits_every_target(target, dtype, n):
    limit = c.SHARED_MEMORY.get(target, 101_376)
    for kernel, rows in itertools.product(c.KERNELS, (1, 63, 64, 8192)):
        found = c.heuristic(kernel, dtype, target, n, 768, rows)
        assert found.shared_memory(dtype.itemsize, c.products_of(kernel)) <= limit


def test_sm_103_gets_the_tiles_and_the_copies_of_sm_100():
    for kernel in c.KERNELS:
        ours = c.heuristic(kernel, torch.bfloat16, "sm_103", 3072, 768, 8192)
        assert ours == c.heuristic(kernel, torch.bfloat16, "sm_100", 3072, 768, 8192)
    copies = c.Config(descriptors=True)
    assert c.why_not(copies, "up", torch.bfloat16, "sm_103", 3072, 768) is None


@pytest.mark.parametrize("kernel", ["up", "gated_up", "grad_hidden", "gated_grad_hidden"])
def test_two_programs_fit_an_h100_where_the_epilogue_is_long(kernel):
    found = c.heuristic(kernel, torch.bfloat16, "sm_90", 3072, 768, 8192)
    assert 2 * 32 * found.num_warps * found.maxnreg <= 65_536
    assert 2 * (found.shared_memory(2, c.products_of(kernel)) + 1024) <= 233_472
    assert "maxnreg" in c.why_not(found, kernel, torch.bfloat16, "gfx942", 3072, 768)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_few_rows_per_expert_get_tiles_of_fewer(target):
    for kernel in c.KERNELS:
        many = c.heuristic(kernel, torch.bfloat16, target, 768, 3072, 64)
        few = c.heuristic(kernel, torch.bfloat16, target, 768, 3072, 63)
        # grad_weight's block_m is of columns: its rows are block_k.
        assert (many.block_m, few.block_m) == (128, 128 if kernel == "grad_weight" else 64)
        assert few.block_n == many.block_n


def test_fit_makes_the_pipeline_shallower_then_the_tile_thinner():
    big = c.Config(128, 128, 64, num_stages=4)
    stage = 64 * 256 * 2
    assert big.shared_memory(2) == 4 * stage
    assert c.fit(big, 2, 1, 4 * stage) == big
    assert c.fit(big, 2, 1, 4 * stage - 1).num_stages == 3
    thin = c.fit(big, 2, 1, 2 * stage - 1)
    assert (thin.num_stages, thin.block_k) == (2, 32)
    with pytest.raises(ValueError) as error:
        c.fit(big, 2, 1, 1000)
    assert_says(error, "shared memory", 1000)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(block_m=24), ["block_m", "power of two", 24]),
        (dict(block_k=8), ["block_k", 16, 8]),
        (dict(num_warps=3), ["num_warps", 3]),
        (dict(num_stages=0), ["num_stages", 0]),
        (dict(descriptors="no"), ["descriptors", "true or false", "no"]),
        (dict(implementation="cublas"), ["implementation", "triton, grouped_mm", "cublas"]),
        (dict(parts=3), ["parts", "1, 2, 4 or 8", 3]),
        (dict(maxnreg=300), ["maxnreg", "32 to 255", 300]),
    ],
)
def test_bad_configurations(change, says):
    with pytest.raises(ValueError) as error:
        c.Config(**change)
    assert_says(error, *says)


def test_an_unknown_kernel_is_named():
    with pytest.raises(ValueError) as error:
        c.heuristic("down", torch.float32, "sm_90", 16, 16)
    assert_says(error, "down", *c.KERNELS)


@pytest.mark.parametrize(
    ("kernel", "dtype", "target", "n", "says"),
    [
        ("linear", torch.bfloat16, "sm_90", 768, None),
        ("grad_weight", torch.bfloat16, "sm_100", 8, None),
        ("linear", torch.float32, "interpreter", 4, None),
        ("up", torch.bfloat16, "sm_90", 768, "linear_transposed"),
        ("linear", torch.bfloat16, "sm_90", 764, "multiples of 16 bytes"),
        ("linear", torch.float16, "sm_90", 768, "bfloat16"),
        ("linear", torch.bfloat16, "sm_80", 768, "sm_80"),
        ("linear", torch.bfloat16, "gfx942", 768, "gfx942"),
    ],
)
def test_where_grouped_mm_can_be_named(kernel, dtype, target, n, says):
    reason = c.why_not(c.Config(implementation="grouped_mm"), kernel, dtype, target, n, 64)
    assert reason is None if says is None else says in reason


@pytest.mark.parametrize(
    ("kernel", "dtype", "target", "n", "says"),
    [
        ("gated_up", torch.bfloat16, "sm_90", 768, None),
        ("linear_transposed", torch.float32, "sm_100", 4, None),
        ("linear", torch.bfloat16, "interpreter", 8, None),
        ("grad_hidden", torch.bfloat16, "sm_90", 768, "gated_up"),
        ("up", torch.bfloat16, "sm_80", 768, "sm_80"),
        ("up", torch.bfloat16, "gfx942", 768, "gfx942"),
        ("up", torch.bfloat16, "sm_90", 764, "multiples of 16 bytes"),
    ],
)
def test_where_descriptors_can_be_named(kernel, dtype, target, n, says):
    reason = c.why_not(c.Config(descriptors=True), kernel, dtype, target, n, 64)
    assert reason is None if says is None else says in reason
