"""A tiny mixture over two domains and a tiny dense model, saved."""

import pytest

pytest.importorskip("sentence_transformers", reason="needs the extra moe-fast[train]")
pytest.importorskip("pyarrow", reason="needs the extra moe-fast[train]")

import moe_fast
from tests.models.tiny import save_sentence_transformer


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folder with ``model`` (dense) and ``moe`` (enforced, domains law and medicine)."""
    folder = tmp_path_factory.mktemp("models")
    dense = save_sentence_transformer(folder)
    mixture = moe_fast.upcycle(
        dense, num_experts=2, routing="enforced", domains=["law", "medicine"]
    )
    for mlp in mixture.transformers_model.moe_mlps().values():
        mlp.up_proj.data[1] *= -1.0  # experts that differ
    mixture.save_pretrained(str(folder / "moe"), create_model_card=False)
    return folder
