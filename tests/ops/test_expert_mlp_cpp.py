"""``expert_mlp`` on the ``cpp`` backend: float32, bfloat16 and float16 on the CPU.

What is right is the reference in float64, given the same rounded inputs; test_expert_mlp.py checks
that one against loops over tokens.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moe_fast import ops
from moe_fast.ops import native

from .helpers import (
    DTYPES,
    assert_close,
    assert_says,
    leaves,
    need_native_library,
    num_threads,
    opcheck_calls,
    property_test,
    relative_error,
)

need_native_library()

F32, BF16, F16 = DTYPES
NAMES = ["x", "up_proj", "down_proj", "up_proj_bias", "down_proj_bias", "top_k_weights"]
ACTS = ["gelu", "gelu_tanh", "relu", "silu", "clamped_swiglu"]
# Relative to the largest entry of each tensor. float32: sums of up to 1024 terms, and an erf good
# to 1.5e-7. The others: roundings of z, h and dz (2^-9 and 2^-12 each) and of the result.
TOLERANCES = {F32: 1e-5, BF16: 2e-2, F16: 4e-3}


def problem(
    tokens=37,
    k=2,
    experts=3,
    dim=32,
    hidden=48,
    *,
    gated=False,
    bias=True,
    skip=True,
    dtype=F32,
    used=None,
) -> tuple[dict, ops.RoutingPlan]:
    """Activations of unit scale; ids below ``used``, some of them skipped if ``skip``."""
    up = 2 * hidden if gated else hidden
    inputs = dict(
        x=torch.randn(tokens, dim),
        up_proj=torch.randn(experts, up, dim) / dim**0.5,
        down_proj=torch.randn(experts, dim, hidden) / hidden**0.5,
        up_proj_bias=torch.randn(experts, up) if bias else None,
        down_proj_bias=torch.randn(experts, dim) if bias else None,
    )
    inputs = {n: None if t is None else t.to(dtype) for n, t in inputs.items()}
    inputs["top_k_weights"] = torch.rand(tokens, k)
    ids = torch.randint(0, used or experts, (tokens, k))
    if skip:
        ids = torch.where(torch.rand(tokens, k) < 0.2, experts, ids)
    return inputs, ops.plan(ids, experts)


def run(inputs: dict, plan: ops.RoutingPlan, upstream: Tensor, backend: str, **kwargs) -> dict:
    """The output and all gradients, by name."""
    tensors = leaves(**inputs)
    y = ops.expert_mlp(*(tensors[n] for n in NAMES), plan, backend=backend, **kwargs)
    wanted = {n: t for n, t in tensors.items() if t is not None}
    grads = torch.autograd.grad(y, list(wanted.values()), upstream.to(y.dtype))
    return {"y": y.detach(), **dict(zip(wanted, grads, strict=True))}


def in_double(inputs: dict) -> dict:
    return {n: None if t is None else t.double() for n, t in inputs.items()}


def assert_right(inputs: dict, plan: ops.RoutingPlan, **kwargs) -> None:
    """Output and every gradient, in value and dtype."""
    dtype = inputs["x"].dtype
    upstream = torch.randn(inputs["x"].shape).to(dtype)
    actual = run(inputs, plan, upstream, "cpp", **kwargs)
    expected = run(in_double(inputs), plan, upstream, "torch", **kwargs)
    for name in expected:
        assert actual[name].dtype == (dtype if name == "y" else inputs[name].dtype), name
        assert_close(actual[name], expected[name], TOLERANCES[dtype], name)


# ------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("recompute", [None, "up"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_reference(dtype, act, gated, recompute):
    inputs, plan = problem(dtype=dtype, gated=gated)
    assert_right(inputs, plan, act=act, gated=gated, recompute=recompute)


@pytest.mark.parametrize("rows", [49, 64, 97, 112, 160, 400])
@pytest.mark.parametrize("dtype", DTYPES)
def test_panels_of_any_width(dtype, rows):
    """48 columns or fewer stand in a panel; the last 64 are divided into two of 32."""
    inputs, plan = problem(2 * rows, 1, 2, 40, 150, dtype=dtype, skip=False)
    plan = ops.plan((torch.arange(2 * rows) < rows).long()[:, None], 2)
    assert_right(inputs, plan)
    assert_right(inputs, plan, recompute="up")


@property_test
@given(
    tokens=st.sampled_from([1, 2, 15, 62, 97, 331]),
    k=st.sampled_from([1, 2, 99]),
    experts=st.sampled_from([1, 2, 3, 5, 6, 7, 8, 16]),
    dim=st.sampled_from([1, 2, 7, 16, 33, 64, 100]),
    hidden=st.sampled_from([1, 6, 17, 48, 130, 300]),
    gated=st.booleans(),
    bias=st.booleans(),
    skip=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    threads=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 999),
)
def test_any_shape(
    tokens, k, experts, dim, hidden, gated, bias, skip, dtype, threads, seed
):  # fmt: skip
    """Odd widths too, for which bf16 products fall back to float32, and any number of threads."""
    torch.manual_seed(seed)
    k = min(k, experts)
    inputs, plan = problem(
        tokens, k, experts, dim, hidden, gated=gated, bias=bias, skip=skip, dtype=dtype
    )
    with num_threads(threads):
        assert_right(inputs, plan, gated=gated, recompute="up" if seed % 2 else None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "k", "experts", "dim", "hidden"),
    [(1031, 2, 8, 64, 256), (700, 1, 2, 384, 1000)],
)
def test_the_widths_of_models(tokens, k, experts, dim, hidden, dtype):
    """More rows, units and inputs than one block of each; test_grid.py varies the inputs."""
    inputs, plan = problem(tokens, k, experts, dim, hidden, dtype=dtype)
    with num_threads(2):
        assert_right(inputs, plan)


@pytest.mark.parametrize(("gated", "recompute"), [(False, "up"), (True, None)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_several_blocks_of_rows_and_of_units(dtype, gated, recompute):
    """2,300 rows per expert: three blocks in the backward, whose sums are added up."""
    inputs, plan = problem(2300, 2, 2, 40, 600, gated=gated, dtype=dtype)
    with num_threads(2):
        assert_right(inputs, plan, gated=gated, recompute=recompute)


# ------------------------------------------------------------------- weights that lie in columns


def in_columns(inputs: dict, pairs: bool) -> dict:
    """The same weights, stored as [E, D, U] (or, halves apart, [E, D, H, 2]) and [E, H, D]."""
    up, down = inputs["up_proj"], inputs["down_proj"]
    if pairs:
        up = up.unflatten(1, (2, -1)).permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1)
    else:
        up = up.mT.contiguous().mT
    return inputs | {"up_proj": up, "down_proj": down.mT.contiguous().mT}


@property_test
@given(
    tokens=st.sampled_from([0, 1, 2, 15, 97, 331]),
    k=st.sampled_from([1, 2]),
    experts=st.sampled_from([2, 3, 8]),
    dim=st.sampled_from([1, 7, 16, 64, 100]),
    hidden=st.sampled_from([1, 6, 17, 130, 300]),
    form=st.sampled_from(["plain", "gated", "pairs"]),
    bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    threads=st.sampled_from([1, 2]),
    seed=st.integers(0, 999),
)
def test_weights_in_columns(
    tokens, k, experts, dim, hidden, form, bias, dtype, threads, seed
):  # fmt: skip
    torch.manual_seed(seed)
    gated = form != "plain"
    inputs, plan = problem(tokens, k, experts, dim, hidden, gated=gated, bias=bias, dtype=dtype)
    act = "clamped_swiglu" if seed % 2 else "silu"
    with num_threads(threads):
        assert_right(in_columns(inputs, form == "pairs"), plan, act=act, gated=gated)


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_computed_in_float32_as_exactly_as_float32(dtype, columns):
    inputs, plan = problem(300, 2, 4, 96, 200, gated=True, dtype=dtype)
    expected = run(in_double(inputs), plan, torch.zeros(300, 96), "torch", gated=True)
    given = in_columns(inputs, pairs=False) if columns else inputs
    actual = run(given, plan, torch.zeros(300, 96), "cpp", gated=True, dtype=F32)
    assert actual["y"].dtype == F32
    assert_close(actual["y"], expected["y"], TOLERANCES[F32], "y")


@pytest.mark.parametrize("pairs", [False, True])
def test_weights_in_columns_are_not_copied(pairs, monkeypatch):
    given = []
    call = native.call_on_views
    monkeypatch.setattr(native, "call_on_views", lambda *a: (given.extend(a), call(*a))[1])
    inputs, plan = problem(gated=True)
    inputs = in_columns(inputs, pairs)
    ops.expert_mlp(*(inputs[n] for n in NAMES), plan, gated=True, backend="cpp")
    pointers = {t.data_ptr() for t in given if isinstance(t, Tensor)}
    assert {inputs["up_proj"].data_ptr(), inputs["down_proj"].data_ptr()} <= pointers


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_tokens(dtype):
    inputs, plan = problem(tokens=0, dtype=dtype)
    results = run(inputs, plan, torch.zeros(0, 32), "cpp")
    assert results["y"].shape == (0, 32)
    for name in NAMES:
        assert torch.equal(results[name], torch.zeros_like(inputs[name]))


def test_the_activation_far_out():
    """z from -30 to 30 in float32: the tails vanish, and nothing overflows."""
    x = torch.linspace(-30, 30, 2001)[:, None]
    weight, plan = torch.ones(1, 1, 1), ops.plan(torch.zeros(2001, 1, dtype=torch.int64), 1)
    inputs = dict(x=x, up_proj=weight, down_proj=weight, up_proj_bias=None, down_proj_bias=None)
    inputs["top_k_weights"] = torch.ones(2001, 1)
    for act in ACTS:
        actual = run(inputs, plan, torch.ones(2001, 1), "cpp", act=act)
        expected = run(in_double(inputs), plan, torch.ones(2001, 1), "torch", act=act)
        for name in ("y", "x"):
            assert (actual[name] - expected[name]).abs().max() < 2e-6, (act, name)


# h is exactly 0 below these z: exponentials end at exp(-80), so less than 1e-32 is lost.
ZERO_BELOW = {"gelu": -12.7, "gelu_tanh": -9.8, "silu": -80.1, "clamped_swiglu": -47.1}


@pytest.mark.parametrize("upstream", [1.0, 1e-30])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_activations_far_out_make_no_subnormal_numbers(dtype, act, gated, upstream):
    """A product of subnormal numbers takes up to 80 times as long; here y is h, and dx is dz."""
    z = torch.cat([torch.linspace(-100, 100, 4001), torch.logspace(-45, 38, 500)])
    z = torch.cat([z, -z]).to(dtype)
    x = torch.stack([z, z.flip(0).clamp(-1, 1)], 1) if gated else z[:, None]
    n, d = x.shape
    inputs = dict(
        x=x,
        up_proj=torch.eye(d, dtype=dtype)[None],
        down_proj=torch.eye(d, 1, dtype=dtype)[None],
        up_proj_bias=None,
        down_proj_bias=None,
        top_k_weights=torch.ones(n, 1),
    )
    plan = ops.plan(torch.zeros(n, 1, dtype=torch.int64), 1)
    results = run(inputs, plan, torch.full((n, d), upstream), "cpp", act=act, gated=gated)
    h, dz = results["y"][:, :1].float(), results["x"].float()
    for values in (h, dz):
        assert (values.isfinite() | (x.abs().amax(1, keepdim=True) > 1e12)).all()
        assert not ((values != 0) & (values.abs() < torch.finfo(F32).tiny)).any()
    low = z.float() < ZERO_BELOW.get(act, 0)
    assert low.any()
    assert (h[low] == 0).all()
    assert (dz[low & (z > -1e12)] == 0).all()


# ------------------------------------------------------------------------------ skipped and empty


@pytest.mark.parametrize("recompute", [None, "up"])
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_skipped_tokens_leak_nothing(dtype, k, recompute):
    """They may hold NaN, in x, in their weights and in the upstream gradient."""
    inputs, _ = problem(k=k, dtype=dtype)
    ids = torch.randint(0, 3, (37, k))
    skipped = torch.tensor([0, 5, 36])
    ids[skipped] = 3
    upstream = torch.randn(37, 32).to(dtype)
    results = []
    for value in (0.0, float("nan"), float("inf")):
        dirty = inputs | dict(
            x=inputs["x"].index_fill(0, skipped, value),
            top_k_weights=inputs["top_k_weights"].index_fill(0, skipped, value),
        )
        given_upstream = upstream.index_fill(0, skipped, value)
        results.append(run(dirty, ops.plan(ids, 3), given_upstream, "cpp", recompute=recompute))
    for name in results[0]:
        if name in ("y", "x", "top_k_weights"):
            assert (results[0][name][skipped] == 0).all(), name
        assert all(torch.equal(results[0][name], r[name]) for r in results[1:]), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("used", [1, 2])
def test_an_empty_expert(dtype, used):
    """Its parameters, NaN even, are never read, and their gradients are zero."""
    inputs, plan = problem(dtype=dtype, used=used)
    assert_right(inputs, plan)
    for name in NAMES[1:5]:
        inputs[name][used:] = float("nan")
    results = run(inputs, plan, torch.randn(37, 32), "cpp")
    assert all(t.isfinite().all() for t in results.values())
    assert all((results[name][used:] == 0).all() for name in NAMES[1:5])


def test_everything_skipped():
    inputs, _ = problem()
    results = run(inputs, ops.plan(torch.full((37, 2), 3), 3), torch.randn(37, 32), "cpp")
    assert all((t == 0).all() for t in results.values())


# ------------------------------------------------------------------------------------ odd inputs


def test_strides():
    """Transposed, strided and expanded inputs and upstream gradients."""
    inputs, plan = problem()
    twisted = {n: t.movedim(-1, 0).contiguous().movedim(0, -1) for n, t in inputs.items()}
    strided = {n: torch.stack([t] * 2, -1)[..., 0] for n, t in inputs.items()}
    expanded = inputs | {"x": torch.randn(1, 32).expand(37, 32)}
    for variant in (twisted, strided, expanded):
        assert_right(variant, plan)
    for upstream in (torch.ones(()).expand(37, 32), torch.randn(32, 37).T):
        actual = run(inputs, plan, upstream, "cpp")
        expected = run(in_double(inputs), plan, upstream, "torch")
        for name in expected:
            assert_close(actual[name], expected[name], TOLERANCES[F32], name)


def test_only_the_gradients_that_are_wanted():
    inputs, plan = problem()
    expected = run(inputs, plan, torch.ones(37, 32), "cpp")
    for name in NAMES:
        frozen = {n: t.clone().requires_grad_(n == name) for n, t in inputs.items()}
        ops.expert_mlp(*(frozen[n] for n in NAMES), plan, backend="cpp").sum().backward()
        assert torch.equal(frozen[name].grad, expected[name])
        assert all(t.grad is None for n, t in frozen.items() if n != name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("tokens", [60, 501])  # few rows per expert, and many
def test_bit_for_bit(tokens, gated, dtype):
    """Twice, and with z computed again: the same numbers, whichever thread took which task."""
    inputs, plan = problem(tokens=tokens, experts=5, hidden=260, gated=gated, dtype=dtype)
    upstream = torch.randn(tokens, 32)
    with num_threads(3):
        runs = [
            run(inputs, plan, upstream, "cpp", gated=gated, recompute=recompute)
            for recompute in (None, None, "up")
        ]
    for name in runs[0]:
        assert torch.equal(runs[0][name], runs[1][name]), name
        assert torch.equal(runs[0][name], runs[2][name]), name


def test_weights_that_vary_from_call_to_call_share_no_state():
    """Scratch memory is kept between calls: a smaller problem must not see a larger one's."""
    for tokens, hidden in ((300, 300), (3, 20), (90, 140), (1, 1)):
        assert_right(*problem(tokens=tokens, hidden=hidden))


