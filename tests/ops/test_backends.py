"""Which implementation of an op runs: argument, context, environment, and the automatic choice."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import moe_fast
from moe_fast import ops
from moe_fast.version import build_command

from .helpers import RecordOps, assert_says

OPS = ["route", "plan", "expert_mlp", "expert_mlp_norm", "expert_linear"]
OPS += ["int8_linear", "int8_expert_linear", "int8_expert_mlp", "varlen_attention", "info_nce"]
NAMES = ["auto", "torch", "tiled", "cpp", "triton"]
ROOT = Path(__file__).parents[2]
IDS = torch.tensor([[0, 1], [1, 2]])


def call(backend: str | None = None) -> list[ops.RoutingPlan | torch.Tensor]:
    """Every op once."""
    x, up = torch.ones(2, 3), torch.ones(3, 4, 3)
    block = torch.eye(2, 3), x[0], x[0]
    plan = ops.plan(IDS, 3, backend=backend)
    weights = torch.full((2, 2), 0.5)
    int8_up, int8_down = ops.quantize_weight(up), ops.quantize_weight(up.mT)
    return [
        ops.route(x, torch.ones(3, 3), 2, backend=backend).top_k_weights,
        plan.row_to_slot,
        ops.expert_mlp(x, up, up.mT, None, None, weights, plan, backend=backend),
        ops.expert_mlp_norm(x, up, up.mT, None, None, weights, plan, *block, backend=backend),
        ops.expert_linear(x, up, None, weights, plan, backend=backend),
        ops.int8_linear(x, ops.quantize_weight(up[0]), backend=backend),
        ops.int8_expert_linear(x, int8_up, None, weights, plan, backend=backend),
        ops.int8_expert_mlp(
            x, int8_up, int8_down, None, None, weights, plan, act="relu", backend=backend
        ),
        ops.varlen_attention(*[x[:, None]] * 3, torch.tensor([0, 2]), backend=backend),
        ops.info_nce(x, x, scale=1.0, backend=backend),
    ]


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    """A fresh interpreter, since the environment is what is tested."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
    )


def test_the_reference_is_always_there():
    for op in [None, *OPS]:
        assert "torch" in ops.available_backends(op)
        assert set(ops.available_backends(op)) <= set(NAMES)
    assert set(ops.available_backends()) == {b for op in OPS for b in ops.available_backends(op)}


def test_the_public_package_offers_the_same():
    for name in ("show_backends", "available_backends", "use_backend"):
        assert getattr(moe_fast, name) is getattr(ops, name)


def test_show_backends_says_in_one_line_what_runs(capsys):
    with moe_fast.use_backend("torch"):
        moe_fast.show_backends()
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith("cpu: PyTorch (torch) for ")
    assert all(name in line for name in OPS)
    if "cpp" in ops.available_backends("plan"):
        moe_fast.show_backends()
        line = capsys.readouterr().out.splitlines()[0]
        assert "the compiled library (cpp) for route, plan, " in line


def test_show_backends_lists_every_op_and_backend_on_request(capsys):
    moe_fast.show_backends(details=True)
    lines = [line.split()[:3] for line in capsys.readouterr().out.splitlines()]
    assert all(["cpu", op, backend] in lines for op in OPS for backend in NAMES[1:])


SLOW = """
import warnings, torch
from moe_fast import ops
ids = torch.tensor([[0]])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    ops.plan(ids, 2, backend="torch")
    print(len(caught))
    ops.plan(ids, 2), ops.plan(ids, 2)
    print(len(caught), caught[0].filename, caught[0].message)
ops.show_backends()
"""


def test_without_the_library_the_first_slow_call_says_how_to_build_it(tmp_path):
    """Once; not where PyTorch was asked for."""
    done = run(SLOW, MOE_FAST_NATIVE_LIBRARY=str(tmp_path / "none.so"), MOE_FAST_BACKEND="auto")
    assert done.returncode == 0, done.stderr
    before, warned, shown = done.stdout.splitlines()[:3]
    assert before == "0"
    assert warned.startswith("1 <string> moe_fast runs in its slow form")
    assert build_command() in warned and build_command() in shown


@pytest.mark.parametrize("backend", [None, "auto", "torch"])
def test_every_choice_gives_the_same_numbers(backend):
    for actual, expected in zip(call(backend), call("torch"), strict=True):
        assert torch.allclose(actual, expected, rtol=1e-5, atol=0)  # float32, 1 - p


@pytest.mark.parametrize("op", OPS)
def test_every_available_backend_of_an_op_gives_the_same_numbers(op):
    for backend in ops.available_backends(op):
        with moe_fast.use_backend(backend):
            for actual, expected in zip(call(), call("torch"), strict=True):
                assert torch.allclose(actual, expected, rtol=1e-5, atol=0)  # float32, 1 - p


def test_use_backend_nests_and_lets_errors_through():
    with moe_fast.use_backend("torch"):
        call()
        with moe_fast.use_backend("auto"):
            call()
        call()
    with pytest.raises(RuntimeError, match="the body's own"), moe_fast.use_backend("torch"):
        raise RuntimeError("the body's own")
    call()


