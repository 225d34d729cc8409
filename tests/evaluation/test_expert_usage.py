from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from moe_fast.evaluation import expert_usage
from moe_fast.layers import MoEMLP, MoERouter


class Letters(nn.Module):
    """Encodes a letter as its number; each layer's router sends even and odd tokens apart."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(MoEMLP(4, 8, 3) for _ in range(layers))
        self.seen: list[dict] = []
        for layer in self.layers:
            weight = torch.zeros(3, 4)
            weight[0, 0], weight[2, 1] = 1.0, 1.0
            layer.router.weight.data.copy_(weight)

    def encode(self, texts: list[str], **options: object) -> np.ndarray:
        self.seen.append({"texts": texts, **options})
        length = max(map(len, texts))
        x = torch.zeros(len(texts), length, 4)
        mask = torch.zeros(len(texts), length, dtype=torch.bool)
        for row, text in enumerate(texts):
            for column, letter in enumerate(text):
                x[row, column, 0 if letter == "a" else 1] = 1.0
                mask[row, column] = True
        for layer in self.layers:
            layer(x, token_mask=mask)
        return x.mean(1).numpy()


TEXTS = ["aaab", "bb", "ab", "a"]
NAMES = ["x", "y", "x", "y"]


def test_shares_by_hand_padding_not_counted() -> None:
    model = Letters()
    usage = expert_usage(model, TEXTS, NAMES)
    assert usage.shape == (2, 2, 3)
    np.testing.assert_allclose(usage[0], [[4 / 6, 0, 2 / 6]] * 2)  # aaab, ab
    np.testing.assert_allclose(usage[1], [[1 / 3, 0, 2 / 3]] * 2)  # bb, a
    np.testing.assert_allclose(usage.sum(-1), 1.0)


def test_order_and_options() -> None:
    model = Letters()
    usage = expert_usage(model, TEXTS, NAMES, order=["y", "x"], pass_domain=True, batch_size=2)
    np.testing.assert_allclose(usage[0, 0], [1 / 3, 0, 2 / 3])
    assert [(call["domain"], call["batch_size"]) for call in model.seen] == [("y", 2), ("x", 2)]
    expert_usage(model, TEXTS, NAMES)
    assert "domain" not in model.seen[-1]


def test_hooks_are_taken_off_even_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def encode(texts: list[str], **options: object) -> None:
        raise RuntimeError("out of memory")

    model = Letters()
    expert_usage(model, TEXTS, NAMES)
    monkeypatch.setattr(model, "encode", encode)
    with pytest.raises(RuntimeError, match="out of memory"):
        expert_usage(model, TEXTS, NAMES)
    routers = [module for module in model.modules() if isinstance(module, MoERouter)]
    assert routers and not any(router._forward_hooks for router in routers)


@pytest.mark.parametrize(
    ("texts", "names", "order", "message"),
    [
        (TEXTS, NAMES[:2], None, "4 texts, 2 domains"),
        ([], [], None, "0 texts"),
        (TEXTS, NAMES, ["x", "z"], r"no texts of \['z'\]; domains present: \['x', 'y'\]"),
    ],
)
def test_bad_arguments(texts, names, order, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expert_usage(Letters(), texts, names, order=order)


def test_a_dense_model_has_no_experts() -> None:
    with pytest.raises(ValueError, match="no MoE layers"):
        expert_usage(Letters(layers=0), TEXTS, NAMES)
