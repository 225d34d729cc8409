"""Starts the tests that need Triton's interpreter, each file in a process of its own."""

from __future__ import annotations

import pytest

from .processes import needs_triton, run

pytestmark = needs_triton


def run_pytest(*arguments: str, **environment: str) -> None:
    done = run(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments,
        TRITON_INTERPRET="1", **environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize(
    "file",
    [
        "test_grouped_products",
        "test_sums",
        "test_route_kernels",
        "test_tune_kernels",
        "test_info_nce_kernels",
    ],
)
def test_kernels(file):
    run_pytest(f"tests/triton_ops/interpreted/{file}.py")


@pytest.mark.parametrize(
    ("op", "names"),
    [
        ("expert_mlp", "precision or recompute_gives or leak or autocast or nan"),
        ("expert_mlp", "opcheck or expanded or bitwise or bad_input or compiles_as_one"),
        ("expert_mlp_norm", "oracle or precision or opcheck or autocast or compiles_as_one"),
        ("expert_linear", "precision or leak or opcheck or bad_input or compiles_as_one"),
        ("route", "lower_expert or opcheck or bad_input or compiles_as_one or padding_may"),
        ("plan", "not slow"),
        ("info_nce", "precision or ties or near_zero or zero_embedding or expanded or bitwise"),
        ("info_nce", "autocast or bad_input or compiles_as_one or (opcheck and everything-True)"),
    ],
)
def test_ops_as_the_reference(op, names):
    """A part of the specification of each op, with Triton as the backend."""
    run_pytest(f"tests/ops/test_{op}.py", "-k", names, "-m", "not slow", MOE_FAST_BACKEND="triton")


@pytest.mark.slow
@pytest.mark.parametrize(
    "op", ["route", "plan", "expert_linear", "expert_mlp", "expert_mlp_norm", "info_nce"]
)
def test_the_whole_specification_of_the_op(op):
    """All tests of the op but those that differentiate numerically: minutes in the interpreter."""
    run_pytest(
        f"tests/ops/test_{op}.py",
        "-k",
        "not gradcheck and not inductor",
        MOE_FAST_BACKEND="triton",
    )
