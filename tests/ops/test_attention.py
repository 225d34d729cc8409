"""varlen_attention: against a loop over tokens, and how the kernels behind it are called."""

from __future__ import annotations

import inspect
import sys
from functools import partial
from itertools import pairwise
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moe_fast import ops
from moe_fast.ops.varlen_attention import maintained as attention
from moe_fast.ops.varlen_attention.maintained import (
    attention_kernel,
    describe_attention,
    equal_runs,
)

from .helpers import DTYPES, FLOAT64, TOLERANCES, assert_close, assert_says, property_test

LENGTHS = [
    [5],
    [1],
    [3, 3, 3],
    [1, 1, 1, 1],
    [7, 2, 2, 9, 2],
    [0, 4, 0, 0, 4, 3, 0],
]


def starts(lengths: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=dtype)


def problem(lengths: list[int], dtype: torch.dtype = torch.float64, heads: int = 2, dim: int = 4):
    return [torch.randn(sum(lengths), heads, dim, dtype=torch.float64).to(dtype) for _ in range(3)]


def oracle(q: Tensor, k: Tensor, v: Tensor, cu: list[int], scale: float, window=None) -> Tensor:
    """One token at a time, in float64."""
    rows = []
    for first, last in pairwise(cu):
        for i in range(first, last):
            low, high = first, last
            if window is not None:
                low, high = max(first, i - window), min(last, i + window + 1)
            scores = (k[low:high] * q[i]).sum(-1) * scale  # [keys, heads]
            p = torch.exp(scores - scores.max(0).values)
            rows.append(((p / p.sum(0))[..., None] * v[low:high]).sum(0))
    return torch.stack(rows) if rows else q * 0


def with_gradients(run, tensors, upstream):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    y = run(*leaves)
    return [y, *torch.autograd.grad(y, leaves, upstream)]


@pytest.mark.parametrize("window", [None, 0, 2, 50])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_equals_a_loop_over_tokens(lengths, window):
    tensors, cu = problem(lengths), starts(lengths)
    upstream = torch.randn_like(tensors[0])
    got = with_gradients(
        lambda q, k, v: ops.varlen_attention(q, k, v, cu, scale=0.7, window=window),
        tensors,
        upstream,
    )
    want = with_gradients(
        lambda q, k, v: oracle(q, k, v, cu.tolist(), 0.7, window), tensors, upstream
    )
    for name, g, w in zip(("y", "dq", "dk", "dv"), got, want, strict=True):
        # All of unit scale; a token alone has a gradient dq of 0, which no relative error measures.
        assert (g - w).abs().max() <= FLOAT64, name


@property_test
@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=7),
    heads=st.integers(1, 3),
    dim=st.sampled_from([1, 3, 8]),
    window=st.one_of(st.none(), st.integers(0, 6)),
)
def test_any_lengths(lengths, heads, dim, window):
    q, k, v = problem(lengths, heads=heads, dim=dim)
    cu = starts(lengths, torch.int64)
    got = ops.varlen_attention(q, k, v, cu, window=window)
    assert_close(got, oracle(q, k, v, cu.tolist(), dim**-0.5, window))


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_other_dtypes(dtype, window):
    lengths = [40, 40, 3, 17]
    tensors, cu = problem(lengths, dtype, dim=16), starts(lengths)
    upstream = torch.randn_like(tensors[0])
    got = with_gradients(lambda *t: ops.varlen_attention(*t, cu, window=window), tensors, upstream)
    want = with_gradients(
        lambda *t: oracle(*t, cu.tolist(), 0.25, window),
        [t.double() for t in tensors],
        upstream.double(),
    )
    for g, w in zip(got, want, strict=True):
        assert g.dtype == dtype
        # A gradient in 16 bits passes through p, stored in 16 bits, twice.
        assert_close(g, w, 2 * TOLERANCES[dtype])


