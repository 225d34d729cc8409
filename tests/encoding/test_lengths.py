"""Texts as tokens: those of the tokenizer itself, whose state stays, however long the text."""

import logging

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from moe_fast.encoding.batches import padded_batch
from moe_fast.encoding.lengths import (
    counted_truncation,
    measure_texts,
    prompt_length,
    shortened,
    tokenize_texts,
)
from moe_fast.encoding.tokenizers import own_tokenizer

LIMIT = 16
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(40)), "##x", "x", "é", "数"]


def word_piece() -> PreTrainedTokenizerFast:
    """As BERT's: accents and case are normalized, Chinese characters stand alone."""
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return _tokenizer(backend)


def byte_pairs() -> PreTrainedTokenizerFast:
    """As RoBERTa's and ModernBERT's: bytes, and pairs of them that have merged."""
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    for letter in pre_tokenizers.ByteLevel.alphabet():
        vocabulary.setdefault(letter, len(vocabulary))
    merges = [("a", "b"), ("ab", "ab"), ("Ġ", "a")]
    for merge in merges:
        vocabulary["".join(merge)] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel()
    return _tokenizer(backend)


def unigram() -> PreTrainedTokenizerFast:
    """As XLM-RoBERTa's: the most probable pieces of words that begin with an underline."""
    pieces = [(word, -20.0) for word in WORDS]
    pieces += [("▁", -2.0), ("▁w", -3.0), ("ab", -2.5), ("aba", -4.0)]
    pieces += [(letter, -6.0) for letter in "abcw0123456789"]
    backend = Tokenizer(models.Unigram(pieces, unk_id=1))
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Strip()])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    return _tokenizer(backend)


def _tokenizer(backend: Tokenizer) -> PreTrainedTokenizerFast:
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=LIMIT, **names)


KINDS = [word_piece, byte_pairs, unigram]


def straightforward(tokenizer, texts):
    return tokenizer(texts, truncation=True, max_length=LIMIT)["input_ids"]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_lengths_are_the_tokenizers(kind, side):
    tokenizer = kind()
    tokenizer.truncation_side = side
    texts = ["w1 w2", "", "w3 " * 14, "w3 " * 15, "É [SEP] 数数 x" * 9, "\n\t w4  w5 "]
    tokenized, long = tokenize_texts(tokenizer, texts, "w7 ", LIMIT)
    prompted = ["w7 " + text for text in texts]
    assert [list(text.ids) for text in tokenized] == straightforward(tokenizer, prompted)
    lengths = [len(ids) for ids in tokenizer(prompted)["input_ids"]]
    places = [i for i, length in enumerate(lengths) if length > LIMIT]
    assert long.num_long == len(places) > 0 and long.num_texts == len(texts)
    assert long.first == (places[0], str(lengths[places[0]]), prompted[places[0]][:60])
    assert [text.place for text in tokenized] == list(range(len(texts)))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "text",
    [
        "w1 w2  ab\u0301 w3\n数 " * 4_000,
        "ab" * 40_000,
        " " * 60_000 + "w1 w2 w3",
        "w1 " + " " * 60_000,
        "數数" * 30_000,
        "w1 " * 12 + "e\u0301" * 30_000 + " w2" * 12,
        "한국어 " * 15_000,
    ],
    ids=["words", "one word", "blank start", "blank end", "no spaces", "accents", "jamo"],
)
def test_a_very_long_text_has_the_tokens_of_the_whole(kind, side, text):
    tokenizer = kind()
    tokenizer.truncation_side = side
    (tokenized,), long = tokenize_texts(tokenizer, [text], "", LIMIT)
    (want,) = straightforward(tokenizer, [text])
    assert list(tokenized.ids) == want
    (cut,) = shortened([text], "", long)
    assert straightforward(tokenizer, [cut]) == [want]
    assert bool(long.num_long) == (len(tokenizer(text)["input_ids"]) > LIMIT)


