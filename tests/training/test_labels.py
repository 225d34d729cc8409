"""Labels beside losses that take every pair for a positive one, and columns named nearly right."""

from __future__ import annotations

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from sentence_transformers.sentence_transformer.losses import CoSENTLoss
from tiny_models import DOMAINS, make_dense, make_moe, make_pairs

from moe_fast.losses import InfoNCELoss, MatryoshkaLoss, SigmoidLoss
from moe_fast.training import MoESentenceTransformerTrainer
from moe_fast.training.dataset_checks import check_column_names
from moe_fast.training.domain_ids import with_domain_names
from moe_fast.training.labels import check_label_batch, check_labels, ignores_labels

LABELS = ["label", "labels", "score", "scores"]


@pytest.fixture(scope="module")
def model():
    return make_dense(layers=1)


def rows(label, values, names=None):
    kind = ClassLabel(names=names) if names else None
    data = Dataset.from_dict({"a": list("xyz"), "b": list("uvw"), label: values})
    return data.cast_column(label, kind) if names else data


@pytest.mark.parametrize(
    ("column", "values", "names", "others"),
    [
        ("label", [1, 0, 1], None, r"0 \(1\)"),
        ("labels", [True, True, False], None, r"False \(1\)"),
        ("score", [1.0, 0.25, 0.5], None, r"0.25 \(1\), 0.5 \(1\)"),
        ("label", [1, None, 1], None, r"None \(1\)"),
        ("label", [0, 1, 0], ["duplicate", "other"], r"duplicate \(2\), other \(1\)"),
        ("label", [1, 1, 1], ["positive", "negative"], r"negative \(3\)"),
    ],
)
def test_other_labels_than_1_are_refused(model, column, values, names, others):
    data = {"train": rows(column, values, names)}
    with pytest.raises(ValueError, match=rf"label column '{column}'.*{others}.*InfoNCELoss") as e:
        check_labels(data, InfoNCELoss(model), LABELS)
    assert "dataset.filter(" in str(e.value)


@pytest.mark.parametrize(
    ("values", "names"),
    [([1] * 3, None), ([1.0] * 3, None), ([True] * 3, None), ([0] * 3, ["positive", "negative"])],
)
def test_labels_that_say_what_the_loss_assumes(model, values, names):
    check_labels({"train": rows("label", values, names)}, InfoNCELoss(model), LABELS)


def test_losses_per_dataset(model):
    data = {"train.x": rows("label", [1, 0, 1]), "eval.y": rows("label", [0, 0, 1])}
    losses = {"x": CoSENTLoss(model), "y": MatryoshkaLoss(InfoNCELoss(model), [8])}
    assert [ignores_labels(loss) for loss in losses.values()] == [False, True]
    with pytest.raises(ValueError, match=r"the eval\.y dataset"):
        check_labels(data, losses, LABELS)
    check_labels({"train.x": data["train.x"]}, losses, LABELS)


def test_batches_of_a_stream(model):
    check_label_batch(SigmoidLoss(model), torch.ones(3))
    check_label_batch(SigmoidLoss(model), torch.zeros(3, 2))  # a teacher's scores
    check_label_batch(CoSENTLoss(model), torch.zeros(3))
    with pytest.raises(ValueError, match="1 of 3 pairs have another label"):
        check_label_batch(SigmoidLoss(model), torch.tensor([1, 0, 1]))


def test_the_trainer_looks_at_labels_in_evaluation_too(model, tmp_path):
    pairs = make_pairs(4).remove_columns("domain")
    labelled = pairs.add_column("label", [1, 0, 1, 1])
    with pytest.raises(ValueError, match="the eval dataset has the label column 'label'"):
        MoESentenceTransformerTrainer(
            model, None, pairs, eval_dataset=labelled, loss=InfoNCELoss(model)
        )


# --- columns -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Domain", "domains", "DOMAIN", "Labels", "Score"])
def test_columns_named_nearly_right_are_no_texts(name):
    data = Dataset.from_dict({"a": ["x"], "b": ["y"], name: ["law"]})
    with pytest.raises(ValueError, match=f"column '{name}', which would be embedded as a text"):
        check_column_names({"train": data}, "domain", LABELS)


def test_numbers_are_no_texts():
    data = Dataset.from_dict({"a": ["x"], "b": ["y"], "number": [7]})
    with pytest.raises(ValueError, match=r"column 'number' of int64.*remove_columns\('number'\)"):
        check_column_names({"train": data}, "domain", LABELS)


def test_any_names_of_texts_will_do():
    data = Dataset.from_dict({"subject": ["x"], "labelled": ["y"], "domain": ["law"], "label": [1]})
    check_column_names({"train": data}, "domain", LABELS)


# --- classes that carry their own names ----------------------------------------------------------


def as_classes(names):
    data = make_pairs(6)
    return data.cast(Features({**data.features, "domain": ClassLabel(names=names)}))


@pytest.mark.parametrize("stream", [False, True])
def test_domains_of_classes_are_matched_by_name(stream):
    data = as_classes(DOMAINS[::-1])
    data = data.to_iterable_dataset() if stream else data
    named = with_domain_names({"x": data}, "domain")["x"]
    assert [row["domain"] for row in named] == make_pairs(6)["domain"]
    assert named.features["domain"] == Value("string")


def test_the_trainer_gives_classes_the_models_ids(tmp_path):
    model = make_moe()
    trainer = MoESentenceTransformerTrainer(
        model, None, as_classes(DOMAINS[::-1]), loss=InfoNCELoss(model)
    )
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    assert batch["anchor_domain_ids"].tolist() == [0, 1, 2]