# ------------------------------------------------------------------- autocast, autograd, compiler


def test_autocast_gives_bf16():
    inputs, plan = problem()
    with torch.autocast("cpu", torch.bfloat16):
        results = run(inputs, plan, torch.randn(37, 32), "cpp")
    assert results["y"].dtype == BF16
    assert all(results[n].dtype == F32 for n in NAMES)
    expected = run(in_double(inputs), plan, torch.zeros(37, 32), "torch")
    assert_close(results["y"], expected["y"], 3e-2)


@pytest.mark.parametrize(
    ("bias", "recompute", "dtype"),
    [(False, "up", F32), (True, None, F32), (True, "up", BF16), (False, None, F16)],
)
def test_opcheck(bias, recompute, dtype):
    inputs, plan = problem(tokens=7, bias=bias, gated=not bias, dtype=dtype)
    inputs = leaves(**inputs)

    def call():
        tensors = (inputs[n] for n in NAMES)
        y = ops.expert_mlp(*tensors, plan, gated=not bias, recompute=recompute, backend="cpp")
        y.cumsum(0).sum().backward()

    opcheck_calls(call, {"expert_mlp_cpp", "expert_mlp_cpp_backward"})


def test_compiles_as_one_graph():
    torch.compiler.reset()

    def function(top_k_index, *tensors):
        return ops.expert_mlp(*tensors, ops.plan(top_k_index, 3), backend="cpp")

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (7, 12):
        inputs, _ = problem(tokens=tokens)
        args = [inputs[n].requires_grad_() for n in NAMES]
        ids = torch.randint(0, 4, (tokens, 2))
        expected, actual = function(ids, *args), compiled(ids, *args)
        assert torch.equal(actual, expected)
        grads = [torch.autograd.grad(y.cumsum(0).sum(), args) for y in (expected, actual)]
        assert all(torch.equal(p, q) for p, q in zip(*grads, strict=True))


