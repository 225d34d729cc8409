"""info_nce refuses what does not fit, naming the argument, what was given and what is allowed."""

from __future__ import annotations

import math

import pytest
import torch

import moe_fast
from moe_fast import ops

from .helpers import assert_says
from .test_info_nce import BACKENDS, F64, B, D, G


@pytest.fixture(autouse=True, params=BACKENDS)
def backend(request):
    with moe_fast.use_backend(request.param):
        yield


def with_value(rows: int, row: int, value: float) -> torch.Tensor:
    x = torch.randn(rows, D)
    x[row, 2] = value
    return x


ROW, COL = torch.arange(B), torch.arange(B + B * G)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(a=torch.randn(D)), ["a", "[5]", "[B, d]"]),
        (
            dict(a=torch.randn(1, D), b=torch.randn(1, D), negatives=None),
            ["needs negatives", "B = 1", "drop a last batch"],
        ),
        (dict(a=with_value(B, 3, math.nan)), ["a must be finite", "row 3"]),
        (dict(b=with_value(B, 5, math.inf)), ["b must be finite", "row 5"]),
        (dict(negatives=with_value(B * G, 10, -math.inf)), ["negatives", "finite", "row 10"]),
        (
            dict(a=torch.zeros(0, D), b=torch.zeros(0, D), negatives=None),
            ["a ", "at least one row"],
        ),
        (dict(a=torch.ones(B, D).long()), ["a", "int64", "float"]),
        (dict(b=torch.randn(B, D + 1)), ["b", "[6, 6]", "[6, 5]"]),
        (dict(b=torch.randn(B + 1, D)), ["b", "[7, 5]", "[6, 5]"]),
        (dict(b=torch.randn(B, D, dtype=F64)), ["b", "float64", "float32"]),
        (dict(b=torch.randn(B, D, device="meta")), ["b", "meta", "cpu"]),
        (dict(negatives=torch.randn(B + 1, D)), ["negatives", "7 rows", "B = 6"]),
        (dict(negatives=torch.randn(B, D + 1)), ["negatives", "[6, 6]", "5"]),
        (dict(negatives=torch.randn(B, D).bfloat16()), ["negatives", "bfloat16", "float32"]),
        (dict(negatives=torch.randn(B, D, device="meta")), ["negatives", "meta", "cpu"]),
        (dict(a=[[1.0]]), ["a ", "tensor", "list"]),
        (dict(a=with_value(B, 4, 1e25)), ["a ", "8.2e+18", "row 4", "1.0e+25"]),
        (dict(b=with_value(B, 1, -1e25)), ["b ", "8.2e+18", "row 1", "1.0e+25"]),
        (dict(scale="20"), ["scale", "number", "'20'"]),
        (dict(scale=0.0), ["scale", "0.0", "greater than 0"]),
        (dict(scale=-2.0), ["scale", "-2.0", "greater than 0"]),
        (dict(scale=float("nan")), ["scale", "nan", "greater than 0"]),
        (dict(scale=torch.ones(2)), ["scale", "[2]", "one element"]),
        (dict(scale=torch.tensor(-2.0)), ["scale", "-2.0", "greater than 0"]),
        (dict(similarity="euclidean"), ["similarity", "euclidean", "cosine", "dot"]),
        (dict(row_ids=ROW), ["row_ids", "col_ids", "together"]),
        (dict(col_ids=COL), ["row_ids", "col_ids", "together"]),
        (dict(row_ids=ROW[:4], col_ids=COL), ["row_ids", "[4]", "[6]"]),
        (dict(row_ids=ROW.float(), col_ids=COL), ["row_ids", "float32", "int64"]),
        (dict(row_ids=ROW.to("meta"), col_ids=COL), ["row_ids", "meta", "cpu"]),
        (dict(row_ids=ROW, col_ids=ROW), ["col_ids", "[6]", "[18]"]),
        (dict(row_ids=ROW, col_ids=COL.double()), ["col_ids", "float64", "int64"]),
        (dict(domain_ids=COL), ["domain_ids", "[18]", "[6]"]),
        (dict(domain_ids=ROW.bool()), ["domain_ids", "bool", "int64"]),
        (dict(group_ids=ROW[None]), ["group_ids", "[1, 6]", "[6]"]),
        (dict(group_ids=ROW.float()), ["group_ids", "float32", "int64"]),
        (dict(weights=torch.rand(4)), ["weights", "[4]", "[6]"]),
        (dict(weights=ROW), ["weights", "int64", "float"]),
        (dict(weights=torch.arange(B) - 1.0), ["weights", "-1", "0"]),
        (dict(weights=torch.tensor([1.0] * 5 + [math.inf])), ["weights", "finite", "inf"]),
        (dict(weights=torch.tensor([1.0] * 5 + [math.nan])), ["weights", "finite", "nan"]),
        (dict(weights=torch.zeros(B)), ["weights", "all", "0"]),
        (dict(label_smoothing=1.0), ["label_smoothing", "1.0", "[0, 1)"]),
        (dict(label_smoothing=-0.1), ["label_smoothing", "-0.1", "[0, 1)"]),
        (dict(backend="cuda"), ["backend", "cuda", "auto", "torch"]),
    ],
)
def test_bad_input(change, says):
    good = dict(
        a=torch.randn(B, D), b=torch.randn(B, D), negatives=torch.randn(B * G, D), scale=20.0
    )
    with pytest.raises((ValueError, TypeError)) as error:
        ops.info_nce(**good | change)
    assert_says(error, *says)
