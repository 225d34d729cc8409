"""varlen_attention's backend ``cpp``: against attention in float64, one sequence at a time."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moe_fast import ops

from .helpers import (
    DTYPES,
    RecordOps,
    assert_close,
    assert_says,
    need_native_library,
    num_threads,
    property_test,
)

need_native_library()
BF16 = torch.bfloat16

# Against float64 on the same rounded inputs, relative to the largest output. float32: scores of a
# few units with rounding 6e-8 each, summed over head_dim. bf16: the weights and the result are
# rounded (2e-3 each); where many values average out, the result is smaller than they are, and the
# weights' roundings, which average out too, count up to twice. float16: computed in float32, the
# result rounded (5e-4).
TOLERANCES = {torch.float32: 5e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}


def starts(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()])


def problem(lengths, dtype=torch.float32, heads=2, dim=8) -> tuple[list[Tensor], Tensor]:
    return [torch.randn(sum(lengths), heads, dim).to(dtype) for _ in range(3)], starts(lengths)


def oracle(q, k, v, cu, scale=None, window=None) -> Tensor:
    """softmax(scale Q K^T) V of each sequence in float64, what is out of sight at -inf."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    parts = []
    for first, last in pairwise(cu.tolist()):
        a, b, c = (t[first:last].double().transpose(0, 1) for t in (q, k, v))
        scores = a @ b.mT * scale
        if window is not None:
            places = torch.arange(last - first)
            scores[:, (places[:, None] - places).abs() > window] = -torch.inf
        parts.append((torch.softmax(scores, -1) @ c).transpose(0, 1))
    return torch.cat(parts) if parts else q.double()


def cpp(q, k, v, cu, **options) -> Tensor:
    return ops.varlen_attention(q, k, v, cu, backend="cpp", **options)


def check(tensors, cu, slack: float = 1.0, **options) -> None:
    got = cpp(*tensors, cu, **options)
    assert got.dtype == tensors[0].dtype and got.is_contiguous()
    assert_close(got, oracle(*tensors, cu, **options), slack * TOLERANCES[got.dtype])


# -------------------------------------------------------------------------------------- any shape


@property_test
@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 13, 16, 17, 48, 49, 97]), min_size=1, max_size=6),
    heads=st.integers(1, 3),
    dim=st.sampled_from([1, 2, 3, 8, 16, 31, 32, 64, 130]),
    dtype=st.sampled_from(DTYPES),
    window=st.one_of(st.none(), st.integers(0, 60)),
    scale=st.sampled_from([None, 0.0, 0.3, -0.3]),
    threads=st.sampled_from([1, 3]),
    seed=st.integers(0, 999),
)
def test_any_shape(lengths, heads, dim, dtype, window, scale, threads, seed):
    torch.manual_seed(seed)
    tensors, cu = problem(lengths, dtype, heads, dim)
    with num_threads(threads):
        check(tensors, cu, window=window, scale=scale)


@pytest.mark.parametrize("window", [None, 0, 7, 100, 255, 256, 300, 5000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_blocks_of_keys(dtype, window):
    """Blocks have 256 keys, panels 48 queries: lengths at, below and above their multiples."""
    tensors, cu = problem([257, 1, 613, 256, 0, 1025, 5], dtype, heads=1, dim=16)
    check(tensors, cu, window=window)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rising", [True, False])
def test_the_largest_score_in_the_last_or_the_first_block(dtype, rising):
    """Scores from -40 to 40 along the keys: what was summed before is scaled down to almost 0.

    Rounding a score of 40, 2e-6, is an error of as much in its exponential: four times the bound.
    """
    (q, k, v), cu = problem([700], dtype, dim=4)
    ramp = torch.linspace(-10, 10, 700)[:, None, None]
    k = k * 0.1 + (ramp if rising else ramp.flip(0))
    check(((q.abs() * 0.1 + 1).to(dtype), k.to(dtype), v), cu, slack=4, scale=1.0)


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_with_any_number_of_threads(dtype, threads):
    tensors, cu = problem([300, 5, 5, 0, 90, 1], dtype, heads=3, dim=32)
    with num_threads(1):
        alone = cpp(*tensors, cu, window=200)
    with num_threads(threads):
        assert torch.equal(cpp(*tensors, cu, window=200), alone)


@pytest.mark.parametrize("window", [None, 40, 700])
def test_one_long_sequence_is_shared_among_threads(window):
    tensors, cu = problem([2100], heads=1, dim=8)
    with num_threads(3):
        check(tensors, cu, window=window)


# ----------------------------------------------------------------------------------------- layout


def views(layout: str, dtype: torch.dtype) -> list[Tensor]:
    """q, k and v [20, 3, 6] in another layout than one behind the other."""
    if layout == "fused":
        return list(torch.randn(20, 3, 3, 6).to(dtype).unbind(1))
    if layout == "fused in each head":
        return list(torch.randn(20, 3, 18).to(dtype).split(6, -1))
    if layout == "heads first":
        return [torch.randn(3, 20, 6).to(dtype).transpose(0, 1) for _ in range(3)]
    if layout == "head_dim first":
        return [torch.randn(6, 20, 3).to(dtype).permute(1, 2, 0) for _ in range(3)]
    if layout == "shared keys":
        return [torch.randn(20, 1, 6).to(dtype).expand(20, 3, 6) for _ in range(3)]
    if layout == "every other token":
        return [torch.randn(40, 3, 6).to(dtype)[::2] for _ in range(3)]
    assert layout == "odd"  # pairs of 16-bit elements lie across words
    return [torch.randn(20 * 3 * 7 + 1).to(dtype)[1:].view(20, 3, 7)[..., :6] for _ in range(3)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "layout",
    [
        "fused",
        "fused in each head",
        "heads first",
        "head_dim first",
        "shared keys",
        "every other token",
        "odd",
    ],
)
def test_views_are_read_as_they_are(layout, dtype):
    tensors = views(layout, dtype)
    before = [t.clone() for t in tensors]
    check(tensors, starts([13, 7]))
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))