# ------------------------------------------------------------------------- where it runs, and what


def test_float64_is_left_to_the_reference(capsys):
    inputs, plan = problem()
    upstream = torch.randn(37, 32)
    ours, reference = (run(in_double(inputs), plan, upstream, b) for b in ("cpp", "torch"))
    assert all(torch.equal(ours[n], reference[n]) for n in reference)
    mixed = inputs | {"top_k_weights": inputs["top_k_weights"].double()}
    assert_close(
        run(mixed, plan, upstream, "cpp")["y"], run(mixed, plan, upstream, "torch")["y"], 1e-6
    )
    ops.show_backends(details=True)
    said = " ".join(capsys.readouterr().out.split())
    assert "expert_mlp cpp available, leaves float64 to torch" in said


def test_onednn_switched_off_in_torch():
    inputs, plan = problem(dtype=BF16)
    with torch.backends.mkldnn.flags(enabled=False):
        assert_right(inputs, plan)


# ------------------------------------------------------------------------------------- bad input


def broken_plan(**changes) -> ops.RoutingPlan:
    """A plan of 4 tokens, K = 2, 3 experts, with some entries changed: name = (index, value)."""
    plan = ops.plan(torch.tensor([[0, 1], [1, 2], [2, 0], [3, 1]]), 3)
    tensors = {
        n: getattr(plan, n).clone()
        for n in ("expert_offsets", "row_to_token", "row_to_slot", "slot_to_row")
    }
    for name, (index, value) in changes.items():
        tensors[name][index] = value
    return ops.RoutingPlan(**tensors)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(expert_offsets=(3, 9)), ["expert_offsets", "9", "8"]),
        (dict(expert_offsets=(0, 1)), ["expert_offsets", "from 0"]),
        (dict(expert_offsets=(1, -1)), ["expert_offsets", "-1"]),
        (dict(expert_offsets=(1, 6)), ["expert_offsets", "ascend"]),
        (dict(row_to_token=(0, 4)), ["row_to_token", "row 0"]),
        (dict(row_to_token=(2, -1)), ["row_to_token", "row 2"]),
        (dict(row_to_slot=(1, 8)), ["row_to_slot", "row 1"]),
        (dict(row_to_slot=(1, -5)), ["row_to_slot", "row 1"]),
        (dict(row_to_slot=(1, 0)), ["row_to_slot", "row 1"]),
        (dict(slot_to_row=(6, 7)), ["slot_to_row", "7"]),
        (dict(slot_to_row=(6, -2)), ["slot_to_row", "-2"]),
    ],
)
def test_a_plan_out_of_bounds_is_refused(changes, says):
    """Index tensors reach into memory: every value is checked before any is used."""
    inputs, _ = problem(tokens=4)
    arguments = [inputs[n] for n in NAMES]
    ops.expert_mlp(*arguments, broken_plan(), backend="cpp")
    with pytest.raises(ValueError) as error:
        ops.expert_mlp(*arguments, broken_plan(**changes), backend="cpp")
    assert_says(error, *says)


