"""The experiment on a tiny random model and made-up pairs of the same form."""

import json
from collections import Counter

import numpy as np
import pytest

pytest.importorskip("sentence_transformers")
pytest.importorskip("ir_measures")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from dataclasses import replace

from experiments.claims import records, report, small_domains
from experiments.claims.__main__ import chosen, run
from experiments.claims.arms import ARMS, with_prefix
from experiments.claims.data import Source, in_batches, load
from experiments.claims.report import Difference, difference
from experiments.claims.settings import PLACES, Cell, Settings, all_cells
from tests.training.tiny_models import DOMAINS, WORDS, make_dense

SOURCES = {"tiny": (Source("pairs.jsonl", 36, 18, "focus"),)}
SETTINGS = Settings(tokens=16, batch_size=8, precision="float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model and pairs: twelve diseases per domain, three questions each."""
    path = tmp_path_factory.mktemp("claims")
    with (path / "pairs.jsonl").open("w", encoding="utf-8") as file:
        for domain in DOMAINS:
            for disease in range(12):
                for question in range(3):
                    first, second = WORDS[domain][disease % 8], WORDS[domain][question]
                    texts = {
                        "a": f"{first} {second} {domain} {disease} {question}",
                        "b": f"{second} {first} {first} {domain} {disease} {question}",
                    }
                    row = {**texts, "domain": domain, "focus": f"{domain} {disease}"}
                    print(json.dumps(row), file=file)
    make_dense().save_pretrained(str(path / "model"), create_model_card=False)
    return path


def run_cell(folder, output, arm, seed=0, settings=SETTINGS):
    cell = Cell("minilm", "tiny", arm, seed)
    run(cell, folder / "model", folder, output, replace(settings, seed=seed), SOURCES)
    return records.read(output / cell.file)


def test_no_disease_or_text_is_on_both_sides(folder):
    data = load("tiny", folder, 0, SOURCES)
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    disease = {row["a"]: row["focus"] for row in rows}
    trained = {disease[text] for text in data.train["a"]}
    assert not trained & {disease[text] for text in data.test.queries.values()}
    assert not set(data.train["b"]) & set(data.test.corpus.values())
    assert all(data.groups[q] == disease[t] for q, t in data.test.queries.items())
    assert (len(data.train), len(data.test.corpus)) == (36, 18)


def test_all_arms_train_on_the_same_pairs_in_the_same_order(folder):
    data = load("tiny", folder, 0, SOURCES)
    first = in_batches(data.train, 8, seed=3)
    assert sorted(first["a"]) == sorted(data.train["a"])
    assert in_batches(data.train, 8, seed=3)["a"] == first["a"]
    assert in_batches(data.train, 8, seed=4)["a"] != first["a"]


@pytest.mark.slow
@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_writes_a_record(folder, tmp_path, arm):
    record = run_cell(folder, tmp_path, arm)
    questions = records.read(tmp_path / "minilm-tiny-questions.json")
    for place in PLACES:
        values = records.numbers(record["per question"][place])
        assert values.shape == (questions["questions"],) and ((values >= 0) & (values <= 1)).all()
        assert record["nDCG@10"][place] == pytest.approx(values.mean(), abs=1e-4)
    counts = Counter(load("tiny", folder, 0, SOURCES).train["domain"])
    of_specialists = sum(-(-count // 8) for count in counts.values())
    steps = {"a": 0, "d": of_specialists, "f": of_specialists}.get(arm, 5)  # 36 pairs by 8
    assert record["steps"] == len(record["losses"]) == steps
    assert f"--arm {arm} --seed 0" in record["command"]


def test_dense_is_the_pretrained_model_trained_and_the_domain_does_not_matter(folder, tmp_path):
    pretrained, dense = (run_cell(folder, tmp_path, arm) for arm in "ab")
    assert pretrained["per question"] != dense["per question"]
    for record in (pretrained, dense):
        found = record["per question"]
        assert found["everything"] == found["unknown domain"]


def test_the_same_cell_again_gives_the_same_numbers(folder, tmp_path):
    first, again = (run_cell(folder, tmp_path / name, "e") for name in ("1", "2"))
    assert first["per question"] == again["per question"] and first["losses"] == again["losses"]


def test_records_of_other_data_are_refused(folder, tmp_path):
    run_cell(folder, tmp_path, "a")
    path = tmp_path / "minilm-tiny-questions.json"
    path.write_text(json.dumps({**records.read(path), "sha256": "other"}))
    with pytest.raises(ValueError, match="is of other data"):
        run_cell(folder, tmp_path, "b")
    with pytest.raises(ValueError, match="is of other data"):
        report.report(tmp_path)


def test_table_and_picture(folder, tmp_path):
    output = tmp_path / "claims"
    assert report.report(output) == "No records yet.\n"
    for arm in ("a", "b", "c", "e"):
        run_cell(folder, output, arm)
    text = report.report(output)
    assert text == (tmp_path / "claims.md").read_text()
    assert "(c) dense, domain as prefix | 1 |" in text and "| (e) - (c) |" in text
    assert (tmp_path / "claims.png").stat().st_size > 1000


def test_numbers_survive_the_record():
    values = np.random.default_rng(0).random(100).astype(np.float32)
    assert np.array_equal(records.numbers(records.compact(values)), values)


def test_the_paired_difference_is_that_of_the_questions():
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 50, 400)
    second = {s: {"p": rng.random(400)} for s in range(3)}
    gain = 0.1 + 0.05 * rng.standard_normal(400)
    first = {s: {"p": second[s]["p"] + gain} for s in range(3)}
    found = difference(first, second, "p", groups)
    assert found.value == pytest.approx(gain.mean())
    assert found.low < gain.mean() < found.high and found.high - found.low < 0.03
    assert found.verdict == "better" and len(found.seeds) == 3
    # independent questions: the error of the mean of 400
    assert found.detectable / 2.8 == pytest.approx(0.05 / 20, rel=0.35)


def test_groups_count_not_questions():
    groups = np.repeat(np.arange(20), 20)
    values = np.repeat(np.random.default_rng(0).standard_normal(20), 20)  # equal within a group
    zeros = {0: {"p": np.zeros(400)}}
    found = difference({0: {"p": values}}, zeros, "p", groups)
    alone = difference({0: {"p": values}}, zeros, "p", np.arange(400))
    assert (found.high - found.low) > 3 * (alone.high - alone.low)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (-0.004, 0.005, "equal"),
        (0.001, 0.02, "better"),
        (-0.02, -0.001, "worse"),
        (-0.01, 0.01, "not decided"),
    ],
)
def test_verdicts(low, high, verdict):
    assert Difference(0.0, low, high, (0.0,), 0.01, 1).verdict == verdict