# -------------------------------------------------------------------------------- NaN and infinity


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_reaches_what_sees_it_and_nothing_else(dtype):
    lengths = [5, 300, 20]
    tensors, cu = problem(lengths, dtype, dim=16)
    clean = cpp(*tensors, cu)
    row = torch.arange(sum(lengths)) == 290
    for position, hit in ((0, row), (1, row.new_tensor([0] * 5 + [1] * 300 + [0] * 20))):
        damaged = [t.clone() for t in tensors]
        damaged[position][290, 1, 3] = torch.nan
        got = cpp(*damaged, cu)
        assert got[hit.bool(), 1].isnan().all(), position
        assert torch.equal(got[~hit.bool()], clean[~hit.bool()])
        assert torch.equal(got[:, 0], clean[:, 0])


def test_nan_with_a_payload_stays_nan():
    """Its lower bits must not become an exponent."""
    (q, k, v), cu = problem([4])
    q[1] = torch.tensor(0x7FC00000 + 0x3FFFFF, dtype=torch.int32).view(torch.float32)
    got = cpp(q, k, v, cu)
    assert got[1].isnan().all() and not got[[0, 2, 3]].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [5, 300])
def test_infinite_scores_are_those_of_softmax(dtype, length):
    (q, k, v), cu = problem([length], dtype)
    q = q.abs() + 0.1
    k[: length - 1] = -torch.inf  # all but the last key, in all blocks but the last one
    assert_close(cpp(q, k, v, cu), v[-1:].expand_as(v), TOLERANCES[dtype])
    k[:] = -torch.inf
    assert cpp(q, k, v, cu).isnan().all()
    k[:] = 0
    v[2] = torch.inf
    assert (cpp(q, k, v, cu) == torch.inf).all()


# ------------------------------------------------------------------------------- when it is chosen


def called(*arguments, **options) -> bool:
    """Whether the native kernel ran."""
    with RecordOps() as recorded:
        ops.varlen_attention(*arguments, **options)
    return "moe_fast::varlen_attention_cpp" in recorded.calls


def test_chosen_for_inference_only():
    (q, k, v), cu = problem([3, 2])
    wants = k.clone().requires_grad_()
    assert called(q, k, v, cu) and called(q, k, v, cu, window=1)
    assert not called(q, wants, v, cu)
    assert not called(q, k, v, cu, dropout=0.5)
    assert not called(q, k, v, cu, backend="torch")
    assert not called(q.double(), k.double(), v.double(), cu)
    with torch.no_grad():
        assert called(q, wants, v, cu)
    with torch.inference_mode():
        assert called(q, wants, v, cu)
    with ops.use_backend("torch"):
        assert not called(q, k, v, cu)
    with ops.use_backend("cpp"):
        assert called(q, k, v, cu) and not called(q, wants, v, cu)


