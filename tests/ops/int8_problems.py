"""Random problems for the int8 ops, and their answers by :mod:`tests.ops.int8_oracle`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_fast import ops

from . import int8_oracle as oracle


@dataclass
class Problem:
    """T tokens of D, E experts of H, K slots each; some slots are empty if ``skip``."""

    tokens: int
    dim: int
    hidden: int
    experts: int = 3
    k: int = 1
    act: str = "gelu"
    gated: bool = False
    bias: bool = True
    skip: bool = False
    fixed: bool = False
    parts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        t, d, h, e = self.tokens, self.dim, self.hidden, self.experts
        up_rows = 2 * h if self.gated else h
        self.x = torch.randn(t, d)
        self.up, self.down = torch.randn(e, up_rows, d), torch.randn(e, d, h)
        self.up /= d**0.5
        self.down /= h**0.5
        self.up_bias = torch.randn(e, up_rows) if self.bias else None
        self.down_bias = torch.randn(e, d) if self.bias else None
        index = torch.rand(t, e).argsort(1)[:, : self.k]
        if self.skip:
            index[torch.rand(t, self.k) < 0.3] = e  # no expert
        self.index = index
        self.weights = torch.rand(t, self.k)
        self.plan = ops.plan(index, e)
        # The least and the greatest values; a fixed range is narrower, so that values are limited.
        self.ranges = (torch.tensor([-1.5, 2.0]), torch.tensor([-0.2, 1.5])) if self.fixed else ()

    @property
    def arguments(self) -> tuple:
        """Arguments of ``ops.int8_expert_mlp``."""
        weights = ops.quantize_weight(self.up), ops.quantize_weight(self.down)
        return self.x, *weights, self.up_bias, self.down_bias, self.weights, self.plan

    @property
    def settings(self) -> dict[str, Any]:
        """Its keywords."""
        form: dict[str, Any] = {"act": self.act, "gated": self.gated}
        if self.fixed:
            form |= {"input_range": self.ranges[0], "hidden_range": self.ranges[1]}
        return form

    def answer(self) -> Tensor:
        """[T, D] float64, by the oracle."""
        y = np.zeros((self.tokens, self.dim))
        fixed = tuple(tuple(r.tolist()) for r in self.ranges) or (None, None)
        for e in range(self.experts):
            up, down = (oracle.quantize_weight(w[e].numpy()) for w in (self.up, self.down))
            biases = [None if b is None else b[e].numpy() for b in (self.up_bias, self.down_bias)]
            for t, k in (self.index == e).nonzero().tolist():
                row = self.x[t : t + 1].numpy()
                f = oracle.mlp(row, up, down, *biases, self.act, self.gated, fixed)
                y[t] += float(self.weights[t, k]) * f[0]
        return torch.from_numpy(y)
