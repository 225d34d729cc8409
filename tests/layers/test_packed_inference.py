"""PackedInference: where it computes a layer, and where the layer's modules are called."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import moe_fast
from moe_fast.layers import ATTENTION, packed_inference
from moe_fast.ops import native
from tests.layers.test_attention import padded
from tests.models.test_packing import enforced_ids, mixture
from tests.models.tiny import NAMES, relative_error

pytestmark = pytest.mark.skipif(
    native.why_no_products("cpu") is not None, reason="needs the native library"
)
POST_NORM = {
    *("bert", "roberta", "xlm_roberta", "camembert", "electra", "distilbert"),
    *("nomic_bert", "jina_embeddings_v3"),
}
LENGTHS = [9, 5, 1, 12]


@pytest.fixture
def count(monkeypatch):
    """How many attention blocks were computed as one operation since the last look."""
    calls = []
    block = packed_inference.ops.attention_block
    monkeypatch.setattr(
        packed_inference.ops,
        "attention_block",
        lambda *args, **options: (calls.append(1), block(*args, **options))[1],
    )

    def look():
        number = len(calls)
        calls.clear()
        return number

    return look


def packed(name="bert", dtype=torch.float32, **settings):
    moe = mixture(name, **settings).to(dtype)
    moe.set_attn_implementation(ATTENTION)
    return moe.eval()


def texts(moe):
    torch.manual_seed(1)
    return padded(LENGTHS, pad=moe.config.pad_token_id)


def run(moe, **options):
    batch = texts(moe)
    with torch.no_grad():
        return moe(**batch, **enforced_ids(moe, LENGTHS), **options).last_hidden_state


def module_by_module(moe, **options):
    with moe_fast.use_backend("torch"):
        return run(moe, **options)


@pytest.mark.parametrize("name", [n for n in NAMES if n in POST_NORM])
@pytest.mark.parametrize("settings", [{}, {"num_experts_per_tok": 2}, {"routing": "enforced"}])
def test_equals_the_modules(count, name, settings):
    moe = packed(name, **settings)
    got = run(moe)
    assert count() == 3, "one per layer"
    assert relative_error(got, module_by_module(moe)) <= 1e-5
    assert count() == 0


def test_the_other_encoders_are_computed_module_by_module(count):
    for name in set(NAMES) - POST_NORM:
        run(packed(name))
    assert count() == 0


@pytest.mark.parametrize("name", ["bert", "distilbert", "nomic_bert"])
def test_bfloat16_sums_are_not_rounded(count, name):
    """The error against float64 on the same weights is smaller, and all dtypes stay as they are."""
    torch.manual_seed(0)
    moe = packed(name, torch.bfloat16, routing="enforced", dense=None)
    exact = mixture(name, routing="enforced")
    exact.load_state_dict(moe.state_dict())
    exact.set_attn_implementation(ATTENTION)
    want = run(exact)
    count()
    batch = texts(moe)
    with torch.no_grad():
        out = moe(**batch, **enforced_ids(moe, LENGTHS), output_hidden_states=True)
    assert count() == 3
    assert {t.dtype for t in (out.last_hidden_state, *out.hidden_states)} == {torch.bfloat16}
    errors = [
        (t.double() - want).norm() / want.norm()
        for t in (out.last_hidden_state, module_by_module(moe))
    ]
    assert errors[0] < errors[1]


def test_hooks_run(count):
    moe = packed()
    want = run(moe)
    assert count() == 3
    seen = []
    layer = moe.encoder_layers[1]
    for path in (
        "attention",
        "attention.self.query",
        "attention.output.LayerNorm",
        "output.dropout",
    ):
        for register in ("register_forward_hook", "register_forward_pre_hook"):
            handle = getattr(layer.get_submodule(path), register)(lambda *_: seen.append(1))
            assert relative_error(run(moe), want) <= 1e-5
            assert count() == 2 and len(seen) == 1
            handle.remove()
            seen.clear()
    everywhere = nn.modules.module.register_module_forward_hook(lambda *_: seen.append(1))
    run(moe)
    everywhere.remove()
    assert count() == 0 and seen
    layer.mlp.register_forward_hook(lambda *_: seen.append(2))  # is called in any case
    run(moe)
    assert count() == 3 and seen[-1] == 2


def test_a_hook_may_change_hidden_states(count):
    """The next layer continues with what the hook returned, not with what the layer had kept."""
    moe = packed()
    moe.encoder_layers[0].register_forward_hook(lambda *args: 2 * args[-1])
    got = run(moe)
    assert count() == 3
    assert relative_error(got, module_by_module(moe)) <= 1e-5


class Scaled(nn.Linear):
    """A map that its class changes, as adapters do."""

    def forward(self, input):
        return 2 * super().forward(input)


def change_class(moe):
    linear = moe.encoder_layers[1].attention.self.value
    linear.__class__ = Scaled


def change_norm(moe):
    moe.encoder_layers[1].output.LayerNorm = nn.RMSNorm(32)


def change_forward(moe):
    linear = moe.encoder_layers[1].attention.self.value
    linear.forward = lambda x: 3 * nn.Linear.forward(linear, x)


def parametrize(moe):
    nn.utils.parametrizations.weight_norm(moe.encoder_layers[1].attention.output.dense)


@pytest.mark.parametrize("change", [change_class, change_norm, change_forward, parametrize])
def test_changed_modules_are_called(count, change):
    moe = packed()
    before = run(moe)
    count()
    change(moe)
    got = run(moe)
    assert count() == 2, "all layers but the changed one"
    assert relative_error(got, module_by_module(moe)) <= 1e-5
    assert change is parametrize or relative_error(got, before) > 1e-3


def test_dense_layers_between(count):
    moe = packed(layers=[0, 2])
    got = run(moe)
    assert count() == 2
    assert relative_error(got, module_by_module(moe)) <= 1e-5


def test_not_in_training_or_compilation(count):
    moe = packed()
    batch = texts(moe)
    moe(**batch).last_hidden_state.sum().backward()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        moe(**batch)
    with torch.no_grad():
        moe.train()(**batch)
        assert count() == 0
        moe.eval()(**batch)
    assert count() == 3


def test_weights_may_change_between_calls(count):
    moe = packed()
    run(moe)
    with torch.no_grad():
        moe.encoder_layers[0].attention.self.key.weight.data.mul_(-3)
    assert relative_error(run(moe), module_by_module(moe)) <= 1e-5
    assert count() == 6


def test_asking_for_outputs_once_changes_nothing(count):
    """transformers' hooks for outputs stay; they do nothing where no outputs are asked for."""
    moe = packed()
    run(moe, output_router_logits=True)
    run(moe)
    assert count() == 6
