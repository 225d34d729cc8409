"""What a run would compile: counted and compiled without a GPU, under the keys of its launches."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from bench import gpu_compile
from bench.gpu_info_nce import inputs_of, results
from bench.gpu_times import BASE, with_router
from bench.problem import Problem, timed
from tests.triton_ops.processes import run

META = gpu_compile.META
# Kernels that the first training step of one layer needs: router, plan, and experts both ways.
FIRST_STEP = 21
# Tokens of a batch: those whose experts' rows are padded, and all from a few per expert on.
PADDED, ANY = (8_192, 65_536), (2_048, 65_536)
LATER_STEPS, BOTH_FORMS = 2, 7


def train(tokens: int, k: int) -> None:
    """One step of a layer that learns its routing."""
    shape = replace(BASE, tokens=tokens, k=k)
    timed(*with_router(Problem(shape, META, "triton")), True)()


def count_kernels(steps: int, k: int, gpu: str, tokens: tuple[int, int] = PADDED) -> list[int]:
    """How many kernels were compiled after each step, with random numbers of tokens."""
    draw, counts = random.Random(k), []
    with gpu_compile.instead_of_a_gpu(gpu), gpu_compile.collecting() as found:
        for _ in range(steps):
            train(draw.randint(*tokens), k)
            counts.append(len(found.launches))
    return counts


@pytest.mark.parametrize(
    ("steps", "k", "gpu"),
    [
        (5, 1, "without a table"),
        pytest.param(300, 1, "without a table", marks=pytest.mark.slow),
        pytest.param(300, 2, "without a table", marks=pytest.mark.slow),
        pytest.param(300, 1, gpu_compile.H200, marks=pytest.mark.slow),
    ],
)
def test_batches_of_other_sizes_compile_nothing_new(steps, k, gpu):
    """An H200's table has other entries for fewer rows per expert: those are the later ones."""
    counts = count_kernels(steps, k, gpu)
    assert counts[0] <= FIRST_STEP + (k > 1)
    assert counts[-1] - counts[0] <= (LATER_STEPS if gpu == gpu_compile.H200 else 0)


@pytest.mark.slow
@pytest.mark.parametrize("gpu", ["without a table", gpu_compile.H200])
def test_small_batches_among_large_ones_compile_the_other_form_once(gpu):
    """Below 1,024 rows per expert, rows are not padded: other kernels, more than LATER_STEPS."""
    counts = count_kernels(300, 1, gpu, ANY)
    assert counts[0] <= FIRST_STEP
    assert LATER_STEPS < counts[-1] - counts[0] <= BOTH_FORMS
    assert counts[-1] == counts[150]


@pytest.mark.slow
def test_batches_of_other_sizes_of_the_contrastive_loss_compile_little_new():
    draw, counts = random.Random(0), []
    with gpu_compile.instead_of_a_gpu("without a table"), gpu_compile.collecting() as found:
        for _ in range(100):
            results(inputs_of(draw.randint(64, 8_192), 768, 0, torch.bfloat16, META), "triton")
            counts.append(len(found.launches))
    assert 0 < counts[0] <= 20
    assert counts[-1] - counts[0] <= LATER_STEPS


def test_a_launch_that_differs_in_a_constant_is_another_kernel():
    """That the count can grow: E = 20 needs wider vectors than E = 8."""
    with gpu_compile.instead_of_a_gpu(), gpu_compile.collecting() as found:
        train(4096, 1)
        before = len(found.launches)
        shape = replace(BASE, tokens=4096, experts=20)
        timed(*with_router(Problem(shape, META, "triton")), True)()
    assert len(found.launches) > before


def test_items_name_their_launches_and_a_failure_leaves_the_others():
    from moe_fast.triton_ops.plan import plan

    def broken() -> None:
        raise ValueError("no such shape")

    def sort() -> None:
        plan(torch.empty(64, 2, dtype=torch.int64, device=META), 4)

    with gpu_compile.instead_of_a_gpu():
        found = gpu_compile.collect([("broken", broken), ("plan", sort), ("again", sort)])
    assert found.failures == {"broken": "ValueError: no such shape"}
    names = [launch.name.split()[0] for launch in found.launches.values()]
    assert names == ["count_kernel", "base_kernel", "scatter_kernel"]
    assert found.items["plan"] == found.items["again"] == list(found.launches)
    assert "E_BLOCK=8" in found.launches[found.items["plan"][0]].name


PROGRAM = """
import json, sys, torch
from bench import gpu_compile
from moe_fast.triton_ops.plan import plan

ids = torch.empty(4096 + 17, 2, dtype=torch.int64, device="meta")
with gpu_compile.instead_of_a_gpu():
    found = gpu_compile.collect([("plan", lambda: plan(ids, 4))])
    launches = list(found.launches.values())
    if sys.argv[1] == "compile":
        kernels = {}
        gpu_compile.compile_all(launches, 2, 600, kernels.__setitem__)
        print(json.dumps([kernels[n] for n in range(len(launches))]))
    else:
        with gpu_compile.counting_compilations() as compiled:
            for launch in launches:
                launch.kernel.warmup(*launch.args, grid=(1,), **launch.kwargs)
        print(json.dumps([len(launches), compiled.names]))
"""


@pytest.mark.slow
def test_a_later_process_finds_what_was_compiled(tmp_path):
    """The key is that of a launch: a second process, as the run itself, compiles nothing."""
    environment = dict(TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET=None)
    done = run("-c", PROGRAM, "compile", **environment)
    assert done.returncode == 0, done.stderr
    kernels = json.loads(done.stdout)
    assert len(kernels) == 3 and not any("error" in kernel for kernel in kernels)
    assert all(k["registers"] > 8 and k["spilled_bytes"] == 0 for k in kernels)
    assert all(k["processor_seconds"] > 0 for k in kernels)
    done = run("-c", PROGRAM, "launch", **environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [3, []]
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "another")
    done = run("-c", PROGRAM, "launch", **environment)
    assert len(json.loads(done.stdout)[1]) == 3, done.stderr


def test_a_kernel_that_does_not_compile_is_recorded(monkeypatch):
    class Broken:
        __name__ = "broken_kernel"

        def warmup(self, *args, **kwargs):
            raise RuntimeError("no such instruction")

    found = {}
    launches = [gpu_compile.Launch(Broken(), (), {"BM": 64})]
    gpu_compile.compile_all(launches, 2, 60, found.__setitem__)
    error = "RuntimeError: no such instruction"
    assert found == {0: {"name": "broken_kernel BM=64", "error": error}}


def test_compiling_stops_when_its_time_is_up():
    class Slow:
        __name__ = "slow_kernel"

        def warmup(self, *args, **kwargs):
            import time

            time.sleep(60)

    found = {}
    gpu_compile.compile_all([gpu_compile.Launch(Slow(), (), {})] * 3, 2, 0.2, found.__setitem__)
    assert not found
