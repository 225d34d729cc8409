"""Tiny models to serve."""

import torch

import moe_fast
from tests.models.tiny import save_sentence_transformer

DOMAINS = ["law", "medicine"]


def save_models(folder):
    """Save ``dense``, ``enforced`` (two domains, experts that differ) and ``learned``."""
    dense = save_sentence_transformer(folder)
    torch.manual_seed(0)
    for name, options in (
        ("enforced", {"routing": "enforced", "domains": DOMAINS}),
        ("learned", {"routing": "token_topk"}),
    ):
        mixture = moe_fast.upcycle(dense, num_experts=2, **options)
        with torch.no_grad():
            for mlp in mixture.transformers_model.moe_mlps().values():
                mlp.down_proj += 0.2 * torch.randn(mlp.down_proj.shape)
        mixture.save_pretrained(str(folder / name), create_model_card=False)
    (folder / "model").rename(folder / "dense")
    return folder
