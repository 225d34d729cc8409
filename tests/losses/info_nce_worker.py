"""What the processes of test_global_info_nce.py do."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from toy_encoder import BagEncoder, column

from moe_fast.losses import ContrastiveLearningPenaltyLoss, InfoNCELoss
from moe_fast.losses.functional import global_info_nce
from moe_fast.ops.info_nce import tiles as logit_tiles

ROWS = {2: [5, 3], 3: [2, 5, 1]}  # of each process: uneven, and one alone
PER_ROW = {2: 0, 3: 2}  # hard negatives
CASES = {
    "symmetric": dict(),
    "one way, dot": dict(symmetric=False, similarity="dot"),
    "smoothed": dict(label_smoothing=0.2),
    "masked": dict(ids=("row_ids", "domain_ids", "weights")),
    "groups": dict(ids=("row_ids", "group_ids", "weights"), label_smoothing=0.1),
}


def batch(world_size: int) -> dict[str, Tensor]:
    """The whole batch; hard negatives in the order of rows."""
    generator = torch.Generator().manual_seed(world_size)
    rows = sum(ROWS[world_size])
    hard = rows * PER_ROW[world_size]
    draw = lambda n: torch.randn(n, 5, generator=generator, dtype=torch.float64)  # noqa: E731
    integers = lambda n, high: torch.randint(0, high, (n,), generator=generator)  # noqa: E731
    return dict(
        a=draw(rows),
        b=draw(rows),
        negatives=draw(hard),
        row_ids=integers(rows, 7),
        col_ids=integers(rows + hard, 20),
        domain_ids=integers(rows, 2),
        group_ids=integers(rows, 5),
        weights=torch.rand(rows, generator=generator, dtype=torch.float64),
    )


def share(whole: dict[str, Tensor], rank: int, world_size: int) -> dict[str, Tensor]:
    """What one process holds of the whole batch."""
    first, last = (sum(ROWS[world_size][:r]) for r in (rank, rank + 1))
    low, high = first * PER_ROW[world_size], last * PER_ROW[world_size]
    mine = {name: values[first:last] for name, values in whole.items()}
    mine["negatives"] = whole["negatives"][low:high]
    hard_ids = whole["col_ids"][len(whole["a"]) :]
    mine["col_ids"] = torch.cat([whole["col_ids"][first:last], hard_ids[low:high]])
    return mine


ODD = {  # the whole batch, where the parts are odd ones; by what it changes
    "a zero vector": lambda x: {"a": x["a"].index_fill(0, torch.tensor([1, 6]), 0.0)},
    "all alike": lambda x: {"a": torch.ones_like(x["a"]), "b": torch.ones_like(x["b"])},
    "d = 1": lambda x: {"a": x["a"][:, :1], "b": x["b"][:, :1]},
    "a row alone in its domain": lambda x: {"domain_ids": torch.tensor([0] * 6 + [1, 0])},
    "weights of 0": lambda x: {"weights": torch.tensor([0.0] * 5 + [1.0, 0.0, 2.0])},
}


def odd_batch(name: str, world_size: int) -> dict[str, Tensor]:
    """Arguments of one of :data:`ODD`; no hard negatives."""
    whole = batch(world_size)
    return {"a": whole["a"], "b": whole["b"]} | ODD[name](whole)


def odd_results(rank: int, world_size: int) -> dict[str, Tensor]:
    """Loss and gradients of every odd batch, from each process's rows of it."""
    found = {}
    first, last = (sum(ROWS[world_size][:r]) for r in (rank, rank + 1))
    for name in ODD:
        for exchange in ("gather", "ring"):
            mine = {n: t[first:last].clone() for n, t in odd_batch(name, world_size).items()}
            leaves = {n: mine[n].requires_grad_() for n in ("a", "b")}
            loss = global_info_nce(**mine, scale=3.0, exchange=exchange)
            loss.backward()
            key = f"{name}, {exchange}"
            found |= {f"{key}: loss": loss.detach()}
            found |= {f"{key}: {n}": t.grad for n, t in leaves.items()}
    return found


def arguments(case: str, tensors: dict[str, Tensor]) -> dict:
    """Keyword arguments of a case."""
    settings = dict(CASES[case])
    names = settings.pop("ids", ())
    chosen = {name: tensors[name] for name in names}
    if "row_ids" in names:
        chosen["col_ids"] = tensors["col_ids"]
    return settings | chosen


def results(rank: int, world_size: int) -> dict[str, Tensor]:
    """Loss, statistics and gradients of every case and exchange."""
    found = {}
    for case in CASES:
        for exchange in ("gather", "ring"):
            mine = share(batch(world_size), rank, world_size)
            leaves = {name: mine[name].requires_grad_() for name in ("a", "b", "negatives")}
            scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
            hard = leaves["negatives"] if len(leaves["negatives"]) else None
            loss, stats = global_info_nce(
                leaves["a"],
                leaves["b"],
                hard,
                scale=scale,
                exchange=exchange,
                return_stats=True,
                **arguments(case, mine),
            )
            (2 * loss).backward()
            key = f"{case}, {exchange}"
            found |= {f"{key}: {n}": t.grad for n, t in leaves.items() if t.grad is not None}
            found |= {f"{key}: loss": loss.detach(), f"{key}: scale": scale.grad}
            found |= {f"{key}: rank": stats.rank, f"{key}: row_loss": stats.row_loss}
    singles = [batch(world_size)[name][: 2 + rank].float() for name in ("a", "b")]
    losses = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(global_info_nce(*singles, scale=20.0))
    return found | {"autocast": torch.stack(losses)}


