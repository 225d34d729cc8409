"""MaxSim's kernels compiled ahead of time for GPUs that are not here: no spills, tensor cores."""

from __future__ import annotations

import pytest
import torch

from bench import triton_resources as resources

from .processes import needs_triton


@needs_triton
@pytest.mark.parametrize(
    ("target", "dtype"),
    [
        ("sm_90", torch.bfloat16),
        pytest.param("sm_80", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("sm_90", torch.float32, marks=pytest.mark.slow),
        pytest.param("sm_80", torch.float16, marks=pytest.mark.slow),
    ],
)
def test_nothing_spills(monkeypatch, tmp_path, target, dtype):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    from moe_fast.ops.maxsim.triton import forward, gradients

    def new(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    starts = new(9, dtype=torch.int64), new(17, dtype=torch.int64)
    vectors = new(1024, 384), new(2048, 384)
    with resources.recorded(target) as launches:
        forward(*vectors, *starts, True)
        gradients(new(8, 16, dtype=torch.float32), *vectors, *starts, True)
    kernels = {}
    for launch in launches:
        used = resources.compile_launch(launch, target)
        assert not resources.faults(launch, target, used)
        kernels.setdefault(launch.kernel.__name__, []).append(used)
    assert len(kernels) == 4
    for used in kernels["maxsim_best_kernel"] if dtype != torch.float32 else ():
        assert used.tensor_cores
