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
    names = list(inspect.signature(theirs.forward).parameters)
    assert list(inspect.signature(ours.forward).parameters) == names


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
    assert set(seen) == {"attention_mask", "position_ids"}


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
    message = (
        r"config must have num_experts, num_experts_per_tok.*as an MoEBertConfig has; got "
        r"BertConfig\. Make one with moe_fast\.models\.MoEBertConfig\(num_experts=4"
    )
    with pytest.raises(ValueError, match=message):
        MoEBertLayer(build("bert").config, 0)
    with pytest.raises(ValueError, match="as an MoEModernBertConfig has; got ModernBertConfig"):
        MoEModernBertLayer(build("modernbert").config, 0)


@pytest.mark.parametrize("name", ["encoder_hidden_states", "past_key_values", "cache"])
def test_decoder_inputs_are_refused(name):
    layer = MoEBertLayer(_config(), 0)
    with pytest.raises(ValueError, match=f"{name} must be None"):
        layer(torch.randn(1, 2, 32), None, **{name: torch.zeros(1)})
    assert layer(torch.randn(1, 2, 32), None, **{name: None}).shape == (1, 2, 32)


# -------------------------------------------------------------------------- the fused output block


def _both(layer, **settings):
    """The layer's output and every gradient, unfused and fused, from one seed."""
    runs = []
    x = torch.randn(2, 5, 32)
    upstream = torch.randn(x.shape)
    for fused in (False, True):
        layer.config.fused_output = fused
        leaf = x.clone().requires_grad_()
        torch.manual_seed(5)
        out = layer(leaf, None, **settings)
        names, parameters = zip(*layer.named_parameters(), strict=True)
        grads = torch.autograd.grad(out, [leaf, *parameters], upstream)
        runs.append(dict(zip(("out", "x", *names), (out, *grads), strict=True)))
    return runs


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("layer_class", [MoEBertLayer, MoERobertaLayer, MoEXLMRobertaLayer])
def test_the_fused_output_block_changes_no_number(layer_class, dropout, k):
    """In training too: the same entries are dropped."""
    config = _config(hidden_dropout_prob=dropout, num_experts_per_tok=k)
    layer = layer_class(config, 0).train()
    torch.nn.init.normal_(layer.output.LayerNorm.weight)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = False
    unfused, fused = _both(layer, token_mask=mask)
    for name in unfused:
        # float32: one and the same computation, in another order
        assert relative_error(fused[name], unfused[name]) <= 1e-5, name


def test_evaluation_drops_nothing():
    layer = MoEBertLayer(_config(hidden_dropout_prob=0.5, fused_output=True), 0).eval()
    x = torch.randn(2, 5, 32)
    assert torch.equal(layer(x), layer(x))


def test_the_setting_is_saved_and_may_be_switched(tmp_path):
    dense = build("bert")
    moe = moe_fast.upcycle(dense, num_experts=2)
    ids = torch.arange(12).view(2, 6)
    before = moe(ids).last_hidden_state
    moe.config.fused_output = True
    called = []
    moe.encoder.layer[0].output.LayerNorm.register_forward_hook(lambda *_: called.append(1))
    assert relative_error(moe(ids).last_hidden_state, before) <= 1e-5
    assert not called
    moe.save_pretrained(tmp_path)
    again = type(moe).from_pretrained(tmp_path)
    assert again.config.fused_output
    assert torch.equal(again(ids).last_hidden_state, moe(ids).last_hidden_state)
    assert not type(moe).from_pretrained(tmp_path, fused_output=False).config.fused_output


def test_only_a_mixture_of_whole_mlps_is_fused():
    config = _config(target="output")
    config.fused_output = True
    with pytest.raises(ValueError, match="output_block must be None with target='output'"):
        MoEBertLayer(config, 0)(torch.randn(1, 2, 32))


def test_positional_arguments_are_pythons():
    layer = MoEBertLayer(_config())
    x = torch.zeros(1, 2, 32)
    with pytest.raises(TypeError, match="multiple values for argument 'encoder_hidden_states'"):
        layer(x, None, None, encoder_hidden_states=x)
    with pytest.raises(TypeError, match="too many positional arguments"):
        layer(x, None, None, None, None, "junk")
