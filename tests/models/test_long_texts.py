"""8,192 tokens: packed equals padded, for every encoder made for such texts."""

import pytest
import torch

import moe_fast
from moe_fast.layers import ATTENTION
from tests.layers.test_attention import padded
from tests.models.tiny import build, relative_error

pytestmark = pytest.mark.slow  # attention over 8,192 tokens

TOKENS = 8192
NAMES = ["modernbert", "nomic_bert", "jina_embeddings_v3", "eurobert"]


@pytest.mark.parametrize("name", NAMES)
def test_packed_equals_padded(name):
    windows = {"local_attention": 128} if name == "modernbert" else {}
    dense = build(name, max_position_embeddings=TOKENS, num_hidden_layers=2, **windows)
    moe = moe_fast.upcycle(dense, num_experts=3)
    torch.manual_seed(1)
    with torch.no_grad():
        for mlp in moe.moe_mlps().values():
            for parameter in mlp.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
        batch = padded([TOKENS, 2500], pad=moe.config.pad_token_id)
        real = batch["attention_mask"].bool()
        want = moe(**batch).last_hidden_state[real]
        assert want.isfinite().all()
        moe.set_attn_implementation(ATTENTION)
        got = moe(**batch).last_hidden_state[real]
    assert relative_error(got, want) <= 1e-5
