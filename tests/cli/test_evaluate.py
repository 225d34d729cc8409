"""evaluate: the library's numbers, in one table and one JSON file; the real data evaluate."""

import csv
import gzip
import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from moe_fast.inference import load_model
from tests.cli.conftest import DOMAINS, read_jsonl, words, write_jsonl

SHARED = Path(
    os.environ.get("MOE_FAST_SHARED_DATA", Path(__file__).resolve().parents[3] / "shared" / "data")
)
needs_data = pytest.mark.skipif(
    not (SHARED / "stsb-en-test.csv.gz").exists(), reason=f"the real data are not in {SHARED}"
)
QUICK = ["--resamples", 50, "--batch-size", 64, "--quiet"]


@pytest.fixture
def evaluate(moe_fast_cli, workspace):
    def run(*arguments):
        result = moe_fast_cli("evaluate", *arguments, *QUICK, "--json", "scores.json", "--debug")
        assert result.exit_code == 0, result.output
        return result.stdout, json.loads((workspace / "scores.json").read_text())

    return run


def cosines(model, rows, domain=None):
    options = {} if domain is None else {"domain": domain}
    a, b = (
        model.encode([row[side] for row in rows], normalize_embeddings=True, **options)
        for side in ("a", "b")
    )
    return (a.astype(np.float64) * b).sum(1)


def test_labelled_pairs_per_domain(evaluate, workspace):
    rows = read_jsonl("pairs.jsonl")
    shifted = rows[2:] + rows[:2]  # two on, so that the domain stays
    wrong = [row | {"b": other["b"]} for row, other in zip(rows, shifted, strict=True)]
    labelled = [r | {"label": 1} for r in rows] + [r | {"label": 0} for r in wrong]
    write_jsonl(workspace / "labelled.jsonl", labelled)
    table, found = evaluate("mixture", "--pairs", "labelled.jsonl", "--dev", "labelled.jsonl")
    scores = found["pairs"]["evaluations"][0]["scores"]
    assert set(scores) == {*DOMAINS, "all"}
    model = load_model("mixture", device="cpu")
    domains = [row["domain"] for row in labelled]
    expected = roc_auc_score([row["label"] for row in labelled], cosines(model, labelled, domains))
    assert scores["all"]["ROC-AUC"]["value"] == pytest.approx(expected, abs=1e-6)
    assert "accuracy" in scores["all"]
    for word in ("law", "medicine", "all", "ROC-AUC", "F1max", f"{expected:.3f}"[-4:]):
        assert word in table


def test_against_another_model(evaluate, workspace):
    rng = random.Random(0)
    rows = [
        {"a": words(rng, domain), "b": words(rng, domain), "label": i % 3 % 2, "domain": domain}
        for i, domain in enumerate(DOMAINS * 30)
    ]
    write_jsonl(workspace / "hard.jsonl", rows)
    table, found = evaluate("mixture", "--pairs", "hard.jsonl", "--against", "other-mixture")
    first, second = found["pairs"]["evaluations"]
    difference = found["pairs"]["comparisons"][0]["differences"]["all"]["ROC-AUC"]["value"]
    expected = (
        first["scores"]["all"]["ROC-AUC"]["value"] - second["scores"]["all"]["ROC-AUC"]["value"]
    )
    assert difference == pytest.approx(expected)
    assert "mixture - other-mixture" in table


def test_several_tasks_at_once_and_a_domain_for_what_names_none(evaluate, workspace):
    (workspace / "sts.csv").write_text("w1 w2,w1 w2,5\nw3,w4 w9,1\nw5 w6,w6 w7,2.5\n")
    texts = read_jsonl("texts.jsonl")
    write_retrieval(workspace / "r.json", texts)
    arguments = ["--retrieval", "r.json", "--sts", "sts.csv", "--domain", "law"]
    table, found = evaluate("mixture", *arguments, "--measures", "nDCG@5,MAP", "--markdown")
    assert set(found) == {"retrieval", "sts"}
    assert set(found["retrieval"]["evaluations"][0]["scores"]["all"]) == {"nDCG@5", "MAP"}
    assert table.count("| --") >= 2


