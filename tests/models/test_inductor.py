"""torch.compile as users call it, by its default backend: one encoder for each kind of layer.

Graphs without breaks are tested for every encoder and head in test_encoders.py and test_heads.py,
with a backend that compiles nothing. Here inductor makes code of them.
"""

import pytest
import torch

from tests.layers.test_attention import padded
from tests.models.encoder_table import mixture
from tests.models.tiny import relative_error

pytestmark = pytest.mark.slow  # each calls the C++ compiler

# What the table of architectures distinguishes: see moe_fast/architectures/table.py.
KINDS = {
    "bert": "normalises behind its blocks",
    "xlm_roberta_xl": "normalises before its blocks",
    "mpnet": "relative biases, a forward of our own, tuples",
    "deberta_v2": "relative keys and queries, a convolution",
    "nomic_bert": "rotary positions, gate and up apart, normalises behind",
    "modernbert": "rotary positions, gate and up as one, windows, normalises before",
}


@pytest.mark.parametrize("name", KINDS)
def test_compiled_equals_eager(name):
    torch._dynamo.reset()
    moe = mixture(name, layers=1, num_experts_per_tok=2).float()
    torch.manual_seed(2)
    batch = padded([9, 5, 1, 12], pad=moe.config.pad_token_id)
    real = batch["attention_mask"].bool()
    compiled = torch.compile(moe, fullgraph=True)
    with torch.no_grad():
        got, want = (model(**batch).last_hidden_state[real] for model in (compiled, moe))
    assert relative_error(got, want) <= 1e-5


def test_gradients_of_a_compiled_mixture():
    """And with experts, dropout, sum and norm as one operation."""
    torch._dynamo.reset()
    moe = mixture("bert", layers=1, num_experts_per_tok=2).float()
    moe.config.fused_output = True
    torch.manual_seed(2)
    batch = padded([9, 5, 1, 12], pad=moe.config.pad_token_id)
    direction = torch.randn(4, 12, 32) * batch["attention_mask"][..., None]
    compiled = torch.compile(moe, fullgraph=True)
    gradients = []
    for model in (compiled, moe):
        moe.zero_grad()
        (model(**batch).last_hidden_state * direction).sum().backward()
        gradients.append({n: p.grad for n, p in moe.named_parameters() if p.grad is not None})
    got, want = gradients
    assert got.keys() >= want.keys() and len(want) > 10
    # A graph gives zeros to what the sum does not depend on, the pooler.
    assert not any(got[name].any() for name in got.keys() - want.keys())
    scale = max(g.norm() for g in want.values())
    for name in want:  # that of a key's bias is 0 but for rounding
        assert (got[name] - want[name]).norm() <= 1e-4 * want[name].norm() + 1e-6 * scale, name
