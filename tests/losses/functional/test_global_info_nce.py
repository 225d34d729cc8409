"""info_nce over several gloo processes: the loss and gradients of one with the whole batch."""

from __future__ import annotations

import re

import pytest
import torch
from info_nce_worker import (
    CASES,
    ODD,
    PER_ROW,
    arguments,
    batch,
    odd_batch,
    run,
    share,
    trained,
)
from loss_checks import assert_close
from processes import KILLED, Run
from safetensors.torch import load_file
from toy_encoder import BagEncoder

from moe_fast import ops
from moe_fast.losses.functional import global_info_nce


@pytest.fixture(scope="module", params=[2, 3])
def several(request, tmp_path_factory) -> list[dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("global")
    Run(folder / "log", request.param, run, folder, "results").expect_success()
    return [load_file(folder / f"{rank}.safetensors") for rank in range(request.param)]


@pytest.mark.parametrize("exchange", ["gather", "ring"])
@pytest.mark.parametrize("case", CASES)
def test_processes_are_one_with_the_whole_batch(several, case, exchange):
    """The mean over processes of their gradients, as data-parallel training takes it."""
    world_size = len(several)
    whole = batch(world_size)
    leaves = {name: whole[name].requires_grad_() for name in ("a", "b", "negatives")}
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    hard = leaves["negatives"] if PER_ROW[world_size] else None
    loss, stats = ops.info_nce(
        leaves["a"],
        leaves["b"],
        hard,
        scale=scale,
        return_stats=True,
        backend="torch",
        **arguments(case, whole),
    )
    (2 * loss).backward()
    found = [
        {
            n.removeprefix(f"{case}, {exchange}: "): t
            for n, t in one.items()
            if n.startswith(f"{case}, {exchange}:")
        }
        for one in several
    ]
    for one in found:
        assert_close(one["loss"], loss.detach())
    assert torch.equal(torch.cat([one["rank"] for one in found]), stats.rank)
    assert_close(torch.cat([one["row_loss"] for one in found]), stats.row_loss)
    assert_close(sum(one["scale"] for one in found) / world_size, scale.grad)
    for name, leaf in leaves.items():
        if leaf.grad is not None:
            assert leaf.grad.abs().max() > 1e-3
            assert_close(torch.cat([one[name] for one in found]) / world_size, leaf.grad)


@pytest.mark.parametrize("exchange", ["gather", "ring"])
@pytest.mark.parametrize("name", ODD)
def test_odd_batches(several, name, exchange):
    whole = odd_batch(name, len(several))
    a, b = (whole.pop(n).requires_grad_() for n in ("a", "b"))
    expected = ops.info_nce(a, b, scale=3.0, backend="torch", **whole)
    expected.backward()
    for one in several:
        assert_close(one[f"{name}, {exchange}: loss"], expected.detach())
    for side, leaf in (("a", a), ("b", b)):
        parts = torch.cat([one[f"{name}, {exchange}: {side}"] for one in several])
        assert_close(parts / len(several), leaf.grad)


@pytest.mark.parametrize("how", ["DDP", "FSDP2"])
def test_losses_under_data_parallel_training_too(several, how):
    """Encoder and temperature; the penalty is over all rows as well."""
    expected = trained(BagEncoder(), slice(0, 8))
    for one in several:
        for name, value in expected.items():
            assert value.abs().max() > 1e-3
            assert_close(one[f"{how}, {name}"], value)


def test_autocast_does_not_touch_the_loss(several):
    for one in several:
        assert one["autocast"].dtype == torch.float32
        assert one["autocast"][0] == one["autocast"][1]


def test_each_process_alone_would_give_something_else():
    """So that the test above cannot pass without the exchange."""
    whole = batch(2)
    losses = [
        ops.info_nce(mine["a"], mine["b"], scale=3.0)
        for mine in (share(whole, rank, 2) for rank in range(2))
    ]
    expected = ops.info_nce(whole["a"], whole["b"], scale=3.0)
    assert (sum(losses) / 2 - expected).abs() > 0.1


def test_what_does_not_fit_is_an_error_in_every_process(tmp_path):
    Run(tmp_path / "log", 2, run, tmp_path, "refusal").expect_success()


def test_a_killed_process_ends_the_others(tmp_path):
    """With an error of their own: no one waits for ever."""
    processes = Run(tmp_path / "log", 3, run, tmp_path, "killed")
    assert processes.codes() == [1, KILLED, 1], processes.tail()
    errors = re.findall(r"^(?:\w+\.)*(?:RuntimeError|Dist\w*Error): ", processes.tail(), re.M)
    assert len(errors) == 2, processes.tail()


def test_one_process_is_the_op_itself():
    a, b = torch.randn(4, 3), torch.randn(4, 3)
    assert torch.equal(global_info_nce(a, b, scale=2.0), ops.info_nce(a, b, scale=2.0))


def test_an_unknown_exchange_is_named():
    with pytest.raises(ValueError, match="exchange must be one of 'gather', 'ring'; got 'star'"):
        global_info_nce(torch.ones(2, 3), torch.ones(2, 3), scale=1.0, exchange="star")
