"""attention_block: against its formula in float64, by each backend."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from moe_fast import ops
from moe_fast.ops import native

from .helpers import DTYPES, assert_close, num_threads, property_test
from .test_add_norm import oracle as add_norm
from .test_attention_cpp import oracle as attention
from .test_attention_cpp import starts

BACKENDS = ["torch", "cpp"] if native.why_no_products("cpu") is None else ["torch"]
# Relative to the largest output, whose scale the norm makes one. float32: sums of D terms, a few
# units each. bf16: q, k and v, the attention's weights and its result are rounded (2e-3 each), the
# scores' roundings count in the exponent, and the norm divides by a sum of scale one.
EXACT = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 2e-3}


def problem(lengths, dim, heads, head_dim, dtype, wide=True, bias=True, rotary=False):
    tokens, inner = sum(lengths), heads * head_dim

    def draw(*shape, by=1.0):
        return (torch.randn(shape) * by).to(dtype)

    weights = [draw(inner, dim, by=dim**-0.5) for _ in range(3)]
    weights.append(draw(dim, inner, by=inner**-0.5))
    biases = [draw(inner) if bias else None for _ in range(3)] + [draw(dim) if bias else None]
    x = torch.randn(tokens, dim)
    residual = x if wide else x.to(dtype)
    norm = (1 + 0.3 * torch.randn(dim)).to(dtype), draw(dim) if bias else None
    rotation = None
    if rotary:
        angles = 3 * torch.rand(tokens, head_dim // 2).repeat(1, 2)
        rotation = angles.cos(), angles.sin()
    args = (x.to(dtype), residual, ops.Projections(*weights, *biases), *norm, starts(lengths))
    return args, {"heads": heads, "rotation": rotation, "eps": 1e-6}


def oracle(x, residual, projections, weight, bias, cu, *, heads, rotation, eps, window=None):
    p = [None if t is None else t.double() for t in projections]
    q, k, v = (F.linear(x.double(), p[i], p[i + 4]).unflatten(1, (heads, -1)) for i in range(3))
    if rotation is not None:
        turn = torch.polar(
            torch.ones(()).double(), rotation[1].double().atan2(rotation[0].double())
        )
        half = q.shape[-1] // 2

        def rotated(t):  # as complex numbers: element i with element i + half
            pairs = torch.complex(t[..., :half].contiguous(), t[..., half:].contiguous())
            pairs = pairs * turn[:, None, :half]
            return torch.cat([pairs.real, pairs.imag], -1)

        q, k = rotated(q), rotated(k)
    y = attention(q, k, v, cu, window=window).flatten(1)
    return add_norm(F.linear(y, p[3], p[7]), residual, weight, bias, eps)


def check(args, options, backend, slack=1.0):
    with torch.no_grad():
        out, exact = ops.attention_block(*args, **options, backend=backend)
    dtype = args[0].dtype
    want = oracle(*args, **options)
    assert out.dtype == dtype and exact.dtype == torch.float32
    assert_close(exact, want, slack * EXACT[dtype])
    assert_close(out, want, slack * (EXACT[dtype] + 4e-3 * (dtype != torch.float32)))


@pytest.mark.parametrize("backend", BACKENDS)
@property_test
@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 16, 63, 64, 65, 130]), min_size=1, max_size=6),
    shape=st.sampled_from([(8, 1, 8), (33, 3, 5), (32, 4, 8), (64, 2, 32), (48, 1, 130)]),
    dtype=st.sampled_from(DTYPES),
    wide=st.booleans(),
    bias=st.booleans(),
    rotary=st.booleans(),
    window=st.sampled_from([None, 0, 7]),
    threads=st.sampled_from([1, 3]),
    seed=st.integers(0, 999),
)
def test_equals_the_formula(
    backend, lengths, shape, dtype, wide, bias, rotary, window, threads, seed
):
    torch.manual_seed(seed)
    dim, heads, head_dim = shape
    rotary = rotary and head_dim % 2 == 0
    args, options = problem(lengths, dim, heads, head_dim, dtype, wide, bias, rotary)
    with num_threads(threads):
        check(args, options | {"window": window}, backend)


@pytest.mark.skipif("cpp" not in BACKENDS, reason="needs the native library")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "lengths", [[700], [2500, 3], [40] * 30], ids=["one text", "a long text", "many texts"]
)
def test_any_division_among_threads_gives_the_same_bits(lengths, dtype):
    """By texts, or step by step where a text is long or alone; weights of more than one panel."""
    args, options = problem(lengths, 416, 4, 104 if len(lengths) > 1 else 48, dtype)
    results = []
    for threads in (1, 3):
        with num_threads(threads), torch.no_grad():
            results.append(ops.attention_block(*args, **options, backend="cpp"))
    assert torch.equal(results[0].out, results[1].out)
    assert torch.equal(results[0].exact, results[1].exact)
    assert_close(results[0].exact, oracle(*args, **options), EXACT[dtype])


@pytest.mark.skipif("cpp" not in BACKENDS, reason="needs the native library")
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_read_in_each_call(dtype):
    """No copy of the weights outlives a call, whichever way they are changed."""
    args, options = problem([200, 90], 64, 4, 16, dtype)
    check(args, options, "cpp")
    args[2].query.data.mul_(-1)
    check(args, options, "cpp")


def test_nan_stays_in_its_text():
    args, options = problem([70, 70], 32, 2, 16, torch.bfloat16)
    args[0][3] = math.nan
    for backend in BACKENDS:
        out, _ = ops.attention_block(*args, **options, backend=backend)
        assert out[:70].isnan().any() and out[70:].isfinite().all()


def test_bad_input():
    args, options = problem([5, 4], 16, 2, 8, torch.float32)
    x, residual, projections, weight, bias, cu = args

    def refused(error, match, **changed):
        given_ = {"x": x, "residual": residual, "projections": projections, "cu_seqlens": cu}
        given_ |= {"norm_weight": weight, "norm_bias": bias, **options, **changed}
        with pytest.raises(error, match=match):
            ops.attention_block(**given_)

    refused(ValueError, "key must have shape", projections=projections._replace(key=x))
    refused(
        TypeError,
        "output must have the dtype",
        projections=projections._replace(output=projections.output.double()),
    )
    refused(ValueError, "multiple of heads = 3", heads=3)
    refused(ValueError, "cu_seqlens must rise", cu_seqlens=torch.tensor([0, 5, 4, 9]))
    refused(ValueError, "cosines must have shape", rotation=(x, x))
    refused(ValueError, "window must not be negative", window=-1)
    refused(TypeError, "heads must be an int", heads=2.0)