def test_files_that_name_their_domain(evaluate, workspace):
    """As one file with a column of domains."""
    for name in DOMAINS:
        rows = [row for row in read_jsonl("pairs.jsonl") if row.pop("domain") == name]
        write_jsonl(workspace / f"{name}.jsonl", rows)
    files = [part for name in DOMAINS for part in ("--pairs", f"{name}={name}.jsonl")]
    _, found = evaluate("mixture", *files)
    _, expected = evaluate("mixture", "--pairs", "pairs.jsonl", "--overwrite")
    for group, scores in expected["pairs"]["evaluations"][0]["scores"].items():
        for name, score in scores.items():
            same = found["pairs"]["evaluations"][0]["scores"][group][name]["value"]
            assert same == pytest.approx(score["value"], abs=1e-6)


def test_tables_as_spreadsheets_have_them(evaluate, moe_fast_cli, workspace):
    pairs = [json.loads(line) for line in (workspace / "pairs.jsonl").read_text().splitlines()]
    lines = [f"{row['a']}|{row['b']}|{row['domain']}" for row in pairs]
    (workspace / "p.csv").write_text("\n".join(["x|y|z", *lines, "|w1|law"]) + "\n")
    reading = ["--columns", "a=x,b=y,domain=z", "--delimiter", "|"]
    result = moe_fast_cli("evaluate", "mixture", "--pairs", "p.csv", *reading)
    assert result.exit_code == 1 and "p.csv, line 26: a is empty" in result.stderr
    _, scores = evaluate("mixture", "--pairs", "p.csv", *reading, "--skip-invalid")
    (workspace / "scores.json").unlink()
    _, plain = evaluate("mixture", "--pairs", "pairs.jsonl")
    assert scores == plain
    result = moe_fast_cli("evaluate", "mixture", "--pairs", "pairs.jsonl", "--delimiter", "|")
    assert result.exit_code == 1 and "there is no CSV file" in result.stderr


def test_a_retrieval_set_of_one_domain(evaluate, workspace):
    write_retrieval(workspace / "r.json", read_jsonl("texts.jsonl"))
    _, found = evaluate("mixture", "--retrieval", "law=r.json")
    assert set(found["retrieval"]["evaluations"][0]["scores"]) == {"law", "all"}


def test_judged_documents_that_are_missing(evaluate, moe_fast_cli, workspace):
    write_retrieval(workspace / "r.json", read_jsonl("texts.jsonl"))
    data = json.loads((workspace / "r.json").read_text())
    data["qrels"]["q0"]["gone"] = 1
    (workspace / "r.json").write_text(json.dumps(data))
    arguments = ["mixture", "--retrieval", "r.json", "--domain", "law"]
    result = moe_fast_cli("evaluate", *arguments, *QUICK)
    assert result.exit_code == 1 and "gone" in result.stderr
    _, found = evaluate(*arguments, "--on-missing", "drop")
    assert found["retrieval"]["evaluations"][0]["details"]["all"]["queries"] == 5


def test_a_querys_own_document(evaluate, workspace):
    texts = read_jsonl("texts.jsonl")
    corpus = {row["id"]: row["text"] for row in texts}
    data = {"corpus": corpus, "queries": {"d0": texts[0]["text"]}, "qrels": {"d0": {"d0": 1}}}
    (workspace / "r.json").write_text(json.dumps(data))
    arguments = ["mixture", "--retrieval", "r.json", "--domain", "law"]
    for flag, expected in (([], 0.0), (["--keep-identical-ids"], 1.0)):
        _, found = evaluate(*arguments, *flag, "--overwrite")
        score = found["retrieval"]["evaluations"][0]["scores"]["all"]["MRR@10"]
        assert score["value"] == expected


def test_long_texts_are_cut_and_counted_unless_told_otherwise(moe_fast_cli, workspace, caplog):
    rows = [{"a": "w1 " * 100, "b": "w2 w1"}, {"a": "w3", "b": "w4"}]
    write_jsonl(workspace / "long.jsonl", rows)
    arguments = ["evaluate", "mixture", "--pairs", "long.jsonl", "--domain", "law"]
    result = moe_fast_cli(*arguments, "--resamples", 0)
    assert result.exit_code == 0, result.output
    assert "1 of 2 texts" in caplog.text
    result = moe_fast_cli(*arguments, "--no-truncate", "--quiet")
    assert result.exit_code == 1 and "max_seq_length = 32" in result.stderr