def test_a_default_that_lacks_the_dtype_never_brings_the_large_reference_back():
    """info_nce in C++ has no float64: under that default it runs tiled, not as B x B."""
    a = torch.ones(2, 3, dtype=torch.float64)
    with RecordOps() as recorded, moe_fast.use_backend("cpp"):
        ops.info_nce(a, a, scale=1.0)
    assert set(recorded.calls) == {"moe_fast::info_nce_tiled"}


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError) as error, moe_fast.use_backend("cuda"):
        pass
    assert_says(error, "backend", "cuda", *NAMES)
    with pytest.raises(ValueError) as error:
        ops.available_backends("softmax")
    assert_says(error, "op", "softmax", *OPS)


def test_a_backend_that_is_no_name_is_refused():
    with pytest.raises(ValueError, match="backend must be one of .*got \\['cpp'\\]"):
        ops.plan(IDS, 3, backend=["cpp"])


def test_an_absent_backend_is_an_error_that_says_what_there_is():
    """Asked for by name in the call, it must run or raise: no silent fallback."""
    if "triton" in ops.available_backends("plan"):
        pytest.skip("triton serves plan here")
    with pytest.raises((ValueError, RuntimeError)) as error:
        ops.plan(IDS, 3, backend="triton")
    assert_says(error, "triton", "plan", "torch")


PLAN = """
import sys, torch
from transformers import AutoModel
before = set(sys.modules)  # some releases of transformers load scikit-learn
from moe_fast import ops
try:
    ops.plan(torch.tensor([[0]]), 2)
except ValueError as error:
    print(error)
with ops.use_backend("torch"):
    print(ops.plan(torch.tensor([[0]]), 2).row_to_slot.tolist())
loaded = {name.split(".")[0] for name in set(sys.modules) - before}
# No word of triton: where it is installed, torch.library loads it for any custom op.
print(sorted(loaded & {"sentence_transformers", "datasets", "sklearn", "matplotlib"}))
"""


def test_the_environment_chooses_and_nothing_optional_is_loaded():
    """An unknown name shows that it is read, and is named; a context goes before it."""
    done = run(PLAN, MOE_FAST_BACKEND="cuda")
    assert done.returncode == 0, done.stderr
    said, *rest = done.stdout.splitlines()
    for fragment in ["MOE_FAST_BACKEND", "cuda", *NAMES]:
        assert fragment in said
    assert rest == ["[0]", "[]"]


@pytest.fixture
def mish(monkeypatch):
    """An activation that no compiled kernel has."""
    from moe_fast.ops.activations import ACTIVATIONS, Activation

    f = torch.nn.functional.mish
    backward = torch.ops.aten.mish_backward
    monkeypatch.setitem(ACTIVATIONS, "mish", Activation("mish", f, backward, kernels=()))


def _expert_mlp(backend=None):
    torch.manual_seed(0)
    up, down, weights = torch.randn(3, 5, 4), torch.randn(3, 4, 5), torch.ones(2, 1)
    plan = ops.plan(torch.tensor([[2], [0]]), 3)
    tensors = (torch.randn(2, 4), up, down, None, None, weights, plan)
    block = (torch.randn(2, 4), torch.ones(4), torch.zeros(4))
    settings = {"act": "mish", "backend": backend}
    return ops.expert_mlp(*tensors, **settings), ops.expert_mlp_norm(*tensors, *block, **settings)


@pytest.mark.parametrize("default", NAMES)
def test_an_activation_without_a_kernel_runs_in_pytorch(mish, default):
    expected = _expert_mlp("torch")
    with moe_fast.use_backend(default):
        for actual, y in zip(_expert_mlp(), expected, strict=True):
            assert torch.equal(actual, y)


def test_a_backend_that_was_asked_for_names_the_activation_that_it_lacks(mish):
    if "cpp" not in ops.available_backends("expert_mlp"):
        pytest.skip("the native library is not built")
    with pytest.raises(ValueError) as error:
        _expert_mlp("cpp")
    assert_says(error, "backend='cpp'", "expert_mlp", "act='mish'", "Available here: torch.")


def test_auto_skips_a_backend_without_gradients_or_dropout():
    """varlen_attention's cpp has neither."""
    if "cpp" not in ops.available_backends("varlen_attention"):
        pytest.skip("the native library is not built")
    q, starts = torch.randn(4, 1, 8), torch.tensor([0, 4])
    for default in ("auto", "cpp"):
        with moe_fast.use_backend(default):
            with RecordOps() as recorded:
                ops.varlen_attention(q, q, q, starts)
            assert set(recorded.calls) == {"moe_fast::varlen_attention_cpp"}
            with RecordOps() as recorded:
                ops.varlen_attention(q, q, q, starts, dropout=0.5)
                y = ops.varlen_attention(q.clone().requires_grad_(), q, q, starts)
            assert not recorded.calls and y.requires_grad
