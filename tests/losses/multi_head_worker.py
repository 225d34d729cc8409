"""What the processes of test_multi_head_processes.py do."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from three_head_oracle import ThreeHeadEncoder, texts
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from moe_fast.losses import CachedLoss, MultiHeadInfoNCELoss

ROWS = {2: [5, 3], 3: [2, 4, 2]}  # of each process: uneven
CASES = {
    "pairs": dict(columns=2),
    "hard negatives": dict(columns=3),
    "queries of negatives": dict(columns=4, queries_per_negative=1),
    "floor": dict(columns=2, sparse_floor=1.0, sparse_margin=5.0),
    "equal texts": dict(columns=2, repeated=True),
}


def whole_batch(case: str) -> list[dict[str, Tensor]]:
    """All 8 rows of a case."""
    columns = texts(8, CASES[case]["columns"])
    if CASES[case].get("repeated"):  # rows of different processes have the same positive
        for values in columns[1].values():
            values[7] = values[0]
    return columns


def trained(model: nn.Module, case: str, rows: slice, cached: bool) -> dict[str, Tensor]:
    """The loss of some rows, and the gradient of every parameter."""
    settings = {k: v for k, v in CASES[case].items() if k not in ("columns", "repeated")}
    settings = {"sparse_floor": 0.0, "temperature": 0.2} | settings
    loss = MultiHeadInfoNCELoss(model, gather_across_devices=True, **settings)
    columns = [{k: v[rows] for k, v in column.items()} for column in whole_batch(case)]
    loss.zero_grad()
    value = (CachedLoss(loss, tokens_per_chunk=25) if cached else loss)(columns)
    value.backward()
    grads = {n.split("model.")[-1].removeprefix("module."): p.grad.clone()
             for n, p in loss.named_parameters()}  # fmt: skip
    return {"loss": value.detach(), **grads}


def run(folder: Path) -> None:
    """Train as one of several data-parallel processes, and write what was found."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=(folder / "rendezvous").as_uri(), rank=rank, world_size=world_size
    )
    first = sum(ROWS[world_size][:rank])
    rows = slice(first, first + ROWS[world_size][rank])
    model = DistributedDataParallel(ThreeHeadEncoder())
    found = {
        f"{case}, {cached}: {name}": value
        for case in CASES
        for cached in (False, True)
        for name, value in trained(model, case, rows, cached).items()
    }
    save_file(found, folder / f"{rank}.safetensors")
