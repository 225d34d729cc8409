"""Cutting columns into chunks: every text once, within the budget, with what belongs to it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loss_checks import property_test
from toy_encoder import column

from moe_fast.losses.text_chunks import Chunk, cut_by_length, split_into, take_rows, text_lengths

CPU = torch.device("cpu")
TEXTS = st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=9), min_size=1, max_size=12)


def tokens_of(features: dict) -> list[list[int]]:
    """Each row's real tokens."""
    rows = zip(features["input_ids"], features["attention_mask"], strict=True)
    return [ids[mask.bool()].tolist() for ids, mask in rows]


def packed(texts: list[list[int]], **extra: list[int]) -> dict:
    """As sentence-transformers packs them: one row, and where its texts start."""
    starts = torch.tensor([0, *(len(t) for t in texts)]).cumsum(0).to(torch.int32)
    return {
        "input_ids": torch.tensor([[token for text in texts for token in text]]),
        "position_ids": torch.tensor([[i for text in texts for i in range(len(text))]]),
        "seq_idx": torch.tensor([[n for n, text in enumerate(texts) for _ in text]]),
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": max(map(len, texts)),
        "max_length_k": max(map(len, texts)),
        "modality": "text",
    } | {name: torch.tensor(value) for name, value in extra.items()}


@property_test
@given(
    columns=st.lists(TEXTS, min_size=1, max_size=3), budget=st.integers(1, 40), left=st.booleans()
)
def test_every_text_is_in_one_chunk_with_its_ids(columns, budget, left):
    batch = [column(*texts, left=left, domain_ids=list(range(len(texts)))) for texts in columns]
    lengths = [text_lengths(features) for features in batch]
    chunks = cut_by_length(lengths, budget, CPU)
    found = {}
    for chunk in chunks:
        part = take_rows(batch[chunk.column], chunk)
        assert part["domain_ids"].tolist() == chunk.rows.tolist()
        assert part["input_ids"].shape == (len(chunk.rows), chunk.width)
        assert part["input_ids"].numel() <= budget or len(chunk.rows) == 1
        for row, text in zip(chunk.rows.tolist(), tokens_of(part), strict=True):
            assert (chunk.column, row) not in found
            found[chunk.column, row] = text
    assert found == {(c, r): t for c, texts in enumerate(columns) for r, t in enumerate(texts)}


@property_test
@given(texts=TEXTS, budget=st.integers(1, 40))
def test_packed_texts(texts, budget):
    features = packed(texts, domain_ids=list(range(len(texts))))
    (lengths,) = [text_lengths(features)]
    assert lengths.tokens.tolist() == list(map(len, texts))
    for chunk in cut_by_length([lengths], budget, CPU):
        part = take_rows(features, chunk)
        rows = chunk.rows.tolist()
        expected = packed([texts[row] for row in rows], domain_ids=rows)
        assert part.keys() == expected.keys()
        for key, value in expected.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(part[key], value) and part[key].dtype == features[key].dtype
            else:
                assert part[key] == value


def test_the_longest_come_first_and_hardly_any_padding_is_left():
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 200, (500,), generator=generator).tolist()
    features = column(*([1] * size for size in sizes))
    chunks = cut_by_length([text_lengths(features)], 2048, CPU)
    widths = [chunk.width for chunk in chunks]
    assert widths == sorted(widths, reverse=True) and widths[0] == max(sizes)
    padded = sum(len(chunk.rows) * chunk.width for chunk in chunks)
    assert padded < 1.1 * sum(sizes) < 1.1 * features["input_ids"].numel() / 1.8


def test_more_chunks_than_the_tokens_ask_for():
    texts = [[1] * n for n in (5, 4, 3, 2, 1)]
    chunks = cut_by_length([text_lengths(column(*texts))], 100, CPU)
    for number in range(1, 6):
        parts = split_into(chunks, number)
        assert len(parts) == number
        assert sorted(torch.cat([part.rows for part in parts]).tolist()) == list(range(5))
        assert max(len(part.rows) for part in parts) <= -(-5 // number) + 1
    assert split_into(parts, 2) == parts  # as many as there are
    with pytest.raises(ValueError, match="a batch of 5 texts cannot be cut into 6 chunks"):
        split_into(chunks, 6)


def test_a_chunk_is_a_copy():
    features = column([1, 2], [3])
    part = take_rows(features, Chunk(0, torch.tensor([0, 1]), 2))
    part["attention_mask"].zero_()
    assert features["attention_mask"].sum() == 3


def test_texts_without_a_mask_or_without_a_token():
    lengths = text_lengths({"input_ids": torch.ones(3, 4, dtype=torch.int64)})
    assert lengths.tokens.tolist() == lengths.widths.tolist() == [4, 4, 4]
    features = column([1, 2], [3]) | {"attention_mask": torch.tensor([[0, 0], [1, 0]])}
    lengths = text_lengths(features)
    assert lengths.tokens.tolist() == [0, 1]
    chunks = cut_by_length([lengths], 1, CPU)
    assert sorted(row for chunk in chunks for row in chunk.rows.tolist()) == [0, 1]


def test_other_features_are_refused():
    with pytest.raises(ValueError, match=r"columns of texts.*got features \['pixel_values'\]"):
        text_lengths({"pixel_values": torch.zeros(2, 3, 4, 4)})
    with pytest.raises(ValueError, match="columns of texts"):  # an embedding bag
        text_lengths({"input_ids": torch.zeros(9), "offsets": torch.zeros(2)})
    chunk = Chunk(0, torch.tensor([0]), 2)
    with pytest.raises(
        ValueError, match=r"cannot cut 'patches' of shape \[5, 3\] into the 2 texts"
    ):
        take_rows(column([1, 2], [3]) | {"patches": torch.zeros(5, 3)}, chunk)
    with pytest.raises(
        ValueError, match=r"cannot cut 'patches' of shape \[5, 7\] into the 2 texts"
    ):
        take_rows(packed([[1, 2], [3]]) | {"patches": torch.zeros(5, 7)}, chunk)
