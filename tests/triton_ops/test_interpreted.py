"""Starts the tests that need Triton's interpreter, several files to a process."""

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
    "files",
    [
        ["test_grouped_products", "test_sums", "test_route_kernels", "test_maxsim_kernels"],
        [
            "test_activations",
            "test_backend",
            "test_clamped_swiglu",
            "test_tune_kernels",
            "test_info_nce_kernels",
        ],
    ],
    ids=" ".join,
)
def test_kernels(files):
    run_pytest(*[f"tests/triton_ops/interpreted/{file}.py" for file in files], "-m", "not slow")


@pytest.mark.slow
def test_the_slow_tests_of_the_kernels():
    run_pytest("tests/triton_ops/interpreted", "-m", "slow")


CHOSEN = {
    "expert_mlp": "precision or (recompute_gives and dtype0) or (leak and 1099511627776-None)"
    " or autocast or nan or (expanded and gradients[None]) or bitwise or bad_input"
    " or compiles_as_one",
    "expert_mlp_norm": "(oracle and 0.4) or precision or (opcheck and 0.5) or autocast"
    " or compiles_as_one",
    "expert_linear": "precision or (leak and 1099511627776) or (opcheck and True) or bad_input"
    " or compiles_as_one",
    "route": "lower_expert or (opcheck and sentence_topk) or bad_input or compiles_as_one"
    " or padding_may",
    "plan": "test",
    "info_nce": "precision or ties or near_zero or zero_embedding or expanded or bitwise"
    " or autocast or bad_input or compiles_as_one or (opcheck and everything-True)",
}


@pytest.mark.parametrize(
    "chosen",
    [["expert_mlp", "expert_linear"], ["expert_mlp_norm", "route", "plan", "info_nce"]],
    ids=" ".join,
)
def test_ops_as_the_reference(chosen):
    """A part of the specification of each op, with Triton as the backend."""
    names = " or ".join(f"(test_{op}.py and ({CHOSEN[op]}))" for op in chosen)
    files = [f"tests/ops/test_{op}.py" for op in chosen]
    run_pytest(*files, "-k", names, "-m", "not slow", MOE_FAST_BACKEND="triton")


@pytest.mark.slow
def test_mixtures_over_padded_rows():
    """As on large GPUs, where each expert's rows are padded; here to multiples of 32."""
    names = (
        "(test_expert_mlp.py and (precision or (recompute_gives and dtype0) or autocast or nan"
        " or (leak and 1099511627776-None) or compiles_as_one))"
        " or (test_expert_mlp_norm.py and ((oracle and 0.4) or (opcheck and 0.5)))"
    )
    files = [f"tests/ops/test_{op}.py" for op in ("expert_mlp", "expert_mlp_norm")]
    plugin = "tests.triton_ops.interpreted.padded"
    run_pytest(*files, "-p", plugin, "-k", names, "-m", "not slow", MOE_FAST_BACKEND="triton")


@pytest.mark.slow
@pytest.mark.parametrize("op", [op for op in CHOSEN if op != "plan"])
def test_the_rest_of_the_specification_of_the_op(op):
    """All other tests of the op but those that differentiate numerically: minutes."""
    names = f"not gradcheck and not inductor and not ({CHOSEN[op]})"
    run_pytest(f"tests/ops/test_{op}.py", "-k", names, MOE_FAST_BACKEND="triton")
