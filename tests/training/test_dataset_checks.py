"""What a trainer asks of its datasets: nothing wrong waits for the middle of the run."""

from __future__ import annotations

import warnings

import pytest
from datasets import Dataset
from tiny_models import DOMAINS, make_flag_rows, make_moe, make_pairs

from moe_fast.losses import InfoNCELoss, RouterLoss, SigmoidLoss
from moe_fast.training.dataset_checks import (
    check_domains,
    check_exchanges,
    check_flag_rows,
    check_settings_match,
    check_swappable,
    domain_names,
    flatten,
    has_domain_column,
    text_columns,
)

LABELS = ["label", "labels", "score", "scores"]


def test_flatten():
    pairs = make_pairs(3)
    parts = {"a": pairs, "b": pairs}
    assert list(flatten(train=parts, eval=pairs)) == ["train.a", "train.b", "eval"]
    assert flatten(train=pairs, eval=None) == {"train": pairs}
    assert flatten(train=[{"a": "b"}]) == {}  # no columns to look at


def test_domains_are_the_models_or_an_error():
    pairs = make_pairs(6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_domains({"train": pairs}, "domain", DOMAINS)
    with pytest.raises(ValueError, match=r"unknown domain 'river'; .* \['fruit', 'metal'\]"):
        check_domains({"train": pairs}, "domain", DOMAINS[:2])
    with pytest.raises(ValueError, match="the train dataset has rows without a domain"):
        check_domains({"train": Dataset.from_dict({"domain": ["fruit", None]})}, "domain", DOMAINS)


def test_one_domain_only_is_said():
    one = make_pairs(9).filter(lambda row: row["domain"] == "metal")
    data = {"train.a": one, "train.b": one, "eval": make_pairs(6)}
    with pytest.warns(UserWarning, match="one domain only, 'metal', and the model has 3"):
        check_domains(data, "domain", DOMAINS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_domains({"train": one}, "domain", ["metal"])
        check_domains({"eval": one, "train": make_pairs(6)}, "domain", DOMAINS)
        check_domains({"train": one.to_iterable_dataset()}, "domain", DOMAINS)


def test_names_of_a_stream():
    assert domain_names({"train": make_pairs(6).to_iterable_dataset()}, "domain") == DOMAINS
    assert has_domain_column({"train": make_pairs(6).to_iterable_dataset()}, "domain")
    assert not has_domain_column({}, "domain")


@pytest.mark.parametrize(
    ("columns", "texts"),
    [
        (["a", "b"], ["a", "b"]),
        (["a", "domain", "b", "label"], ["a", "b"]),
        (["a", "b", "score", "labels"], ["a", "b", "score"]),  # one label, as the collator
        (["query", "pos", "neg"], ["query", "positive", "negative_1", "negative_2"]),
        (
            ["domain", "pos", "neg", "query", "neg_q", "pos_scores", "neg_scores"],
            ["query", "positive"] + [f"negative_{q}{g}" for q in ("", "query_") for g in (1, 2)],
        ),
    ],
)
def test_text_columns(columns, texts):
    assert text_columns(columns, 2, "domain", LABELS) == texts


def test_foreign_columns_beside_flag_rows():
    with pytest.raises(ValueError, match=r"got \['prompt', 'id'\] too.*remove_columns"):
        text_columns(["query", "pos", "neg", "prompt", "id"], 1, None, LABELS)


def test_flag_rows_are_measured():
    rows = make_flag_rows(6, neg_q=True, scores=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_flag_rows({"train": rows, "eval": make_pairs(3)}, 4)
        check_flag_rows({"train": rows.to_iterable_dataset()}, 9)  # left to the collator
    with pytest.warns(UserWarning, match=r"6 of 6 rows of the train dataset have fewer than .*=5"):
        check_flag_rows({"train": rows}, 5)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("pos", [], "row 4 of the eval dataset: 'pos' is empty"),
        ("neg", [], "row 4 of the eval dataset: 'neg' is empty"),
        ("neg_q", ["x"], "row 4 .*: 'neg_q' must have one entry .* it has 1 for 4"),
        ("neg_scores", [0.0], "row 4 .*: 'neg_scores' must have one entry"),
        ("pos_scores", None, r"row 4 .*: \['pos_scores'\] must each hold a list"),
    ],
)
def test_a_bad_flag_row_is_named(column, value, message):
    rows = list(make_flag_rows(6, neg_q=True, scores=True))
    rows[4] |= {column: value}
    # Behind a selection, as a split makes it: the number is that of the selected row.
    data = Dataset.from_list([rows[0], *rows]).select(range(1, 7))
    with pytest.raises(ValueError, match=message):
        check_flag_rows({"eval": data}, 2)


def test_settings_for_columns_that_are_not_there():
    columns = ["query", "positive", "negative_1", "negative_2"]
    for settings in (None, 32, "query: ", {}, {"query": 1, "negative": 2, "negative_2": 3}):
        check_settings_match("max_length", settings, columns)
    check_settings_match("prompts", {"dataset": {"querry": "query: "}}, columns)
    with pytest.raises(ValueError, match=r"max_length names \['querry', 'b'\], .*'query', 'posit"):
        check_settings_match("max_length", {"querry": 1, "query": 2, "b": 3}, columns)


def test_only_pairs_of_a_kind_are_swapped():
    check_swappable({"train": ["a", "b"]}, "prompt: ", {"a": 5, "b": 5})
    with pytest.raises(ValueError, match=r"the train dataset has \['a', 'b', 'c'\]"):
        check_swappable({"train": ["a", "b", "c"]})
    with pytest.raises(ValueError, match="treated alike, but 'a' has 'query: ' and 'b' has None"):
        check_swappable({"train": ["a", "b"]}, {"a": "query: "}, None)


def test_losses_per_dataset_exchange_the_same_sums_or_none():
    model = make_moe(routing="token_topk")
    plain = SigmoidLoss(model)
    balanced, harder = (RouterLoss(InfoNCELoss(model), load_balance=c) for c in (0.1, 0.5))
    informed = RouterLoss(InfoNCELoss(model), load_balance=0.1, mutual_information=0.1)
    check_exchanges({"a": plain, "b": InfoNCELoss(model)})
    check_exchanges({"a": balanced, "b": harder})
    for other in (plain, informed):
        with pytest.raises(ValueError, match=r"RouterLosses of the same terms.* 'b': \["):
            check_exchanges({"a": balanced, "b": other})