def test_only_common_seeds_are_compared():
    first = {1: {"p": np.ones(4)}}
    second = {seed: {"p": np.full(4, 0.1 * seed)} for seed in range(3)}
    assert difference(first, second, "p", np.arange(4)).seeds == pytest.approx((0.9,))


def test_the_plan_begins_with_what_decides_most():
    cells = list(all_cells())
    assert cells[0] == ("minilm", "medquad", "b", 0) and len(set(cells)) == len(cells)
    first = cells[:16]
    assert {cell.arm for cell in first} == {"a", "b", "c", "d", "e", "e0"}
    assert {cell.data for cell in first} == {"medquad"}
    assert chosen(None, "medquad", None, 1) == [c for c in cells if c[1] == "medquad" and c[3] == 1]
    assert chosen("minilm", "medquad", "c", 7) == [("minilm", "medquad", "c", 7)]


def test_prefix():
    assert with_prefix("What is it?", "rare_diseases") == "rare diseases: What is it?"


def test_some_domains_can_be_cut_down(folder):
    most = dict(zip(DOMAINS[:2], (3, 5), strict=True))
    source = Source("pairs.jsonl", 8, 4, "focus", most=most)
    data = load("cut", folder, 0, {"cut": (source,)})
    assert Counter(data.train["domain"]) == {**most, DOMAINS[2]: 8}
    assert Counter(data.test.corpus_domains.values()) == dict.fromkeys(DOMAINS, 4)
    too_many = replace(source, most={DOMAINS[0]: 1000})
    with pytest.raises(ValueError, match=f"{DOMAINS[0]} has .* pairs; 1000 wanted"):
        load("cut", folder, 0, {"cut": (too_many,)})


def test_gains_of_small_domains_are_grouped_by_their_pairs(tmp_path, monkeypatch):
    source = Source("pairs.jsonl", 8, 4, most={"fruit": 20, "metal": 50})
    monkeypatch.setattr(small_domains, "SETS", {"small0": (source,)})
    questions = {
        "domains": DOMAINS,
        "domain": records.compact(np.array([0, 0, 1, 2], np.float32)),
        "group": records.compact(np.array([0, 1, 2, 3], np.float32)),
    }
    records.write(tmp_path / "r" / "minilm-small0-questions.json", questions)
    for arm, scores in (("b", [0.5, 0.5, 0.5, 0.5]), ("e", [0.25, 0.75, 0.25, 1.0])):
        found = {place: records.compact(np.array(scores, np.float32)) for place in PLACES}
        records.write(tmp_path / "r" / f"minilm-small0-{arm}-0.json", {"per question": found})
    parts = small_domains.parts_of(tmp_path / "r")
    gains = {size: parts["e", size][0].gains["everything"].tolist() for _, size in parts}
    assert gains == {20: [-0.25, 0.25], 50: [-0.25], small_domains.FULL: [0.5]}
    text = small_domains.report(tmp_path / "r")
    assert "| (e) mixture by domain | 50 | 1 | 1 | -0.250 [-0.250, -0.250] |" in text
    assert (tmp_path / "small_domains.md").read_text() == text
