"""A tiny SentenceTransformer made offline: a random BERT and a word-level tokenizer."""

import pytest

from tests.models.tiny import save_sentence_transformer

pytest.importorskip("sentence_transformers", reason="needs the extra moe-fast[train]")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A saved dense SentenceTransformer, 32 tokens at most."""
    return save_sentence_transformer(tmp_path_factory.mktemp("dense"))


@pytest.fixture
def dense(folder):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(folder, device="cpu")


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folder with ``model`` (dense) and ``moe`` (enforced, domains law and medicine)."""
    import moe_fast

    folder = tmp_path_factory.mktemp("models")
    dense = save_sentence_transformer(folder)
    mixture = moe_fast.upcycle(
        dense, num_experts=2, routing="enforced", domains=["law", "medicine"]
    )
    for mlp in mixture.transformers_model.moe_mlps().values():
        mlp.up_proj.data[1] *= -1.0  # experts that differ
    mixture.save_pretrained(str(folder / "moe"), create_model_card=False)
    return folder