def test_a_window_over_many_blocks_of_queries(monkeypatch):
    monkeypatch.setattr(attention, "_QUERIES_AT_ONCE", 4)
    lengths = [11, 11, 6]
    (q, k, v), cu = problem(lengths), starts(lengths)
    got = ops.varlen_attention(q, k, v, cu, scale=1.0, window=3)
    assert_close(got, oracle(q, k, v, cu.tolist(), 1.0, 3))


def test_inputs_may_be_views():
    lengths = [3, 3, 2]
    packed = torch.randn(1, 2, 8, 3 * 4, dtype=torch.float64)  # as a fused projection gives them
    q, k, v = (t[0].transpose(0, 1) for t in packed.split(4, dim=-1))
    got = ops.varlen_attention(q, k, v, starts(lengths))
    assert_close(got, oracle(q, k, v, starts(lengths).tolist(), 0.5))


def test_a_sequence_does_not_see_the_others():
    q, k, v = problem([4, 6, 3])
    cu = starts([4, 6, 3])
    before = ops.varlen_attention(q, k, v, cu)
    k[4:10], v[4:10] = float("nan"), float("inf")
    after = ops.varlen_attention(q, k, v, cu)
    assert torch.equal(after[:4], before[:4]) and torch.equal(after[10:], before[10:])


def test_no_tokens_keep_shape_and_graph():
    q = torch.randn(0, 2, 4, requires_grad=True)
    y = ops.varlen_attention(q, q, q, torch.tensor([0]))
    assert y.shape == (0, 2, 4)
    y.sum().backward()
    assert q.grad is not None


@pytest.mark.parametrize("window", [None, 2])
def test_dropout_drops_weights_and_keeps_their_mean(window):
    """Dropping with p = 0.5 and doubling what is left: y is unbiased, and each call differs."""
    lengths = [6, 6]
    (q, k, v), cu = problem(lengths, dim=8), starts(lengths)
    attend = partial(ops.varlen_attention, q, k, v, cu, window=window)
    exact = attend()
    draws = torch.stack([attend(dropout=0.5) for _ in range(2000)])
    assert not torch.equal(draws[0], draws[1])
    # Each of 6 weights (sum 1) times v of unit scale: a standard deviation below 1.5 a draw.
    assert (draws.mean(0) - exact).abs().max() < 6 * 1.5 / 2000**0.5
    assert torch.equal(attend(dropout=0.0), exact)


def test_compiled_for_any_lengths():
    torch._dynamo.reset()
    compiled = torch.compile(ops.varlen_attention, backend="aot_eager")
    for lengths in ([3, 4], [5, 1, 1], [2]):
        tensors, cu = problem(lengths), starts(lengths)
        assert_close(compiled(*tensors, cu), oracle(*tensors, cu.tolist(), 0.5))


def test_runs_of_equal_length():
    assert list(equal_runs([0, 3, 6, 6, 9, 11])) == [(3, 3), (1, 2)]
    assert list(equal_runs([0])) == list(equal_runs([0, 0, 0])) == []


def test_bad_input_is_named():
    (q, k, v), cu = problem([3, 2]), starts([3, 2])
    cases = [
        ((q[0], k, v, cu), {}, ValueError, ["query", "[T, heads, head_dim]", "[2, 4]"]),
        ((q, k[:4], v, cu), {}, ValueError, ["key", "[5, 2, 4]", "[4, 2, 4]"]),
        ((q, k, v.float(), cu), {}, TypeError, ["value", "float64", "float32"]),
        ((q, k, v, cu.double()), {}, TypeError, ["cu_seqlens", "int64, int32", "float64"]),
        ((q, k, v, cu[:2]), {}, ValueError, ["cu_seqlens", "from 0 to T = 5", "[0, 3]"]),
        ((q, k, v, cu.flip(0)), {}, ValueError, ["cu_seqlens", "[5, 3, 0]"]),
        ((q, k, v, cu), {"window": -1}, ValueError, ["window", "-1"]),
    ]
    for arguments, options, kind, fragments in cases:
        with pytest.raises(kind) as error:
            ops.varlen_attention(*arguments, **options)
        assert_says(error, *fragments)


# --- kernels that need a GPU: when they are chosen, and how they are called ----------------------