def write_retrieval(path, texts):
    corpus = {row["id"]: row["text"] for row in texts}
    queries = {f"q{i}": row["text"] for i, row in enumerate(texts[:5])}
    qrels = {f"q{i}": {row["id"]: 1} for i, row in enumerate(texts[:5])}
    path.write_text(json.dumps({"corpus": corpus, "queries": queries, "qrels": qrels}))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mixture", "--pairs", "none.jsonl"], "none.jsonl"),
        (["mixture", "--sts", "pairs.jsonl"], "score"),
        (["mixture", "--retrieval", "pairs.jsonl"], "pairs.jsonl"),
        (["mixture", "--pairs", "pairs.jsonl", "--domain", "art"], "'art'"),
        (["mixture", "--pairs", "law=pairs.jsonl"], "the file has a column 'domain' already"),
        (["none/at/all", "--pairs", "pairs.jsonl"], "there is no such folder"),
        (["mixture", "--pairs", "pairs.jsonl", "--confidence", "2"], "confidence"),
    ],
)
def test_failures(arguments, message, moe_fast_cli, workspace):
    result = moe_fast_cli("evaluate", *arguments, "--json", "x.json", "--quiet")
    assert result.exit_code == 1, result.output
    assert message in result.stderr
    assert not (workspace / "x.json").exists()


@pytest.fixture
def reader(workspace):
    """A model that reads letters: to the others every English word is the same unknown one."""
    shutil.copytree("dense-model", "reader")
    tokenizer = Tokenizer.from_file("reader/tokenizer.json")
    special = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "x", "y", "[CLS]", "[SEP]"])}
    letters = {letter: 6 + i for i, letter in enumerate("abcdefghijklmnopqrstuvw .,0123456789")}
    tokenizer.model = models.WordLevel(special | letters, unk_token="[UNK]")
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.save("reader/tokenizer.json")
    return "reader"


@needs_data
def test_stsb(evaluate, reader):
    file = SHARED / "stsb-en-test.csv.gz"
    _, found = evaluate(reader, "--sts", file, "--truncate")
    with gzip.open(file, "rt", encoding="utf-8", newline="") as lines:
        rows = [{"a": a, "b": b, "score": float(s)} for a, b, s in csv.reader(lines)]
    data = cosines(load_model(reader, device="cpu"), rows), [row["score"] for row in rows]
    scores = found["sts"]["evaluations"][0]["scores"]["all"]
    # Texts that begin alike are cut to the same letters: their rank is a matter of rounding.
    assert scores["Spearman"]["value"] == pytest.approx(stats.spearmanr(*data)[0], abs=1e-3)
    assert scores["Pearson"]["value"] == pytest.approx(stats.pearsonr(*data)[0], abs=1e-5)


@needs_data
def test_pubmedqa(evaluate, reader):
    pairs = SHARED / "pairs_pubmedqa_question_abstract.jsonl.gz"
    retrieval = SHARED / "retrieval_pubmedqa.json.gz"
    arguments = ["--pairs", pairs, "--retrieval", retrieval, "--truncate"]
    _, found = evaluate(reader, *arguments)
    assert found["retrieval"]["evaluations"][0]["details"]["all"]["queries"] == 1000
    assert found["pairs"]["evaluations"][0]["details"]["all"]["pairs"] == 1000


QRELS = "1 Q0 a#0 1\n1 Q0 b 2\n2 Q0 a#0 1\n3 Q0 c 1\n"
RUN = "1 Q0 b 1 12.25 Anserini\n1 Q0 c 2 11.5 Anserini\n1 Q0 a#0 3 11.5 Anserini\n2 Q0 c 1 3 A\n"


