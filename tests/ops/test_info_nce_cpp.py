"""``info_nce`` on the ``cpp`` backend: every option, in float32, against the oracle in float64.

``test_info_nce_tiled.py`` has the sizes of batches, the accuracy and 16-bit embeddings.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import moe_fast
from moe_fast import ops
from moe_fast.ops.info_nce import cpp

from . import oracle
from .helpers import (
    assert_close,
    assert_gradients_close,
    gradients,
    need_native_library,
    num_threads,
    opcheck_calls,
    property_test,
)
from .test_info_nce import OPTIONS, B, G, problem

need_native_library()

F32 = torch.float32
ONE = torch.ones(())


@pytest.fixture(autouse=True)
def backend():
    with moe_fast.use_backend("cpp"):
        yield


def options_of(name: str, rows: int, candidates: int) -> dict:
    kwargs = OPTIONS[name](rows, candidates)
    if "weights" in kwargs:
        kwargs["weights"] = kwargs["weights"].float()
    return kwargs


def assert_same(inputs: dict, **kwargs) -> None:
    """The loss, every gradient and the statistics."""
    loss, stats = ops.info_nce(**inputs, **kwargs, return_stats=True)
    expected = oracle.info_nce(**inputs, **kwargs)
    assert loss.dtype == F32
    if expected.loss < 1e-5:  # the positives are alone, or nearly
        assert abs(loss - expected.loss) < 1e-5
        return
    assert_close(loss, expected.loss, 2e-5, "loss")
    assert_close(stats.row_loss, expected.row_loss, 2e-5, "row_loss")
    wanted = gradients([expected.loss], [ONE], inputs)
    assert_gradients_close(gradients([loss], [ONE], inputs), wanted, 1e-4)
    assert torch.equal(stats.rank, expected.rank)
    assert math.isclose(float(stats.accuracy), expected.accuracy, rel_tol=1e-6)


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("per_row", [0, G])
@pytest.mark.parametrize("options", OPTIONS)
def test_values_and_gradients_equal_the_oracle(options, per_row, symmetric, similarity):
    kwargs = options_of(options, B, B + B * per_row)
    inputs = problem(per_row=per_row, dtype=F32, scale=5.0 if similarity == "cosine" else 0.7)
    assert_same(inputs, symmetric=symmetric, similarity=similarity, **kwargs)


@property_test
@given(
    num_rows=st.sampled_from([1, 2, 3, 15, 16, 17]),
    per_row=st.sampled_from([0, 1, 3]),
    symmetric=st.booleans(),
    options=st.sampled_from(list(OPTIONS)),
    scale=st.sampled_from([0.05, 1.0, 20.0]),
    threads=st.sampled_from([1, 3]),
    seed=st.integers(0, 999),
)
def test_any_shape(num_rows, per_row, symmetric, options, scale, threads, seed):
    assume(num_rows > 1 or per_row)
    torch.manual_seed(seed)
    kwargs = options_of(options, num_rows, num_rows + num_rows * per_row)
    inputs = problem(num_rows=num_rows, per_row=per_row, dtype=F32, scale=scale)
    with num_threads(threads):
        assert_same(inputs, symmetric=symmetric, **kwargs)


def test_a_larger_batch_runs_in_tiles(monkeypatch):
    inputs = problem(dtype=F32)
    here = ops.info_nce(**inputs)
    monkeypatch.setattr(cpp, "MOST_LOGITS", B * (B + B * G) - 1)
    tiled = ops.info_nce(**inputs)
    assert here.grad_fn.name() != tiled.grad_fn.name()
    assert_close(tiled, here, 1e-6)


def test_a_zero_vector_has_no_direction():
    inputs = problem(dtype=F32)
    with torch.no_grad():
        inputs["a"][2] = 0
        inputs["negatives"][3] = 0
    loss, expected = (ops.info_nce(**inputs, backend=b) for b in ("cpp", "torch"))
    assert_close(loss, expected, 1e-6)
    actual, wanted = (gradients([o], [ONE], inputs) for o in (loss, expected))
    assert_gradients_close(actual, wanted, 1e-5)
    assert (actual["a"][2] == 0).all()
    assert (actual["negatives"][3] == 0).all()


def test_the_same_bits_in_every_run():
    inputs = problem(num_rows=200, dtype=F32)
    losses = [ops.info_nce(**inputs) for _ in range(2)]
    first, second = ([loss, *gradients([loss], [ONE], inputs).values()] for loss in losses)
    assert all(torch.equal(p, q) for p, q in zip(first, second, strict=True))


def test_views_and_int32_ids():
    inputs = problem(dtype=F32, per_row=0)
    strided = torch.stack([inputs["a"].detach()] * 2, 2)[..., 0].requires_grad_()
    ids = torch.arange(B, dtype=torch.int32) % 4
    kwargs = dict(row_ids=ids, col_ids=ids + 9)
    loss = ops.info_nce(**inputs | {"a": strided}, **kwargs)
    assert_close(loss, oracle.info_nce(**inputs, **kwargs).loss, 1e-5)


@pytest.mark.parametrize("symmetric", [True, False])
def test_opcheck(symmetric):
    inputs, kwargs = problem(dtype=F32), options_of("everything", B, B + B * G)

    def call():
        ops.info_nce(**inputs, symmetric=symmetric, **kwargs).backward()

    opcheck_calls(call, {"info_nce_cpp", "info_nce_cpp_backward"})
