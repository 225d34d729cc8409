"""One process of test_global_batch: its share of the rows through a data-parallel encoder.

Usage: ddp_worker.py RANK WORLD_SIZE RENDEZVOUS_FILE RESULT_FILE
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from moe_fast.layers import MoEMLP, RoutingInfo
from moe_fast.losses import ContrastiveLearningPenaltyLoss, RouterLoss

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


def train(model: nn.Module, rows: slice) -> dict[str, Tensor]:
    """The gradients of each step, the terms and the running joint.

    The penalty alone is a mean over rows, so that two halves average to the whole.
    """
    penalty = ContrastiveLearningPenaltyLoss(model, penalty_weight=1.0, mask_duplicates=False)
    loss = RouterLoss(penalty, **COEFFICIENTS, num_domains=3, joint_decay=0.6).double()
    results = {}
    for step in range(STEPS):
        model.zero_grad()
        columns = [{k: v[rows] for k, v in column.items()} for column in global_batch(step)]
        loss(columns).backward()
        for name, parameter in model.named_parameters():
            results[f"{step}.{name.removeprefix('module.')}"] = parameter.grad.clone()
        results |= {f"{step}.{name}": loss.last_metrics[name] for name in COEFFICIENTS}
    if rows.start == 0:  # evaluation: the other process does not call, and is not waited for
        with torch.no_grad():
            loss(columns)
    return results | {"running_joint": loss.running_joint}


def main() -> None:
    rank, world_size, rendezvous, result = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=Path(rendezvous).as_uri(),
        rank=int(rank),
        world_size=int(world_size),
    )
    share = 6 // int(world_size)
    rows = slice(int(rank) * share, (int(rank) + 1) * share)
    results = train(DistributedDataParallel(Encoder().double()), rows)
    save_file({name: value.detach().contiguous() for name, value in results.items()}, result)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
