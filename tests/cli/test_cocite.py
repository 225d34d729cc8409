"""cocite: files that the readers take back, and the library's counts."""

import json

from moe_fast.data import cocitation_pairs, read_pairs


def test_a_file_per_split_and_the_counts(moe_fast_cli, workspace):
    flags = ["--fractions", ".5,.5,0", "--min-cocitations", 2, "--negatives-per-positive", 2]
    result = moe_fast_cli("cocite", "papers.jsonl", *flags, "--seed", 4, "--ids", "-o", "x")
    assert result.exit_code == 0, result.output
    expected = cocitation_pairs(
        "papers.jsonl",
        fractions=(0.5, 0.5, 0.0),
        min_cocitations=2,
        negatives_per_positive=2,
        ids=True,
        seed=4,
    )
    assert {path.name for path in (workspace / "x").iterdir()} == {
        "train.jsonl",
        "dev.jsonl",
        "report.json",
        "cocite.yaml",
    }
    for split, rows in expected.splits.items():
        written = read_pairs(workspace / "x" / f"{split}.jsonl", keep=("a_id", "b_id"))
        assert {n: list(written[n]) for n in rows.column_names} == {
            n: list(rows[n]) for n in rows.column_names
        }
    report = json.loads((workspace / "x" / "report.json").read_text())
    assert report == expected.report.to_dict()
    assert f"cocited: {report['cocited']}" in result.stdout


def test_other_formats(moe_fast_cli, workspace):
    arguments = ["papers.jsonl", "--fractions", "1,0,0", "--format", "parquet", "-o", "x"]
    assert moe_fast_cli("cocite", *arguments).exit_code == 0
    assert len(read_pairs(workspace / "x" / "train.parquet")) > 0


def test_a_table(moe_fast_cli, workspace):
    papers = [json.loads(line) for line in (workspace / "papers.jsonl").read_text().splitlines()]
    lines = [f"{p['id']}|{p['abstract']}|{' '.join(p['citing'])}" for p in papers]
    (workspace / "papers.csv").write_text("\n".join(["id|summary|citing", *lines, "x||"]) + "\n")
    flags = ["--fractions", "1,0,0", "--delimiter", "|", "--columns", "abstract=summary"]
    result = moe_fast_cli("cocite", "papers.csv", *flags, "--skip-invalid", "-o", "x")
    assert result.exit_code == 0, result.output
    moe_fast_cli("cocite", "papers.jsonl", "--fractions", "1,0,0", "-o", "y")
    assert (workspace / "x/train.jsonl").read_text() == (workspace / "y/train.jsonl").read_text()
    result = moe_fast_cli("cocite", "papers.jsonl", "--delimiter", "|", "-o", "z")
    assert result.exit_code == 1 and "there is no CSV file" in result.stderr


def test_failures(moe_fast_cli, workspace):
    result = moe_fast_cli("cocite", "papers.jsonl", "--fractions", "a,b", "-o", "x")
    assert result.exit_code == 2 and "--fractions must be numbers" in result.stderr
    result = moe_fast_cli("cocite", "papers.jsonl", "--fractions", ".5,.1,.1", "-o", "x")
    assert result.exit_code == 1 and "fractions" in result.stderr
    assert not (workspace / "x").exists()