def test_of_five_million_characters_a_few_thousand_are_read():
    text = "w1 w2 w3 \n" * 500_000
    (tokenized,), long = tokenize_texts(word_piece(), [text], "w4 ", LIMIT)
    assert list(tokenized.ids) == straightforward(word_piece(), ["w4 " + text[:1000]])[0]
    (piece,) = shortened([text], "w4 ", long)
    assert len(piece) < 10_000 and text.startswith(piece)
    with pytest.raises(ValueError, match="text 0 has more than .* 'w4 w1 w2"):
        long.settle(truncate=False)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("text", "ids"), [("a" * 3_000_000, [2, 1, 3]), ("w1" + " " * 3_000_000 + "w1", [2, 5, 3])]
)
def test_of_one_endless_word_or_gap_a_million_characters_are_read(text, ids, side):
    tokenizer = word_piece()
    tokenizer.truncation_side = side
    (tokenized, other), long = tokenize_texts(tokenizer, [text, "w2"], "", LIMIT)
    assert (list(tokenized.ids), list(other.ids)) == (ids, [2, 6, 3])
    assert len(shortened([text, "w2"], "", long)[0]) <= 2**20
    with pytest.raises(
        ValueError, match=r"text 0 has 3 in 1,048,57[56] .* read no further \(1 of 2"
    ):
        long.settle(truncate=False)


def test_the_tokenizer_is_left_as_it_was():
    tokenizer = word_piece()
    tokenizer(["w1"], truncation=True, max_length=5, padding="max_length")
    backend = tokenizer.backend_tokenizer
    before = backend.to_str()
    measure_texts(tokenizer, ["w1 " * 90, "w2"], "", LIMIT)
    tokenize_texts(tokenizer, ["w1 " * 90, "w2"], "", None)
    assert tokenizer.backend_tokenizer is backend and backend.to_str() == before


def test_a_tokenizer_of_its_own_knows_what_was_added_and_changed():
    tokenizer = word_piece()
    tokenizer.add_tokens(["hello", "w1w1"])
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    tokenizer.add_tokens(["later"])
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    text = "HELLO later w1w1 [MASK] W3 hello"
    assert own_tokenizer(tokenizer)([text])["input_ids"] == tokenizer([text])["input_ids"]
    assert len(set(tokenizer(text)["input_ids"])) > 5


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_batch_is_the_tokenizers(side):
    tokenizer = word_piece()
    tokenizer.padding_side = side
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    texts = ["w1", "w2 w3 w4", ""]
    tokenized, _ = tokenize_texts(tokenizer, texts, "", LIMIT)
    want = tokenizer(texts, padding=True, return_tensors="pt")
    got = padded_batch(tokenized, tokenizer)
    assert list(got) == list(want)
    assert all(got[name].dtype == want[name].dtype for name in want)
    assert all(bool((got[name] == want[name]).all()) for name in want)
    tokenizer.model_input_names = ["input_ids"]
    assert list(padded_batch(tokenize_texts(tokenizer, texts, "", LIMIT)[0], tokenizer)) == [
        "input_ids"
    ]


def test_a_prompts_length_leaves_out_the_special_token_at_its_end():
    assert prompt_length(word_piece(), "w1 w2 ", LIMIT) == 3


def test_texts_of_a_model_without_a_limit_are_never_long():
    for limit in (None, 10**30):
        tokenized, long = tokenize_texts(word_piece(), ["w1 " * 9_000], "", limit)
        assert len(tokenized[0].ids) == 9_002 and long.num_long == 0
        long.settle(truncate=False)


def test_many_calls_can_be_counted_for_one_warning(caplog):
    with caplog.at_level(logging.WARNING), counted_truncation() as count:
        for texts in (["w1 " * 50, "w2"], ["w3"], ["w4 " * 60]):
            measure_texts(word_piece(), texts, "", LIMIT).settle(truncate=True)
    assert (count.num_long, count.limit, caplog.records) == (2, LIMIT, [])
    count.warn(4)
    assert "2 of 4 texts are longer than max_seq_length = 16" in caplog.text


def test_ids_are_held_in_four_bytes():
    (text,), _ = tokenize_texts(word_piece(), ["w1 w2"], "", LIMIT)
    assert text.ids.dtype == np.int32
