"""When the triton backend is offered, and that importing moe_fast needs no Triton."""

from __future__ import annotations

from .processes import needs_triton, run

REASONS = """
from moe_fast.ops import backends
OPS = ("route", "plan", "expert_mlp", "expert_mlp_norm", "expert_linear", "info_nce")
for op in OPS:
    print([backends.why_unavailable(op, "triton", d) for d in ("cpu", "mps")])
"""
NO_TRITON = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "triton" else find(name, *a)
"""


def test_without_triton_it_says_so():
    done = run("-c", NO_TRITON + REASONS, TRITON_INTERPRET=None)
    assert done.stdout.count("triton is not installed") == 12, done.stderr


@needs_triton
def test_without_a_gpu_it_says_so():
    done = run("-c", REASONS, TRITON_INTERPRET=None)
    assert done.stdout.count("Triton kernels run on GPUs") == 6, done.stderr
    assert done.stdout.count("not for mps") == 6


AUTO = """
import torch
from moe_fast import ops
with torch.profiler.profile() as profile:
    ops.plan(torch.tensor([[0]]), 2)
    ops.plan(torch.tensor([[0]]), 2, backend="triton")
plans = ("moe_fast::plan", "moe_fast_cpp::plan")  # the native one goes past the dispatcher
print([e.key for e in profile.key_averages() if e.key.startswith(plans)])
"""


@needs_triton
def test_the_interpreter_is_never_chosen_by_itself():
    done = run("-c", AUTO, TRITON_INTERPRET="1")
    assert done.stdout.count("plan_triton") == 1, done.stdout + done.stderr
    assert done.stdout.count("::plan") == 2


SENTINEL = """
import torch
from moe_fast import ops
try:
    ops.plan(torch.tensor([[-1]]), 2, backend="triton")
except ValueError as error:
    print(error)
try:
    x = torch.full((1, 3), float("nan"))
    ops.route(x, torch.ones(2, 3), 1, backend="triton")
except ValueError as error:
    print(error)
"""


@needs_triton
def test_bad_values_are_refused_as_by_the_reference():
    done = run("-c", SENTINEL, TRITON_INTERPRET="1")
    assert "must not be negative; got -1" in done.stdout, done.stderr
    assert "NaN or infinite; got" in done.stdout, done.stderr
