"""int8_linear, int8_expert_linear and int8_expert_mlp, on every backend that runs here."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_fast import ops
from moe_fast.ops.activations import ACTIVATIONS
from moe_fast.ops.int8_weight import dequantize_weight, quantize_rows, unpack

from . import int8_oracle as oracle
from .helpers import RecordOps, assert_close, assert_says, num_threads, property_test
from .int8_problems import Problem

BACKENDS = ops.available_backends("int8_linear")
# The integers are exact. What differs is the rounding of float32, and that a hidden value near the
# middle of two bytes may become either: one step of 1 / 255 in one of H terms.
FLOAT32 = 1e-5
HIDDEN = 5e-3
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def weight_of(rows: int, columns: int, lead: tuple[int, ...] = ()) -> torch.Tensor:
    return torch.randn(*lead, rows, columns)


# --- weights -------------------------------------------------------------------------------------


@property_test
@given(rows=st.integers(1, 70), columns=st.integers(1, 140))
def test_a_weight_is_rounded_to_the_nearest_of_255_steps_of_its_row(rows, columns):
    w = weight_of(rows, columns)
    q = ops.quantize_weight(w)
    values, scale = oracle.quantize_weight(w.numpy())
    assert np.array_equal(unpack(q.values, rows, columns).numpy(), values)
    assert np.array_equal(q.sums.numpy(), values.sum(1))
    assert np.array_equal(q.scale.numpy(), scale)
    error = (dequantize_weight(q, columns) - w).abs() / q.scale[:, None]
    assert error.max() <= 0.5 + 1e-4


def test_what_is_packed_beside_the_weight_is_zero():
    q = ops.quantize_weight(torch.ones(5, 7))
    assert q.values.shape == (1, 16, 16, 4)
    assert q.values.sum(dtype=torch.int64) == 5 * 7 * 127


def test_a_weight_of_zeros_stays_zero_and_one_that_is_not_finite_is_refused():
    assert not ops.quantize_weight(torch.zeros(3, 4)).values.any()
    with pytest.raises(ValueError, match="weight must be finite"):
        ops.quantize_weight(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(ValueError, match="at most 65536 columns"):
        ops.quantize_weight(torch.zeros(1, 65537))


# --- rows ----------------------------------------------------------------------------------------


@property_test
@given(columns=st.integers(1, 90), magnitude=st.sampled_from([1e-20, 1.0, 1e20]))
def test_rows_are_quantised_as_by_the_oracle_bit_for_bit(columns, magnitude):
    x = torch.randn(4, columns) * magnitude
    q, scale, zero = quantize_rows(x, None)
    for t in range(4):
        want, s, z = oracle.quantize_row(x[t].numpy())
        assert np.array_equal(q[t].numpy(), want)
        assert (scale[t].item(), zero[t].item()) == (s, z)


# --- int8_linear ---------------------------------------------------------------------------------


@every_backend
@property_test
@given(
    tokens=st.integers(0, 70),
    rows=st.sampled_from([1, 15, 16, 17, 64, 65, 130]),
    columns=st.sampled_from([1, 3, 63, 64, 65, 200]),
    bias=st.booleans(),
    fixed=st.booleans(),
)
def test_linear_of_any_shape(backend, tokens, rows, columns, bias, fixed):
    x, w = torch.randn(tokens, columns), weight_of(rows, columns)
    b = torch.randn(rows) if bias else None
    ends = (-1.0, 1.5) if fixed else None
    y = ops.int8_linear(
        x,
        ops.quantize_weight(w),
        b,
        input_range=torch.tensor(ends) if fixed else None,
        backend=backend,
    )
    want = oracle.linear(
        x.numpy(), oracle.quantize_weight(w.numpy()), b.numpy() if bias else None, ends
    )
    assert_close(y, torch.from_numpy(want), FLOAT32)


@every_backend
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_integer_sums_are_exact(backend, threads):
    """Bytes of 0 and 255 by weights of 127: sums of more than 24 bits, which float32 would round.

    The first value of a row is 255 and the scale 1, so that results are whole numbers.
    """
    columns = 700
    x = torch.randint(0, 256, (67, columns)).float()
    x[:, 0] = 255
    w = torch.randint(-127, 128, (33, columns)).float()
    w[:, 0] = 127
    with num_threads(threads):
        y = ops.int8_linear(x.double(), ops.quantize_weight(w), backend="torch")
        assert torch.equal(y, (x.double() @ w.double().t()).float().double())
        y = ops.int8_linear(x, ops.quantize_weight(w), backend=backend)
    assert torch.equal(y, (x.double() @ w.double().t()).float())


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("to", [torch.float32, torch.bfloat16, torch.float16])
def test_linear_in_and_to_every_dtype(backend, dtype, to):
    x, w = torch.randn(9, 40).to(dtype), weight_of(24, 40)
    y = ops.int8_linear(x, ops.quantize_weight(w), dtype=to, backend=backend)
    want = oracle.linear(x.float().numpy(), oracle.quantize_weight(w.numpy()))
    assert y.dtype == to
    assert_close(y, torch.from_numpy(want), {torch.float32: FLOAT32}.get(to, 4e-3))


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_then_norm(backend, dtype):
    x, w, residual = torch.randn(75, 40), weight_of(24, 40), torch.randn(75, 24).to(dtype)
    gamma, beta = torch.randn(24), torch.randn(24)
    norm = ops.Int8Norm(residual, gamma, beta, 1e-6)
    y = ops.int8_linear(x, ops.quantize_weight(w), norm=norm, dtype=dtype, backend=backend)
    plain = oracle.linear(x.numpy(), oracle.quantize_weight(w.numpy()))
    want = torch.nn.functional.layer_norm(
        torch.from_numpy(plain) + residual.double(), (24,), gamma.double(), beta.double(), 1e-6
    )
    assert_close(y, want, FLOAT32 if dtype == torch.float32 else 4e-3)


@every_backend
def test_quantisation_loses_less_than_a_hundredth(backend):
    """Beside the float64 product of unit normal factors: the error of 8 bits, rms."""
    x, w = torch.randn(64, 384), weight_of(100, 384)
    y = ops.int8_linear(x, ops.quantize_weight(w), backend=backend).double()
    want = x.double() @ w.double().t()
    assert ((y - want).norm() / want.norm()).item() < 0.01


@every_backend
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("fixed", [None, torch.tensor([-2.0, 2.0])])
def test_a_value_that_is_not_finite_makes_its_row_nan_and_no_other(backend, bad, fixed):
    x = torch.randn(40, 70)
    x[3, 69] = bad
    weight = ops.quantize_weight(weight_of(20, 70))
    y = ops.int8_linear(x, weight, input_range=fixed, backend=backend)
    assert y[3].isnan().all()
    assert y.isnan().sum() == 20


@every_backend
def test_a_row_of_zeros_gives_the_bias(backend):
    x, b = torch.zeros(2, 10), torch.randn(5)
    x[1] = 1e-38
    y = ops.int8_linear(x, ops.quantize_weight(weight_of(5, 10)), b, backend=backend)
    assert torch.equal(y, b.expand(2, 5))


@every_backend
def test_a_row_alone_gives_the_same_bits_as_in_a_batch(backend):
    x, weight = torch.randn(150, 96), ops.quantize_weight(weight_of(80, 96))
    whole = ops.int8_linear(x, weight, backend=backend)
    parts = [ops.int8_linear(x[i : i + 1], weight, backend=backend) for i in range(150)]
    assert torch.equal(whole, torch.cat(parts))


# --- experts -------------------------------------------------------------------------------------


@every_backend
@property_test
@given(
    tokens=st.sampled_from([0, 1, 5, 33, 80]),
    dim=st.sampled_from([1, 16, 30, 65]),
    hidden=st.sampled_from([1, 17, 64, 70]),
    experts=st.integers(1, 5),
    k=st.integers(1, 2),
    act=st.sampled_from(sorted(ACTIVATIONS)),
    gated=st.booleans(),
    bias=st.booleans(),
    skip=st.booleans(),
    fixed=st.booleans(),
)
def test_expert_mlp_of_any_shape(
    backend, tokens, dim, hidden, experts, k, act, gated, bias, skip, fixed
):
    k = min(k, experts)
    act = ACTIVATIONS[act].name
    problem = Problem(tokens, dim, hidden, experts, k, act, gated, bias, skip, fixed)
    y = ops.int8_expert_mlp(*problem.arguments, **problem.settings, backend=backend)
    # Narrow experts have few terms, of which one may be a step of a byte away.
    assert_close(y, problem.answer(), max(HIDDEN, 0.05 / hidden**0.5))


@every_backend
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_expert_mlp_then_norm(backend, k, dtype):
    problem = Problem(70, 48, 96, k=k, skip=True)
    x, *rest = problem.arguments
    problem.x = x.to(dtype).float()
    gamma, beta, residual = torch.randn(48), torch.randn(48), torch.randn(70, 48).to(dtype)
    norm = ops.Int8Norm(residual, gamma, beta, 1e-6)
    y = ops.int8_expert_mlp(x.to(dtype), *rest, norm=norm, backend=backend)
    want = torch.nn.functional.layer_norm(
        problem.answer() + residual.double(), (48,), gamma.double(), beta.double(), 1e-6
    )
    assert y.dtype == dtype
    assert_close(y, want, HIDDEN if dtype == torch.float32 else 1.5e-2)


@every_backend
@pytest.mark.parametrize("k", [1, 2])
def test_expert_linear(backend, k):
    e, x, w, b = 4, torch.randn(90, 70), weight_of(33, 70, (4,)), torch.randn(4, 33)
    index = torch.rand(90, e).argsort(1)[:, :k]
    index[7, 0] = e  # no expert
    weights, plan = torch.rand(90, k), ops.plan(index, e)
    y = ops.int8_expert_linear(x, ops.quantize_weight(w), b, weights, plan, backend=backend)
    want = torch.zeros(90, 33, dtype=torch.float64)
    for expert in range(e):
        all_rows = oracle.linear(
            x.numpy(), oracle.quantize_weight(w[expert].numpy()), b[expert].numpy()
        )
        chosen = ((index == expert) * weights).sum(1, keepdim=True).double()
        want += chosen * torch.as_tensor(all_rows)
    assert_close(y, want, FLOAT32)


def test_results_do_not_depend_on_the_number_of_threads():
    problem = Problem(300, 64, 128, experts=4)
    results = []
    for threads in (1, 2, 5):
        with num_threads(threads):
            results.append(ops.int8_expert_mlp(*problem.arguments))
    assert all(torch.equal(results[0], other) for other in results[1:])


# --- in PyTorch ----------------------------------------------------------------------------------


@every_backend
def test_the_ops_pass_opcheck_and_compile(backend):
    problem = Problem(10, 16, 24)
    suffix = "" if backend == "torch" else f"_{backend}"
    x, up, down, *rest = problem.arguments

    def call():
        ops.int8_expert_linear(x, up, None, *rest[2:], backend=backend)
        linear = ops.int8_linear(x, ops.Int8Weight(*(t[0] for t in up)), backend=backend)
        return linear, ops.int8_expert_mlp(x, up, down, *rest, backend=backend)

    with RecordOps() as recorded:
        call()
    names = ("int8_linear", "int8_expert_linear", "int8_expert_mlp")
    assert set(recorded.calls) == {f"moe_fast::{name}{suffix}" for name in names}
    for op, args, kwargs in recorded.calls.values():  # without gradients, which they do not have
        torch.library.opcheck(op, args, kwargs)
    with torch.no_grad():
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")()
    assert all(torch.equal(a, b) for a, b in zip(compiled, call(), strict=True))


# --- errors --------------------------------------------------------------------------------------


def test_gradients_are_refused_and_the_message_says_why():
    weight = ops.quantize_weight(weight_of(3, 4))
    with pytest.raises(ValueError, match="int8_linear has no gradient"):
        ops.int8_linear(torch.randn(2, 4, requires_grad=True), weight)


def test_wrong_arguments_are_named():
    x, weight = torch.randn(2, 4), ops.quantize_weight(weight_of(3, 4))
    with pytest.raises(ValueError) as error:
        ops.int8_linear(torch.randn(2, 65), weight)
    assert_says(error, "weight.values", "P, Q, 16, 4]")
    with pytest.raises(TypeError, match="weight.sums must have dtype"):
        ops.int8_linear(x, weight._replace(sums=weight.scale))
    with pytest.raises(TypeError, match="bias must have dtype float32"):
        ops.int8_linear(x, weight, torch.zeros(3, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"input_range must be finite and contain 0"):
        ops.int8_linear(x, weight, input_range=torch.tensor([1.0, 2.0]))
    with pytest.raises(ValueError, match=r"norm.residual must have shape"):
        ops.int8_linear(x, weight, norm=ops.Int8Norm(x, x[0], x[0]))
    problem = Problem(5, 6, 7)
    with pytest.raises(ValueError, match="up_proj must have 2H rows if gated"):
        ops.int8_expert_mlp(*problem.arguments, gated=True)
    with pytest.raises(ValueError, match="act must be one of"):
        ops.int8_expert_mlp(*problem.arguments, act="mish")