def test_asked_for_what_it_cannot_do():
    (q, k, v), cu = problem([3, 2])
    with pytest.raises(ValueError) as error:
        cpp(q.requires_grad_(), k, v, cu)
    assert_says(error, "backend='cpp'", "no gradients", "torch.no_grad()", "torch.")
    with pytest.raises(ValueError) as error:
        cpp(q.detach(), k, v, cu, dropout=0.1)
    assert_says(error, "backend='cpp'", "no dropout", "Available here: torch.")


def test_people_are_told(capsys):
    ops.show_backends(details=True)
    lines = [x.split() for x in capsys.readouterr().out.splitlines() if "varlen_attention" in x]
    said = {line[2]: " ".join(line[3:]) for line in lines if line[0] == "cpu"}
    assert said["cpp"] == "available, leaves float64 to torch: no gradients, no dropout"
    assert said["torch"] == "available: SDPA per run of equal lengths"


@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_autocast_decides_the_dtype(backend):
    (q, k, v), cu = problem([9, 4])
    with torch.autocast("cpu", BF16):
        got = ops.varlen_attention(q, k, v, cu, backend=backend)
    assert got.dtype == BF16
    rounded = [t.to(BF16) for t in (q, k, v)]
    assert_close(got, oracle(*rounded, cu), TOLERANCES[BF16])


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    """Without gradients, which it does not have: not opcheck_calls of the helpers."""
    tensors, cu = problem([5, 0, 20], dtype)
    with RecordOps() as recorded:
        cpp(*tensors, cu, window=3)
    ((op, args, kwargs),) = recorded.calls.values()
    torch.library.opcheck(op, args, kwargs)


def test_compiles_as_one_graph_for_any_lengths():
    torch._dynamo.reset()
    compiled = torch.compile(ops.varlen_attention, backend="aot_eager", fullgraph=True)
    for lengths in ([3, 4], [5, 1, 1], [2]):
        tensors, cu = problem(lengths)
        with torch.no_grad():
            assert_close(compiled(*tensors, cu), oracle(*tensors, cu), TOLERANCES[torch.float32])


# ------------------------------------------------------------------------------------ where it runs


def test_onednn_switched_off_in_torch():
    tensors, cu = problem([70, 3], BF16)
    with torch.backends.mkldnn.flags(enabled=False):
        check(tensors, cu)


# ---------------------------------------------------------------------------------------- bad input


def test_the_native_op_refuses_what_is_no_problem():
    (q, k, v), cu = problem([3, 2])
    cases = [
        ((q[0], k, v, cu, 1.0, None), "query must be [T, heads, head_dim]"),
        ((q, k[:4], v, cu, 1.0, None), "key must have query's shape"),
        ((q, k, v.to(BF16), cu, 1.0, None), "value must have query's dtype"),
        ((q.double(), k.double(), v.double(), cu, 1.0, None), "float32, bfloat16 or float16"),
        ((q, k, v.mT.contiguous().mT, cu, 1.0, None), "value must have a last stride of 1"),
        ((q, k, v, cu.int(), 1.0, None), "cu_seqlens must be int64"),
        ((q, k, v, cu[:0], 1.0, None), "cu_seqlens must rise from 0 to T = 5"),
        ((q, k, v, torch.tensor([0, 6, 5]), 1.0, None), "cu_seqlens must rise from 0 to T = 5"),
        ((q, k, v, torch.tensor([0, -3, 5]), 1.0, None), "cu_seqlens must rise from 0 to T = 5"),
        ((q, k, v, torch.tensor([0, 2**62, 5]), 1.0, None), "cu_seqlens must rise from 0 to T"),
        ((q, k, v, torch.tensor([1, 5]), 1.0, None), "cu_seqlens must rise from 0 to T = 5"),
        ((q, k, v, torch.tensor([0, 4]), 1.0, None), "cu_seqlens must rise from 0 to T = 5"),
        ((q, k, v, cu, 1.0, -1), "window must not be negative"),
    ]
    for arguments, message in cases:
        with pytest.raises(RuntimeError) as error:
            torch.ops.moe_fast_cpp.varlen_attention(*arguments)
        assert message in str(error.value)


@pytest.mark.parametrize("shape", [(0, 2, 4), (5, 0, 4)])
def test_nothing_to_do(shape):
    q = torch.empty(shape)
    assert cpp(q, q, q, torch.tensor([0, shape[0]])).shape == shape


def test_as_many_windows_as_an_integer_can_count():
    tensors, cu = problem([20, 3])
    got = cpp(*tensors, cu, window=2**63 - 1)
    assert torch.equal(got, cpp(*tensors, cu))
