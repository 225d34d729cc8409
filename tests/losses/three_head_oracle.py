"""The published losses of three heads, written with B x L x V and B x B x L x L tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

F64 = torch.float64
VOCABULARY, HIDDEN, DIM = 40, 6, 5
SPECIAL = (0, 1, 2)  # CLS, EOS, PAD


class ThreeHeadEncoder(nn.Module):
    """Token embeddings mixed within a text, and three heads; no sentence-transformers needed."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Parameter(
            torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=F64)
        )
        self.sparse = nn.Linear(HIDDEN, 1, dtype=F64)
        self.colbert = nn.Linear(HIDDEN, DIM, dtype=F64)
        with torch.no_grad():
            for parameter in (*self.sparse.parameters(), *self.colbert.parameters()):
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=F64))

    def hidden(self, features: dict[str, Tensor]) -> Tensor:
        """[B, L, D]: each token, and the mean of the text's real tokens."""
        mask = features["attention_mask"][..., None].to(F64)
        tokens = self.embedding[features["input_ids"]]
        return tokens + (tokens * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        hidden, real = self.hidden(features), features["attention_mask"].bool()
        first = real.cumsum(1) == 1
        ids = features["input_ids"]
        return dict(features) | {
            "sentence_embedding": hidden[:, 0],
            "token_logits": self.sparse(hidden)[..., 0],
            "lexical_mask": real & ~torch.isin(ids, torch.tensor(SPECIAL)),
            "multi_vectors": F.normalize(self.colbert(hidden), dim=-1),
            "multi_vector_mask": real & ~first,
        }


def texts(rows: int, columns: int, seed: int = 0, longest: int = 9) -> list[dict[str, Tensor]]:
    """Random padded texts: CLS, 1 to ``longest`` words, EOS."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(columns):
        lengths = torch.randint(1, longest + 1, (rows,), generator=generator)
        ids = torch.full((rows, int(lengths.max()) + 2), 2)
        for row, n in enumerate(lengths.tolist()):
            ids[row, 0] = 0
            ids[row, 1 : n + 1] = torch.randint(3, VOCABULARY, (n,), generator=generator)
            ids[row, n + 1] = 1
        found.append({"input_ids": ids, "attention_mask": (ids != 2).long()})
    return found


def scores(model: ThreeHeadEncoder, query: dict, passage: dict) -> dict[str, Tensor]:
    """[B, N] of each head and of the sum, by the published definition."""
    q, p = model.hidden(query), model.hidden(passage)
    dense = F.normalize(q[:, 0], dim=-1) @ F.normalize(p[:, 0], dim=-1).T

    def bag(features: dict, hidden: Tensor) -> Tensor:
        weights = torch.relu(model.sparse(hidden))  # [B, L, 1]
        spread = torch.zeros(*features["input_ids"].shape, VOCABULARY, dtype=F64)
        spread = spread.scatter(2, features["input_ids"][..., None], weights)
        whole = spread.max(dim=1).values
        return whole * torch.tensor([i not in SPECIAL for i in range(VOCABULARY)])

    sparse = bag(query, q) @ bag(passage, p).T
    m, n = (F.normalize(model.colbert(x[:, 1:]), dim=-1) for x in (q, p))
    similar = torch.einsum("aid,bjd->abij", m, n)
    similar = similar.masked_fill(passage["attention_mask"][None, :, None, 1:] == 0, -9.0)
    counted = query["attention_mask"][:, 1:].to(F64)
    multi = (similar.amax(-1) * counted[:, None]).sum(-1) / counted.sum(1)[:, None]
    return dict(dense=dense, sparse=sparse, multi=multi, all=dense + 0.3 * sparse + multi)


def loss(
    model: ThreeHeadEncoder,
    columns: list[dict],
    *,
    temperature: float = 0.02,
    distils: bool = True,
    teacher: Tensor | None = None,
) -> Tensor:
    """The published loss of a batch, all of whose texts differ."""
    parts = [scores(model, columns[0], passages) for passages in columns[1:]]
    s = {name: torch.cat([part[name] for part in parts], 1) / temperature for name in parts[0]}
    rows, passages = len(columns[0]["input_ids"]), len(columns) - 1

    def cross_entropy(name: str) -> Tensor:
        total = torch.zeros((), dtype=F64)
        for i in range(rows):
            own = [c * rows + i for c in range(passages)]
            shares = [1.0] + [0.0] * (passages - 1)
            if teacher is not None:
                shares = teacher[i].softmax(0).tolist()
            for g, share in enumerate(shares):
                kept = [j for j in range(s[name].shape[1]) if j not in own[:g]]
                total = total + share * (s[name][i, kept].logsumexp(0) - s[name][i, own[g]])
        return total / rows

    value = cross_entropy("dense") + cross_entropy("all") + cross_entropy("multi")
    value = (value + 0.1 * cross_entropy("sparse")) / 4
    if not distils:
        return value
    targets = s["all"].detach().softmax(1)
    taught = {n: -(targets * s[n].log_softmax(1)).sum(1).mean() for n in s}
    return (value + (taught["dense"] + 0.1 * taught["sparse"] + taught["multi"]) / 3) / 2