TEXTS = torch.arange(24).reshape(8, 3) % 11  # 8 rows of 3 tokens, some texts equal


def losses(model: nn.Module) -> dict[str, nn.Module]:
    """Losses over all processes' rows."""
    kwargs = dict(gather_across_devices=True, symmetric=True, temperature=0.5)
    return {
        "InfoNCELoss": InfoNCELoss(model, exchange="ring", learn_temperature=True, **kwargs),
        "ContrastiveLearningPenaltyLoss": ContrastiveLearningPenaltyLoss(
            model, queries_per_negative=1, penalty_weight=0.4, **kwargs
        ),
        "of in-batch pairs": ContrastiveLearningPenaltyLoss(model, penalty_weight=0.4, **kwargs),
    }


def trained(model: nn.Module, rows: slice) -> dict[str, Tensor]:
    """The gradient of every parameter, and the metrics, of each loss over some rows."""
    found = {}
    for name, loss in losses(model).items():
        loss.double().zero_grad()
        count = 2 if name == "of in-batch pairs" else 4
        columns = [column(*(5 * i + TEXTS)[rows].tolist()) for i in range(count)]
        value = loss(columns)
        value.backward()
        found |= {f"{name}: loss": value.detach()}
        grads = {n.split(".")[-1]: p.grad for n, p in loss.named_parameters()}
        found |= {
            f"{name}: {n}": g.full_tensor() if isinstance(g, DTensor) else g
            for n, g in grads.items()
        }
        if "penalty" in loss.last_metrics:
            found[f"{name}: penalty"] = loss.last_metrics["penalty"]
        with torch.no_grad():
            # Evaluation: the others do not call, and are not waited for, but by sharded weights.
            if rows.start == 0 or isinstance(model, FSDPModule):
                loss(columns)
    return found


def trained_in_parallel(rank: int, world_size: int) -> dict[str, Tensor]:
    """As one of several data-parallel processes; a loss's own parameters are averaged by hand."""
    rows = slice(*(sum(ROWS[world_size][:r]) for r in (rank, rank + 1)))
    mesh = init_device_mesh("cpu", (world_size,))
    found = {
        f"{how}, {name}": value
        for how, model in (
            ("DDP", DistributedDataParallel(BagEncoder())),
            ("FSDP2", fully_shard(BagEncoder(), mesh=mesh)),
        )
        for name, value in trained(model, rows).items()
    }
    for name, gradient in found.items():
        if name.endswith("log_temperature"):
            dist.all_reduce(gradient)
            gradient /= world_size
    return found


def refused(message: str, **given: Tensor) -> None:
    """Raise unless a batch with these in place of its own is refused with ``message``."""
    x = torch.ones(3, 4)
    try:
        global_info_nce(**{"a": x, "b": x, "scale": 1.0} | given)
    except ValueError as error:
        assert message in str(error), str(error)
    else:
        raise AssertionError(f"no error: {message}")


def expect_refusal(rank: int) -> dict[str, Tensor]:
    """Batches that do not fit together, or are bad in one process, are errors in all."""
    x = torch.randn(3, 4)
    with_nan = x.clone()
    with_nan[2] = torch.nan
    elsewhere = "process 1 cannot use its batch"
    other = torch.randn(3, 5)
    cases = [  # what process 1 gives, and what process 0 and 1 are told
        (dict(a=other, b=other), *["the same embedding dimension d; got [4, 5]"] * 2),
        (
            dict(a=x.bfloat16(), b=x.bfloat16()),
            *["the same dtype; got ['float32', 'bfloat16']"] * 2,
        ),
        (dict(negatives=x), *["hard negatives per row; got [0, 1]"] * 2),
        (dict(b=with_nan), elsewhere, "b must be finite; row 2"),
        (dict(b=1e25 * x), elsewhere, "b must hold values up to 9.2e+18"),
        (dict(b=x[:2]), elsewhere, "b must have shape"),
        (dict(weights=x[:, 0].abs() - 9), elsewhere, "weights must be >= 0 and finite"),
    ]
    for given, *messages in cases:
        refused(messages[rank], **(given if rank else {}))
    refused("weights must not all be 0; they are in every process", weights=torch.zeros(3))
    return {"done": torch.ones(())}


def be_killed(rank: int) -> dict[str, Tensor]:
    """Process 1 dies where the others wait for it."""
    x = torch.randn(3, 4, requires_grad=True)
    loss = global_info_nce(x, x.detach(), scale=1.0)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    loss.backward()
    return {}


def run(folder: Path, task: str) -> None:
    """Do a task as one of several processes, and write what was found into the folder."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    logit_tiles.TILE_ROWS["cpu"] = 2
    dist.init_process_group(
        "gloo",
        init_method=(folder / "rendezvous").as_uri(),
        rank=rank,
        world_size=world_size,
    )
    tasks = {
        "results": lambda: (
            results(rank, world_size)
            | odd_results(rank, world_size)
            | trained_in_parallel(rank, world_size)
        ),
        "refusal": lambda: expect_refusal(rank),
        "killed": lambda: be_killed(rank),
    }
    found = {name: value.detach().contiguous() for name, value in tasks[task]().items()}
    save_file(found, folder / f"{rank}.safetensors")
