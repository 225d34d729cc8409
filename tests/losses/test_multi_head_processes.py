"""MultiHeadInfoNCELoss over several gloo processes: the step of one with the whole batch."""

from __future__ import annotations

import pytest
import torch
from loss_checks import assert_close
from multi_head_worker import CASES, run, trained, whole_batch
from processes import Run
from safetensors.torch import load_file
from three_head_oracle import ThreeHeadEncoder


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def several(request, tmp_path_factory) -> list[dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("heads")
    Run(folder / "log", request.param, run, folder).expect_success()
    return [load_file(folder / f"{rank}.safetensors") for rank in range(request.param)]


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_processes_are_one_with_the_whole_batch(several, case, cached):
    assert len(whole_batch(case)[0]["input_ids"]) == 8
    expected = trained(ThreeHeadEncoder(), case, slice(None), cached)
    for name, value in expected.items():
        for found in several:  # data-parallel training has averaged the gradients
            assert_close(found[f"{case}, {cached}: {name}"], value)