@pytest.mark.parametrize(
    ("device", "dtype", "options", "with_xformers", "without"),
    [
        ("cpu", torch.bfloat16, {}, "sdpa", "sdpa"),
        ("cuda", torch.bfloat16, {}, "varlen_attn", "varlen_attn"),
        ("cuda", torch.float16, {"window": 3}, "varlen_attn", "varlen_attn"),
        ("cuda", torch.bfloat16, {"dropout": 0.1}, "xformers", "sdpa"),
        ("cuda", torch.float32, {}, "xformers", "sdpa"),
        ("cuda", torch.float32, {"window": 3}, "sdpa", "sdpa"),
        ("cuda", torch.float64, {}, "sdpa", "sdpa"),
        ("cuda", torch.bfloat16, {"head_dim": 12}, "xformers", "sdpa"),
        ("cuda", torch.bfloat16, {"head_dim": 264}, "xformers", "sdpa"),
    ],
)
def test_the_kernel_by_capability(monkeypatch, device, dtype, options, with_xformers, without):
    monkeypatch.setattr(attention, "_has_varlen", lambda: True)
    for installed, expected in ((True, with_xformers), (False, without)):
        monkeypatch.setattr(attention, "_has", lambda _, there=installed: there)
        assert attention_kernel(device, dtype, **options) == expected


def test_people_are_told(monkeypatch):
    assert "equal lengths" in describe_attention("cpu")
    monkeypatch.setattr(attention, "_has", lambda _: False)
    said = {}
    for has_varlen in (True, False):
        monkeypatch.setattr(attention, "_has_varlen", lambda has=has_varlen: has)
        said[has_varlen] = describe_attention("cuda")
    assert "varlen_attn (float16" in said[True] and "xformers is not installed" in said[True]
    assert "no varlen_attn" in said[False]


def test_varlen_attn_is_called_as_torch_defines_it(monkeypatch):
    varlen = pytest.importorskip("torch.nn.attention.varlen", reason="torch without varlen_attn")
    signature = inspect.signature(varlen.varlen_attn)

    def stand_in(*args, **kwargs):
        a = signature.bind(*args, **kwargs).arguments
        assert a["cu_seq_q"].dtype == a["cu_seq_k"].dtype == torch.int32
        assert a["max_q"] == a["max_k"] == 4
        assert a["window_size"] == (2, 2)
        cu = a["cu_seq_q"].tolist()
        return oracle(a["query"], a["key"], a["value"], cu, a["scale"], a["window_size"][0])

    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    monkeypatch.setattr(attention, "attention_kernel", lambda *_: "varlen_attn")
    (q, k, v), cu = problem([4, 1]), starts([4, 1], torch.int64)
    for longest in (None, 4):
        got = ops.varlen_attention(q, k, v, cu, scale=0.3, window=2, max_length=longest)
        assert_close(got, oracle(q, k, v, cu.tolist(), 0.3, 2))


def test_xformers_is_called_as_its_documentation_says(monkeypatch):
    """memory_efficient_attention takes [1, T, heads, dim] and a mask made of lengths."""

    def stand_in(query, key, value, attn_bias, p, scale):
        assert p == 0.0
        pieces = [
            F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in qkv), scale=scale)
            for qkv in zip(*(t.split(attn_bias, 1) for t in (query, key, value)), strict=True)
        ]
        return torch.cat([y.transpose(1, 2) for y in pieces], 1)

    fake = ModuleType("xformers.ops")
    mask = SimpleNamespace(from_seqlens=lambda lengths: lengths)
    fake.fmha = SimpleNamespace(attn_bias=SimpleNamespace(BlockDiagonalMask=mask))
    fake.memory_efficient_attention = stand_in
    monkeypatch.setitem(sys.modules, "xformers", ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", fake)
    monkeypatch.setattr(attention, "attention_kernel", lambda *_: "xformers")
    (q, k, v), cu = problem([4, 1, 3]), starts([4, 1, 3])
    assert_close(ops.varlen_attention(q, k, v, cu), oracle(q, k, v, cu.tolist(), 0.5))
