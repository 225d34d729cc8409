"""What is recorded of every router: padded, packed and bare batches; nothing outside a record."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moe_fast.layers import MoEMLP, MoERouter, RoutingInfo
from moe_fast.losses.routing_record import hook_routers, record_routing

LENGTHS = [3, 1, 2]


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([MoEMLP(4, 6, 3, 2) for _ in range(2)])

    def forward(self, x: torch.Tensor, **info: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x, routing=RoutingInfo(**info))
        return x


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    """[B, L, D] with L = 3, and its mask."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(3) < torch.tensor(LENGTHS)[:, None]
    return torch.randn(3, 3, 4, generator=generator), mask


def test_a_padded_batch():
    model = TwoLayers()
    x, mask = padded()
    with record_routing(model) as recorder:
        model(x, token_mask=mask)
    record = recorder.result()
    assert record.logits.shape == (2, 9, 3)
    assert record.logits.requires_grad
    assert record.top_k_index.shape == (2, 9, 2)
    assert torch.equal(record.token_mask, mask.flatten())
    assert record.num_sentences == 3
    assert record.sentence_ids.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    first = x.reshape(9, 4) @ model.layers[0].router.weight.t()
    torch.testing.assert_close(record.logits[0][mask.flatten()], first[mask.flatten()])


def test_a_packed_batch_is_the_padded_one_without_its_padding():
    model = TwoLayers()
    x, mask = padded()
    with record_routing(model) as recorder:
        model(x, token_mask=mask)
    expected = recorder.result()
    starts = torch.tensor([0, 3, 4, 6], dtype=torch.int32)
    for packed in (x[mask], x[mask][None]):
        with record_routing(model) as recorder:
            model(packed, cu_seqlens=starts)
        record = recorder.result()
        real = expected.token_mask
        torch.testing.assert_close(record.logits, expected.logits[:, real])
        assert torch.equal(record.top_k_index, expected.top_k_index[:, real])
        assert torch.equal(record.sentence_ids, expected.sentence_ids[real])
        assert record.num_sentences == 3
        assert record.token_mask.all()


def test_several_passes_are_numbered_through():
    model = TwoLayers()
    x, mask = padded()
    with record_routing(model) as recorder:
        model(x, token_mask=mask)
        model(x[:2, :1])
    record = recorder.result()
    assert record.logits.shape == (2, 11, 3)
    assert record.num_sentences == 5
    assert record.sentence_ids.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 4]


def test_tokens_without_sentences():
    model = TwoLayers()
    with record_routing(model) as recorder:
        model(padded()[0].reshape(9, 4))
    record = recorder.result()
    assert record.logits.shape == (2, 9, 3)
    assert record.num_sentences is None
    assert record.sentence_ids is None


def test_one_hook_each_and_nothing_outside_a_record():
    model, other = TwoLayers(), TwoLayers()
    routers = [module for module in model.modules() if isinstance(module, MoERouter)]
    for _ in range(3):
        assert hook_routers(model) == routers
    assert [len(router._forward_hooks) for router in routers] == [1, 1]
    hook_routers(other)
    x, _ = padded()
    with record_routing(model) as recorder:
        model(x)
        other(x)  # as a guide model that another loss knows
    model(x)
    assert recorder.result().num_sentences == 3


def test_routers_that_ran_unequally_often_are_noticed():
    model = TwoLayers()
    with record_routing(model) as recorder:
        model.layers[0](padded()[0])
    with pytest.raises(RuntimeError, match=r"calls per router: \[1, 0\]"):
        recorder.result()


def test_an_encoder_without_its_graph_is_refused():
    model = TwoLayers()
    with (
        record_routing(model),
        torch.no_grad(),
        pytest.raises(ValueError, match="ran without gradients inside the loss"),
    ):
        model(padded()[0])
    with torch.no_grad(), record_routing(model) as recorder:  # evaluation
        model(padded()[0])
    assert not recorder.result().logits.requires_grad
