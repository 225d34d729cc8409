"""DomainDataCollator: the domain is never a text, ids are checked, hashes are stable."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from tiny_models import DOMAINS, MAX_LENGTH, make_dense, make_flag_rows, make_moe, make_pairs
from torch.utils.data import DataLoader

from moe_fast.training import DomainDataCollator, hashing
from moe_fast.training.hashing import stable_hash
from moe_fast.training.row_sampling import draw_passages, flag_row_columns, is_swapped


@pytest.fixture(scope="module")
def dense():
    return make_dense()


def collator_of(model, **kwargs) -> DomainDataCollator:
    return DomainDataCollator.from_model(model, **({"domains": DOMAINS} | kwargs))


def rows(*domains, **columns) -> list[dict]:
    return [
        {"anchor": "apple", "positive": "pear fig", "domain": domain, **columns}
        for domain in domains
    ]


# --- what comes out ------------------------------------------------------------------------------


def test_the_domain_is_never_a_text(dense):
    """The trap itself: the stock collator makes a hard negative of it, ours does not."""
    batch_rows = rows("metal", "fruit")
    stock = SentenceTransformerDataCollator(preprocess_fn=dense.preprocess)
    assert "domain_input_ids" in stock(batch_rows)
    batch = collator_of(dense)(batch_rows)
    assert not [key for key in batch if key.startswith("domain")]
    args = SentenceTransformerTrainingArguments("unused", report_to="none", use_cpu=True)
    trainer = SentenceTransformerTrainer(dense, args, data_collator=collator_of(dense))
    features, labels = trainer.collect_features(batch)
    assert len(features) == 2
    assert labels is None
    for column in features:
        assert {"input_ids", "attention_mask", "domain_ids", "text_hash"} <= set(column)
    assert batch_rows == rows("metal", "fruit")  # the dataset's rows, untouched


@pytest.mark.parametrize("position", [0, 1, 2])
def test_wherever_the_domain_column_stands(dense, position):
    names = ["anchor", "positive"]
    names.insert(position, "domain")
    row = {"anchor": "apple", "positive": "pear", "domain": "river"}
    batch = collator_of(dense)([{name: row[name] for name in names}])
    assert batch["anchor_domain_ids"].tolist() == [2]
    assert batch["positive_domain_ids"].tolist() == [2]


def test_texts_and_labels_are_tokenized_as_by_the_stock_collator(dense):
    batch_rows = rows("metal", "fruit", label=1.0)
    stock = SentenceTransformerDataCollator(preprocess_fn=dense.preprocess)
    expected = stock([{k: v for k, v in row.items() if k != "domain"} for row in batch_rows])
    batch = collator_of(dense)(batch_rows)
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(batch[key], value), key
    assert set(batch) - set(expected) == {
        f"{column}_{key}"
        for column in ("anchor", "positive")
        for key in ("domain_ids", "text_hash")
    }


@pytest.mark.parametrize(
    "values",
    [
        ["river", "fruit", "metal"],
        [2, 0, 1],
        list(np.array([2, 0, 1])),
        list(torch.tensor([2, 0, 1])),
        ["river", 0, np.int32(1)],
    ],
)
def test_names_and_integer_ids(dense, values):
    batch = collator_of(dense)(rows(*values))
    for column in ("anchor", "positive"):
        ids = batch[f"{column}_domain_ids"]
        assert ids.dtype == torch.int64
        assert ids.tolist() == [2, 0, 1]


def test_expert_ids_only_where_routing_is_enforced():
    batch_rows = rows("river", "metal")
    enforced = DomainDataCollator.from_model(make_moe(routing="enforced"))(batch_rows)
    assert enforced["anchor_expert_ids"].tolist() == [2, 1]
    assert enforced["anchor_expert_ids"].dtype == torch.int64
    learned = DomainDataCollator.from_model(make_moe())
    assert learned.domains == DOMAINS
    assert "anchor_expert_ids" not in learned(batch_rows)
    assert learned(batch_rows)["anchor_domain_ids"].tolist() == [2, 1]


def test_an_empty_batch(dense):
    assert collator_of(dense)([]) == {}


def test_another_domain_column(dense):
    batch = collator_of(dense, domain_column="source")(
        [{"anchor": "apple", "positive": "fig", "source": "metal"}]
    )
    assert batch["anchor_domain_ids"].tolist() == [1]
    assert not [key for key in batch if key.startswith("source")]


def test_prompts_do_not_change_the_hash(dense):
    plain = collator_of(dense)(rows("fruit"))
    prompted = collator_of(dense, prompts={"anchor": "iron "})(rows("fruit"))
    assert prompted["anchor_input_ids"].shape != plain["anchor_input_ids"].shape
    assert torch.equal(prompted["anchor_text_hash"], plain["anchor_text_hash"])


def test_data_without_domains(dense):
    pairs = [{"anchor": "apple", "positive": "pear fig"}]
    batch = DomainDataCollator.from_model(dense, domain_column=None)(pairs)
    assert set(batch) == set(SentenceTransformerDataCollator(dense.preprocess)(pairs)) | {
        "anchor_text_hash",
        "positive_text_hash",
    }


# --- draws by epoch ------------------------------------------------------------------------------


def texts(model, batch, column) -> list[str]:
    return model.tokenizer.batch_decode(batch[f"{column}_input_ids"], skip_special_tokens=True)


def test_flag_rows_become_columns_of_texts(dense):
    data = list(make_flag_rows(6, neg_q=True, scores=True))
    collator = collator_of(dense, num_negatives=2, seed=5).for_training()
    collator.set_epoch(3)
    batch = collator(data)
    drawn = [draw_passages(row, 2, seed=5, epoch=3) for row in data]
    columns = flag_row_columns(2, negative_queries=True)
    assert [k.removesuffix("_input_ids") for k in batch if k.endswith("_input_ids")] == columns
    for column in columns:
        assert texts(dense, batch, column) == [row[column] for row in drawn]
        assert batch[f"{column}_domain_ids"].tolist() == [0, 1, 2, 0, 1, 2]
        assert batch[f"{column}_text_hash"].tolist() == [stable_hash(r[column]) for r in drawn]
    assert batch["label"].dtype == torch.float32
    assert torch.equal(batch["label"], torch.tensor([row["label"] for row in drawn]))
    assert batch["label"].shape == (6, 3)


def test_evaluation_takes_the_first_and_swaps_nothing(dense):
    data = list(make_flag_rows(6))
    collator = collator_of(dense, num_negatives=2)
    collator.set_epoch(3)
    batch = collator(data)
    assert texts(dense, batch, "positive") == [row["pos"][0] for row in data]
    assert texts(dense, batch, "negative_2") == [row["neg"][1] for row in data]
    pairs = list(make_pairs(24))
    batch = collator_of(dense, swap_pairs=True)(pairs)
    assert texts(dense, batch, "anchor") == [row["anchor"] for row in pairs]


def test_swapped_pairs_are_those_of_the_epoch(dense):
    pairs = list(make_pairs(24))
    collator = collator_of(dense, swap_pairs=True, seed=5).for_training()
    swapped = {}
    for epoch in (0, 1):
        collator.set_epoch(epoch)
        batch = collator(pairs)
        swapped[epoch] = [
            is_swapped(row["anchor"], row["positive"], seed=5, epoch=epoch) for row in pairs
        ]
        for column, other in (("anchor", "positive"), ("positive", "anchor")):
            expected = [
                row[other if swap else column]
                for row, swap in zip(pairs, swapped[epoch], strict=True)
            ]
            assert texts(dense, batch, column) == expected
    assert swapped[0] != swapped[1]
    assert 0 < sum(swapped[0]) < 24


def test_labels_do_not_stand_in_the_way_of_swaps(dense):
    collator = collator_of(dense, swap_pairs=True).for_training()
    batch = collator([row | {"label": 1} for row in make_pairs(6)])
    assert batch["label"].tolist() == [1] * 6
    with pytest.raises(ValueError, match=r"two texts; got the columns \['anchor', .*'negative_0'"):
        collator(list(make_pairs(6, negatives=1)))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_the_order_and_the_workers_change_no_draw(dense, workers):
    """Workers that persist over epochs too: each row's draws are those of the row alone."""
    data = make_flag_rows(12, scores=True)
    collator = collator_of(dense, num_negatives=2, seed=1).for_training()
    order = list(range(12))
    loader = DataLoader(
        data.select(order[::-1] if workers else order),
        batch_size=5 if workers else 4,
        collate_fn=collator,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    for epoch in range(3):
        collator.set_epoch(epoch)
        drawn = {}
        for batch in loader:
            queries = texts(dense, batch, "query")
            columns = [texts(dense, batch, c) for c in ("positive", "negative_1", "negative_2")]
            drawn |= dict(zip(queries, zip(*columns, strict=True), strict=True))
        for row in data:
            expected = draw_passages(row, 2, seed=1, epoch=epoch)
            assert drawn[row["query"]] == (
                expected["positive"],
                expected["negative_1"],
                expected["negative_2"],
            )


# --- lengths and prompts -------------------------------------------------------------------------


def test_lengths_by_column(dense):
    """Tokens counted, the two special ones among them; a name covers its numbered columns."""
    lengths = {"query": 4, "positive": 6, "negative": 7, "negative_2": 5}
    collator = collator_of(dense, num_negatives=2, max_length=lengths)
    with pytest.warns(UserWarning, match="column 'query' reach the limit of 4 tokens"):
        batch = collator(list(make_flag_rows(6)))  # of 4, 5 and 6 words
    widths = [batch[f"{c}_attention_mask"].sum(1).unique().tolist() for c in flag_row_columns(2, 0)]
    assert widths == [[4], [6], [7], [5]]
    assert (collator.truncated, collator.collated) == (24, 24)
    with pytest.warns(UserWarning, match="limit of 3 tokens"):
        batch = collator_of(dense, max_length=3)(list(make_pairs(6)))
    assert [batch[f"{c}_input_ids"].shape[1] for c in ("anchor", "positive")] == [3, 3]


def test_prompts_by_column_count_towards_the_length(dense):
    prompts = {"query": "iron zinc ", "negative": "tin "}
    data = list(make_flag_rows(6))
    batch = collator_of(dense, num_negatives=2, prompts=prompts)(data)
    widths = [batch[f"{c}_input_ids"].shape[1] for c in flag_row_columns(2, 0)]
    assert widths == [4 + 2 + 2, 5 + 2, 6 + 1 + 2, 6 + 1 + 2]
    assert texts(dense, batch, "query") == ["iron zinc " + row["query"] for row in data]
    limited = collator_of(dense, num_negatives=2, prompts=prompts, max_length={"query": 5})
    with pytest.warns(UserWarning, match="limit of 5 tokens"):
        assert limited(data)["query_input_ids"].shape[1] == 5


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (17, r"max_length=17 goes beyond the model's max_seq_length, 16 tokens"),
        ({"anchor": 4, "positive": 99}, r"'positive': 99.* goes beyond"),
        (0, r"a positive integer, or one per column; got 0"),
        ({"anchor": 4.5}, r"a positive integer, or one per column; got \{'anchor': 4.5\}"),
    ],
)
def test_lengths_that_the_model_does_not_allow(dense, length, message):
    with pytest.raises(ValueError, match=message):
        collator_of(dense, max_length=length)


