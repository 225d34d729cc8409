"""Configurations: defaults, round trips, and what they refuse."""

import pytest
from transformers import AutoConfig, AutoModel

from moe_fast.models import (
    MoEBertConfig,
    MoEModernBertConfig,
    MoERobertaConfig,
    MoEXLMRobertaConfig,
)
from moe_fast.version import __version__

CONFIGS = (MoEBertConfig, MoERobertaConfig, MoEXLMRobertaConfig, MoEModernBertConfig)


@pytest.mark.parametrize("cls", CONFIGS)
def test_defaults(cls):
    config = cls()
    assert config.moe_layers == list(range(config.num_hidden_layers))
    assert config.domains == []
    assert config.moe_fast_version == __version__


@pytest.mark.parametrize("cls", CONFIGS)
def test_save_and_load(cls, tmp_path):
    config = cls(
        num_experts=4,
        num_experts_per_tok=2,
        moe_layers=[1],
        domains=["x", "y"],
        domain_token_ids=[98, 99],
        vocab_size=100,
        domain_token_replaces=1,
        default_domain="y",
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is cls
    want, got = config.to_dict(), loaded.to_dict()
    differ = {k for k in want | got if want.get(k) != got.get(k)}
    assert differ <= {"transformers_version", "_name_or_path"}


def test_dense_routing_visits_every_expert():
    assert MoEBertConfig(num_experts=4, routing="dense").num_experts_per_tok == 4


def test_newer_checkpoint_is_refused():
    with pytest.raises(ValueError, match=r"written by moe_fast 99.0.0, newer than this"):
        MoEBertConfig(moe_fast_version="99.0.0")


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("moe_roberta", r"MoEBertConfig reads .* 'moe_bert'; got 'moe_roberta'"),
        ("bert", r"got 'bert'. It is a dense model: make a mixture of it with moe_fast.upcycle"),
    ],
)
def test_other_architecture_is_refused(model_type, message):
    with pytest.raises(ValueError, match=message):
        MoEBertConfig.from_dict({"model_type": model_type})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts": 2, "num_experts_per_tok": 3}, "num_experts_per_tok must lie in"),
        ({"routing": "enforced", "num_experts_per_tok": 2}, "num_experts_per_tok must be 1"),
        (
            {"routing": "enforced", "weight_mode": "probability"},
            "weight_mode with routing='enforced'",
        ),
        ({"moe_layers": [1, 1]}, "moe_layers must be distinct"),
        ({"domains": ["a", "b"], "domain_token_ids": [1]}, "domain_token_ids must hold one id"),
        (
            {
                "vocab_size": 9,
                "domains": ["a"],
                "domain_token_ids": [3],
                "domain_token_replaces": 1,
            },
            r"domain_token_ids must be the vocabulary's last 1 ids, \[8\]; got \[3\]",
        ),
        ({"moe_fast_version": "abc"}, "moe_fast_version must be a version such as .*; got 'abc'"),
        ({"fused_output": True, "target": "output"}, "fused_output needs .*'output'"),
        ({"fused_output": True, "shared_bias": True}, "fused_output must be False with"),
        ({"shared_bias": 1}, "shared_bias must be true or false; got 1"),
        ({"route_by_token_type": True}, "route_by_token_type needs routing='enforced'"),
    ],
)
def test_bad_fields_name_themselves(fields, message):
    with pytest.raises((ValueError, TypeError), match=message):
        MoEBertConfig(**fields)


def test_modernbert_has_no_output_block_to_fuse():
    with pytest.raises(ValueError, match="fused_output must be False.*ModernBert"):
        MoEModernBertConfig(fused_output=True)


def test_fields_set_afterwards_are_checked_when_a_model_is_built():
    config = MoEBertConfig(num_hidden_layers=2)
    config.moe_layers = [7]
    with pytest.raises(ValueError, match=r"moe_layers must be .*\[0, 2\).*got \[7\]"):
        AutoModel.from_config(config)


def test_a_dense_configuration_may_have_a_field_called_architecture():
    config = MoEBertConfig.from_dict({"architecture": "bert-base", "num_hidden_layers": 1})
    assert config.to_dict()["architecture"] == "bert-base"
