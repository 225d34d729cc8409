"""What the routers of a tiny encoder did, read outside the losses, and the terms by loops."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from sentence_transformers import SentenceTransformer
from tiny_models import DOMAINS, features_of
from torch import Tensor


@dataclass
class Token:
    """One real token: its logits in each layer, its experts in each layer, its text."""

    logits: list[Tensor]  # [E] each
    experts: list[list[int]]
    text: int


def batch_of(model: SentenceTransformer, pairs, *names: str) -> list[dict[str, Tensor]]:
    """Features of some text columns, with domain ids."""
    domain_ids = torch.tensor([DOMAINS.index(domain) for domain in pairs["domain"]])
    columns = features_of(model, *(list(pairs[name]) for name in names))
    return [column | {"domain_ids": domain_ids.clone()} for column in columns]


def encoder_of(model: SentenceTransformer) -> torch.nn.Module:
    return next(m for m in model.modules() if hasattr(m, "moe_mlps"))


def real_tokens(
    model: SentenceTransformer, columns: list[dict[str, Tensor]], k: int
) -> list[Token]:
    """By the encoder's own ``router_logits``, a column at a time; its weights are trained by it."""
    tokens, texts = [], 0
    for column in columns:
        ids, mask = column["input_ids"], column["attention_mask"]
        output = encoder_of(model)(
            input_ids=ids, attention_mask=mask, output_router_logits=True
        ).router_logits
        layers = [logits.view(*ids.shape, -1) for logits in output]
        for row in range(len(ids)):
            for place in range(ids.shape[1]):
                if mask[row, place]:
                    logits = [layer[row, place] for layer in layers]
                    experts = [sorted(range(len(v)), key=lambda e, v=v: -v[e])[:k] for v in logits]
                    tokens.append(Token(logits, experts, texts + row))
        texts += len(ids)
    return tokens


def probabilities(logits: Tensor) -> Tensor:
    return logits.exp() / logits.exp().sum()


def load_balance(tokens: list[Token]) -> Tensor:
    total = 0
    for layer in range(len(tokens[0].logits)):
        slots = [e for t in tokens for e in t.experts[layer]]
        experts = len(tokens[0].logits[layer])
        mean = sum(probabilities(t.logits[layer]) for t in tokens) / len(tokens)
        total = total + experts * sum(slots.count(e) / len(slots) * mean[e] for e in range(experts))
    return total


def z_loss(tokens: list[Token]) -> Tensor:
    return sum(v.exp().sum().log() ** 2 for t in tokens for v in t.logits) / len(tokens)


def joint(tokens: list[Token], domains: list[int], layer: int) -> Tensor:
    """[D, E] of one layer."""
    rows = [torch.zeros_like(tokens[0].logits[layer]) for _ in DOMAINS]
    for t in tokens:
        rows[domains[t.text]] = rows[domains[t.text]] + probabilities(t.logits[layer]) / len(tokens)
    return torch.stack(rows)


def information(table: Tensor) -> Tensor:
    """In nats, of a joint distribution."""
    total = 0
    for d in range(table.shape[0]):
        for e in range(table.shape[1]):
            if table[d, e] > 0:
                total = (
                    total + table[d, e] * (table[d, e] / (table[d].sum() * table[:, e].sum())).log()
                )
    return total


def expert_supervision(tokens: list[Token], domains: list[int]) -> Tensor:
    losses = []
    for text, domain in enumerate(domains):
        values = [v for t in tokens if t.text == text for v in t.logits]
        losses.append(-probabilities(sum(values) / len(values))[domain].log())
    return sum(losses) / len(losses)


def terms(model, columns, k: int = 1) -> dict[str, Tensor]:
    """Each term by name, without a coefficient; mutual information summed over layers."""
    tokens = real_tokens(model, columns, k)
    domains = [int(d) for column in columns for d in column["domain_ids"]]
    layers = range(len(tokens[0].logits))
    return {
        "load_balance": load_balance(tokens),
        "z_loss": z_loss(tokens),
        "mutual_information": sum(information(joint(tokens, domains, la)) for la in layers),
        "expert_supervision": expert_supervision(tokens, domains),
    }


LOG_E = math.log(len(DOMAINS))
