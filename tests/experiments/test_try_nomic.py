"""The script that tries the published model, on a small one of the same format."""

import pytest
import torch

from experiments import try_nomic
from tests.conversion.nomic_oracle import embedding, random_weights, write_folder

pytest.importorskip("transformers.models.jina_embeddings_v3")
pytest.importorskip("sentence_transformers")


def test_it_says_whether_the_model_is_read_well(tmp_path, monkeypatch, capsys):
    folder = write_folder(tmp_path / "theirs")
    texts = ["w0 w1", "w2"]
    vectors = [embedding(random_weights(), f"search_document: {text}") for text in texts]
    monkeypatch.setattr(try_nomic, "TEXTS", texts)
    monkeypatch.setattr(try_nomic, "SIMILARITY", float(vectors[0] @ vectors[1]))
    try_nomic.try_model(folder)
    assert "differences behind the export: none" in capsys.readouterr().out
    monkeypatch.setattr(try_nomic, "SIMILARITY", 0.9118)
    with pytest.raises(SystemExit, match="does not read this model"):
        try_nomic.try_model(folder)


def test_differences_are_named(tmp_path):
    one = write_folder(tmp_path / "one", modules=False)
    other = random_weights()
    other["emb_ln.bias"] = torch.zeros(32)
    del other["emb_ln.weight"]
    two = write_folder(tmp_path / "two", other, modules=False)
    assert try_nomic.differences(one, one) == []
    assert try_nomic.differences(one, two) == ["emb_ln.weight", "emb_ln.bias"]
