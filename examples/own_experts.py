"""Bring your own experts: modules of any kind, routed and combined by moe_fast's operations.

    python examples/own_experts.py

`route` chooses experts per token, `plan` sorts the (token, expert) pairs by expert, `gather_rows`
copies each token to its rows, and `combine_rows` adds up what the experts made of them. What lies
between the last two is yours: each expert sees its rows as one contiguous tensor.
"""

import torch
from torch import nn

from moe_fast.ops import combine_rows, gather_rows, plan, route


class OwnExperts(nn.Module):
    """A mixture of any modules that map [rows, dim] to [rows, dim].

    Args:
        experts: the modules, E of them; they need not be of one kind or size.
        dim: the width of a token's vector.
        num_experts_per_tok: K, how many of the experts each token visits.
    """

    def __init__(self, experts: list[nn.Module], dim: int, num_experts_per_tok: int):
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.router = nn.Linear(dim, len(experts), bias=False)
        self.num_experts_per_tok = num_experts_per_tok

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, dim] -> [T, dim]."""
        routing = route(x, self.router.weight, num_experts_per_tok=self.num_experts_per_tok)
        order = plan(routing.top_k_index, len(self.experts))
        rows = gather_rows(x, order)
        counts = order.expert_offsets.diff().tolist()
        parts = rows.split(counts)
        outputs = [expert(part) for expert, part in zip(self.experts, parts, strict=True)]
        return combine_rows(torch.cat(outputs), routing.top_k_weights, order)


def main(steps=200):
    """Fit a function that is another one on either side of a plane; return the losses."""
    torch.manual_seed(0)
    dim = 8
    experts = [
        nn.Linear(dim, dim),
        nn.Sequential(nn.Linear(dim, 2), nn.Linear(2, dim)),  # of low rank
        nn.Sequential(nn.Linear(dim, 32), nn.GELU(), nn.Linear(32, dim)),
    ]
    layer = OwnExperts(experts, dim, num_experts_per_tok=2)
    x = torch.randn(256, dim)
    target = torch.where(x[:, :1] > 0, 2 * x, x.flip(1))
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
    losses = []
    for _ in range(steps):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"mean squared error: {losses[0]:.3f} at first, {losses[-1]:.3f} after {steps} steps")
    return losses


if __name__ == "__main__":
    main()
