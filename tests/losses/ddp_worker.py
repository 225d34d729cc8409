"""One process of test_global_sum: its share of the rows through a data-parallel encoder."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from moe_fast.layers import MoEMLP, RoutingInfo
from moe_fast.losses import CachedLoss, ContrastiveLearningPenaltyLoss, RouterLoss

COEFFICIENTS = {
    "load_balance": 0.3,
    "z_loss": 0.2,
    "mutual_information": 0.7,
    "expert_supervision": 0.4,
}
STEPS = 2


class Encoder(nn.Module):
    """Embeddings, two mixtures, the mean over real tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(40, 6)
        self.layers = nn.ModuleList([MoEMLP(6, 8, 3, 2) for _ in range(2)])

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        mask = features["attention_mask"].bool()
        x = 3 * self.embedding(features["input_ids"])
        for layer in self.layers:
            x = x + layer(x, routing=RoutingInfo(token_mask=mask))
        real = mask[..., None].to(x.dtype)
        return {"sentence_embedding": (x * real).sum(1) / real.sum(1)}


def global_batch(step: int) -> list[dict[str, Tensor]]:
    """Six rows; the second half has the longer texts and other domains."""
    generator = torch.Generator().manual_seed(step)
    lengths = torch.tensor([2, 1, 3, 9, 8, 7])
    mask = (torch.arange(9) < lengths[:, None]).long()
    domains = torch.tensor([0, 0, 1, 1, 2, 2])
    ids = [torch.randint(0, 40, (6, 9), generator=generator) for _ in range(2)]
    return [{"input_ids": i, "attention_mask": mask, "domain_ids": domains} for i in ids]


def train(model: nn.Module, rows: slice, tokens: int | None = None) -> dict[str, Tensor]:
    """The gradients of each step, the terms and the running joint; in chunks of some tokens.

    The penalty alone is a mean over rows, so that two halves average to the whole.
    """
    penalty = ContrastiveLearningPenaltyLoss(model, penalty_weight=1.0, mask_duplicates=False)
    loss = RouterLoss(penalty, **COEFFICIENTS, num_domains=3, joint_decay=0.6).double()
    if tokens is not None:
        loss = CachedLoss(loss, tokens_per_chunk=tokens)
    results = {}
    for step in range(STEPS):
        model.zero_grad()
        columns = [{k: v[rows] for k, v in column.items()} for column in global_batch(step)]
        loss(columns).backward()
        for name, parameter in model.named_parameters():
            results[f"{step}.{name.removeprefix('module.')}"] = whole(parameter.grad)
        results |= {f"{step}.{name}": loss.last_metrics[name] for name in COEFFICIENTS}
    sharded = isinstance(model, FSDPModule)
    if rows.start == 0 and not sharded:  # the other does not evaluate, and is not waited for
        with torch.no_grad():
            loss(columns)
    results |= {
        "accumulated." + name: value for name, value in accumulate(model, loss, rows).items()
    }
    return results | {
        k.removeprefix("loss."): v for k, v in loss.state_dict().items() if "joint" in k
    }


def accumulate(model: nn.Module, loss: nn.Module, rows: slice) -> dict[str, Tensor]:
    """The gradients of two batches, of which the processes exchange the sum alone."""
    model.zero_grad()
    for step in range(STEPS):
        waits = step < STEPS - 1 and isinstance(model, DistributedDataParallel)
        columns = [{k: v[rows] for k, v in column.items()} for column in global_batch(step)]
        with model.no_sync() if waits else nullcontext():
            loss(columns).backward()
    named = model.named_parameters()
    return {name.removeprefix("module."): whole(p.grad) for name, p in named}


def whole(gradient: Tensor) -> Tensor:
    """A copy, put together where it is sharded."""
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient.clone()


def wrapped(model: nn.Module, sharded: bool) -> nn.Module:
    if not sharded:
        return DistributedDataParallel(model)
    for layer in model.layers:
        fully_shard(layer, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


def run(folder: Path, tokens: int | None, sharded: bool) -> None:
    """Train on this process's rows, and write what was found into the folder."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=(folder / "rendezvous").as_uri(),
        rank=rank,
        world_size=world_size,
    )
    share = 6 // world_size
    rows = slice(rank * share, (rank + 1) * share)
    results = train(wrapped(Encoder().double(), sharded), rows, tokens)
    found = {name: value.detach().contiguous() for name, value in results.items()}
    save_file(found, folder / f"{rank}.safetensors")
