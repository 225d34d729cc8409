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
