"""The layers alone: drop-in for transformers' own, and what they refuse."""

import inspect

import pytest
import torch
from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.modernbert.modeling_modernbert import ModernBertEncoderLayer
from transformers.models.roberta.modeling_roberta import RobertaLayer
from transformers.models.xlm_roberta.modeling_xlm_roberta import XLMRobertaLayer

import moe_fast
from moe_fast import MoEBertLayer
from moe_fast.layers import MoEModernBertLayer, MoERobertaLayer, MoEXLMRobertaLayer
from moe_fast.models import MoEBertConfig
from tests.models.tiny import build, relative_error

PAIRS = [
    (MoEBertLayer, BertLayer),
    (MoERobertaLayer, RobertaLayer),
    (MoEXLMRobertaLayer, XLMRobertaLayer),
    (MoEModernBertLayer, ModernBertEncoderLayer),
]


def _config(**changes):
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
    return MoEBertConfig(**{**sizes, "num_experts": 3, "attn_implementation": "eager", **changes})


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_is_a_subclass_with_the_same_forward(ours, theirs):
    assert issubclass(ours, theirs)
    assert list(inspect.signature(ours).parameters) == ["config", "layer_idx"]
    want = list(inspect.signature(theirs.forward).parameters)
    assert list(inspect.signature(ours.forward).parameters) == want


@pytest.mark.parametrize(
    ("attention", "mask"),  # transformers' eager attention adds its mask, which must be float
    [("eager", "none"), ("eager", "float"), ("sdpa", "none"), ("sdpa", "float"), ("sdpa", "bool")],
)
def test_stands_in_for_a_bert_layer(attention, mask):
    dense = build("bert", attn_implementation=attention)
    theirs, ours = dense.encoder.layer[0], moe_fast.upcycle(dense, num_experts=3).encoder.layer[0]
    x = torch.randn(2, 5, 32)
    keep = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    keep[1, ..., 3:] = False
    additive = torch.zeros(keep.shape).masked_fill(~keep, torch.finfo(torch.float32).min)
    masks = {"none": None, "bool": keep, "float": additive}
    assert relative_error(ours(x, masks[mask]), theirs(x, masks[mask])) <= 1e-6


def test_routing_keywords_do_not_reach_the_attention():
    layer = MoEBertLayer(_config(routing="enforced"), 0).eval()
    seen = {}
    layer.attention.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    layer(
        torch.randn(2, 5, 32),
        None,
        expert_ids=torch.tensor([0, 2]),
        token_mask=torch.ones(2, 5, dtype=torch.bool),
        output_router_logits=True,
        position_ids=None,
    )
    assert set(seen) == {"position_ids"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"is_decoder": True}, "config.is_decoder must be False"),
        ({"add_cross_attention": True}, "config.add_cross_attention must be False"),
        ({"chunk_size_feed_forward": 4}, "config.chunk_size_feed_forward must be 0.*got 4"),
        ({"hidden_act": "quick_gelu"}, "hidden_act must be one of 'gelu'.*got 'quick_gelu'"),
    ],
)
def test_refused_configurations(changes, message):
    with pytest.raises(ValueError, match=message):
        MoEBertLayer(_config(**changes), 0)


def test_dense_configuration_is_refused():
    with pytest.raises(ValueError, match="config must have num_experts .*got BertConfig"):
        MoEBertLayer(build("bert").config, 0)


@pytest.mark.parametrize("name", ["encoder_hidden_states", "past_key_values"])
def test_decoder_inputs_are_refused(name):
    layer = MoEBertLayer(_config(), 0)
    with pytest.raises(ValueError, match=f"{name} must be None"):
        layer(torch.randn(1, 2, 32), None, **{name: torch.zeros(1)})