@pytest.mark.parametrize(
    ("position", "value", "says"),
    [
        (0, torch.zeros(4), "x must be"),
        (0, torch.zeros(4, 32, dtype=torch.float64), "float32, bfloat16 or float16"),
        (0, torch.zeros(4, 31), "up_proj must have shape"),
        (1, torch.zeros(3, 48, 32).bfloat16(), "up_proj must have the dtype of x"),
        (1, torch.zeros(3, 32, 48).mT, "up_proj must be contiguous"),
        (1, torch.zeros(0, 48, 32), "there must be an expert"),
        (2, torch.zeros(3, 32, 47), "up_proj must have shape"),
        (3, torch.zeros(3, 47), "up_proj_bias must have shape"),
        (4, torch.zeros(2, 32), "down_proj_bias must have shape"),
        (5, torch.zeros(4, 2, dtype=torch.float64), "top_k_weights must be float32"),
        (5, torch.zeros(4, 3), "row_to_token must have shape"),
        (6, torch.zeros(4, dtype=torch.int32), "expert_offsets must be int64"),
        (7, torch.zeros(7, dtype=torch.int64), "row_to_token must have shape"),
        (10, "tanh", "act is unknown"),
    ],
)
def test_the_native_op_itself_refuses(position, value, says):
    """Called past all checks of Python: an error, never a crash."""
    inputs, _ = problem(tokens=4)
    plan = broken_plan()
    arguments = [inputs[n] for n in NAMES]
    arguments += [plan.expert_offsets, plan.row_to_token, plan.row_to_slot, plan.slot_to_row]
    arguments += ["gelu", False, True]
    y, saved = torch.ops.moe_fast_cpp.expert_mlp(*arguments)
    assert relative_error(y, ops.expert_mlp(*arguments[:6], plan, backend="torch")) < 1e-5
    assert saved.shape == (8, 48)
    arguments[position] = value
    with pytest.raises(RuntimeError, match=says):
        torch.ops.moe_fast_cpp.expert_mlp(*arguments)