def test_an_existing_run_is_scored_as_trec_eval_does(evaluate, workspace):
    """pyserini's file; query 3 is not in it, and equal scores are ranked by trec_eval's rule."""
    pytrec_eval = pytest.importorskip("pytrec_eval")
    (workspace / "a.run").write_text(RUN)
    (workspace / "miracl.tsv").write_text(QRELS.replace(" ", "\t"))
    table, found = evaluate("--run", "a.run", "--qrels", "miracl.tsv")
    scores = found["retrieval"]["evaluations"][0]["scores"]["all"]
    assert list(scores) == ["nDCG@5", "nDCG@10", "Recall@100"] and "a.run" in table
    qrels: dict = {}
    for line in QRELS.splitlines():
        query, _, document, relevance = line.split()
        qrels.setdefault(query, {})[document] = int(relevance)
    hits: dict = {}
    for line in RUN.splitlines():
        query, _, document, _, score, _ = line.split()
        hits.setdefault(query, {})[document] = float(score)
    theirs = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.5,10", "recall.100"}).evaluate(hits)
    names = {"nDCG@5": "ndcg_cut_5", "nDCG@10": "ndcg_cut_10", "Recall@100": "recall_100"}
    for name, of_trec_eval in names.items():
        expected = sum(row[of_trec_eval] for row in theirs.values()) / len(qrels)
        assert 0 < scores[name]["value"] == pytest.approx(expected)
    details = found["retrieval"]["evaluations"][0]["details"]["all"]
    assert details["queries_not_in_run"] == 1


def test_two_runs_are_compared_query_by_query(evaluate, workspace):
    (workspace / "a.run").write_text(RUN)
    (workspace / "b.run").write_text(RUN + "3 Q0 c 1 1 t\n9 Q0 c 1 1 t\n")
    (workspace / "q.txt").write_text(QRELS)
    runs = ["--run", "b.run", "--against", "a.run", "--qrels", "q.txt"]
    _, found = evaluate(*runs, "--measures", "Recall@100")
    difference = found["retrieval"]["comparisons"][0]["differences"]["all"]["Recall@100"]
    assert difference["value"] == pytest.approx(1 / 3)
    assert found["retrieval"]["evaluations"][0]["details"]["all"]["queries_without_judgements"] == 1


def test_what_search_writes_scores_as_the_model_does(evaluate, moe_fast_cli, workspace):
    texts = read_jsonl("texts.jsonl")
    write_retrieval(workspace / "r.json", texts)
    queries = [{"id": f"q{i}", "text": row["text"]} for i, row in enumerate(texts[:5])]
    write_jsonl(workspace / "q.jsonl", queries)
    files = ["--documents", "texts.jsonl", "--queries", "q.jsonl", "-o", "r.trec"]
    assert moe_fast_cli("search", "--model", "mixture", "--domain", "law", *files).exit_code == 0
    measures = ["--measures", "nDCG@5,nDCG@10,Recall@100"]
    _, by_run = evaluate("--run", "r.trec", "--retrieval", "r.json", *measures)
    write_jsonl(workspace / "corpus.jsonl", texts)
    qrels = "".join(f"q{i}\t0\t{row['id']}\t1\n" for i, row in enumerate(texts[:5]))
    (workspace / "q.tsv").write_text(qrels)
    files = ["--corpus", "corpus.jsonl", "--queries", "q.jsonl", "--qrels", "q.tsv"]
    arguments = ["mixture", *files, "--domain", "law", *measures, "--overwrite"]
    _, by_model = evaluate(*arguments)
    first, second = (
        found["retrieval"]["evaluations"][0]["scores"]["all"] for found in (by_run, by_model)
    )
    assert {name: score["value"] for name, score in first.items()} == pytest.approx(
        {name: score["value"] for name, score in second.items()}
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a MODEL"),
        (["--run", "a.run"], "--run takes --qrels FILE or --retrieval FOLDER"),
        (["mixture", "--run", "a.run", "--qrels", "q"], "got model"),
        (["mixture", "--qrels", "q"], "--corpus, --queries and --qrels together"),
        (["mixture", "--pairs", "pairs.jsonl", "--split", "dev"], "--split goes with --retrieval"),
    ],
)
def test_flags_that_do_not_go_together(arguments, message, moe_fast_cli):
    result = moe_fast_cli("evaluate", *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())


def test_a_run_of_another_set(moe_fast_cli, workspace):
    (workspace / "a.run").write_text("x Q0 b 1 12.25 t\n")
    (workspace / "q.txt").write_text(QRELS)
    result = moe_fast_cli("evaluate", "--run", "a.run", "--qrels", "q.txt")
    assert result.exit_code == 1 and "none of its 1 queries is among the 3" in result.stderr