# --- hashes --------------------------------------------------------------------------------------


def test_hashes_are_equal_exactly_where_texts_are(dense):
    texts = ["apple pear", "pear apple", "apple pear", "Apple pear", "apple  pear", ""]
    data = [{"anchor": t, "positive": t, "domain": "fruit"} for t in texts]
    batch = collator_of(dense)(data)
    hashes = batch["anchor_text_hash"].tolist()
    assert batch["anchor_text_hash"].dtype == torch.int64
    assert torch.equal(batch["anchor_text_hash"], batch["positive_text_hash"])
    for i, a in enumerate(texts):
        for j, b in enumerate(texts):
            assert (hashes[i] == hashes[j]) == (a == b)


def test_hashes_are_the_same_in_every_process():
    path = str(Path(hashing.__file__))
    code = "import runpy, sys; print(runpy.run_path(sys.argv[1])['stable_hash']('Zürich'))"
    command = [sys.executable, "-c", code, path]
    environment = os.environ | {"PYTHONHASHSEED": "1", "PYTHONUTF8": "1"}
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert int(out.stdout) == stable_hash("Zürich") == 636548684707296368
    assert -(2**63) <= stable_hash("\ud800") < 2**63  # a lone surrogate, as real files have


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("ocean", ValueError, r"unknown domain 'ocean'; .* \['fruit', 'metal', 'river'\]"),
        (3, ValueError, r"domain id 3 is out of range: ids must lie in \[0, 3\)"),
        (-1, ValueError, r"domain id -1 is out of range"),
        (1.0, TypeError, r"a name or an integer id; got 1\.0 \(float\)"),
        (True, TypeError, r"a name or an integer id; got True \(bool\)"),
        (None, TypeError, r"a name or an integer id; got None"),
    ],
)
def test_bad_domains_are_named(dense, value, error, message):
    with pytest.raises(error, match=message):
        collator_of(dense)(rows("fruit", value))


def test_a_missing_column_is_named_with_those_present(dense):
    with pytest.raises(ValueError, match=r"no column 'domain' .* \['anchor', 'positive'\]"):
        collator_of(dense)([{"anchor": "apple", "positive": "pear"}])


@pytest.mark.parametrize(
    ("domains", "error", "message"),
    [
        ([], ValueError, r"at least one domain; got none"),
        (["a", "a"], ValueError, r"must differ from each other; got \['a', 'a'\]"),
        ("fruit", TypeError, r"must be a list of names; got 'fruit'"),
        ([0, 1], TypeError, r"must be a list of names; got \[0, 1\]"),
    ],
)
def test_bad_lists_of_domains(dense, domains, error, message):
    with pytest.raises(error, match=message):
        DomainDataCollator.from_model(dense, domains=domains)


def test_a_negative_number_of_negatives(dense):
    with pytest.raises(ValueError, match="num_negatives must be at least 0; got -1"):
        collator_of(dense, num_negatives=-1)


def test_a_dense_model_needs_to_be_told_the_domains(dense):
    with pytest.raises(ValueError, match="at least one domain; got none"):
        DomainDataCollator.from_model(dense)


# --- truncation ----------------------------------------------------------------------------------


def test_truncation_is_said_once_and_counted():
    model = make_dense()
    collator = collator_of(model)
    long = " ".join(["apple"] * 40)
    data = [
        {"anchor": "apple", "positive": long, "domain": "fruit"},
        {"anchor": "pear", "positive": "fig", "domain": "fruit"},
    ]
    with pytest.warns(UserWarning, match=r"1 of 2 texts of column 'positive' .* limit of 16 tok"):
        batch = collator(data)
    assert batch["positive_input_ids"].shape == (2, MAX_LENGTH)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collator(data)
    assert (collator.truncated, collator.collated) == (2, 8)


def test_nothing_is_said_where_nothing_is_cut(dense):
    collator = collator_of(dense)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collator(list(make_pairs(8)))
    assert collator.truncated == 0


def test_the_model_decides_the_length():
    model = make_dense()
    model.max_seq_length = 5
    with pytest.warns(UserWarning, match="limit of 5 tokens"):
        batch = collator_of(model)(list(make_pairs(4)))
    assert batch["positive_input_ids"].shape[1] == 5
