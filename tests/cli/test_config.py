"""YAML files of settings: what is read, what is refused and in which words."""

from pathlib import Path
from typing import Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from moe_fast.cli.config import read_config, write_config

ALLOWED = {
    "batch_size": int,
    "learning_rate": float,
    "quiet": bool,
    "output": Path,
    "domain": str | None,
    "loss": Literal["infonce", "clp"],
    "domains": list[str] | None,
    "max_steps": int | None,
    "data": list[str],
    "columns": list[str] | None,
}


def read(tmp_path, text):
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    return read_config(path, ALLOWED)


def test_names_with_dashes_or_underscores(tmp_path):
    assert read(tmp_path, "batch-size: 4\nlearning_rate: 0.5") == {
        "batch_size": 4,
        "learning_rate": 0.5,
    }


@pytest.mark.parametrize("number", ["2e-5", "2E-05", "1.0e-5", "2.e+3", "-1e2", ".5e1", "3"])
def test_numbers_as_people_write_them(number, tmp_path):
    """YAML 1.1 reads 2e-5 as text."""
    assert read(tmp_path, f"learning-rate: {number}") == {"learning_rate": float(number)}


def test_null_is_the_default(tmp_path):
    assert read(tmp_path, "domain: null\nbatch-size:\nloss: clp") == {"loss": "clp"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batchsize: 4", "unknown key 'batchsize'; the nearest known are batch-size"),
        ("learning_rat: 4", "unknown key 'learning_rat'; the nearest known are learning-rate"),
        ("zzz: 4", "unknown key 'zzz'; known are batch-size, columns, data"),
        ("batch-size: 1.5", r"batch-size must be a whole number; got 1.5 \(float\)"),
        ("batch-size: true", r"batch-size must be a whole number; got True \(bool\)"),
        ("batch-size: '4'", r"batch-size must be a whole number; got '4' \(str\)"),
        ("learning-rate: fast", r"learning-rate must be a finite number; got 'fast' \(str\)"),
        ("learning-rate: .nan", "learning-rate must be a finite number; got nan"),
        ("quiet: 1", r"quiet must be true or false; got 1 \(int\)"),
        ("output: 3", r"output must be a path; got 3 \(int\)"),
        ("domain: 3", r"domain must be text; got 3 \(int\)"),
        ("loss: mse", r"loss must be one of infonce, clp; got 'mse'"),
        ("domains: 3", r"domains must be text or a list, each text; got 3 \(int\)"),
        ("domains: [law, 3]", r"domains must be text or a list, each text; got \['law', 3\]"),
        ("batch-size: 1\nbatch-size: 2", "the key 'batch-size' is there twice"),
        ("batch-size: 1\nbatch_size: 2", "the key 'batch-size' is there twice"),
        ("- a\n- b", r"must be a mapping of settings \(name: value\); got list"),
        ("", "must be a mapping .* got NoneType"),
        ("a: [1", "not valid YAML"),
        ("a: !!python/object/apply:os.getcwd []", "not valid YAML"),
        ("? [a, b]\n: 1", "not valid YAML"),
        ("data: 3", "data must be text or a list, each text, or a mapping of names to texts; got"),
        ("data: {law: 3}", "data: 'law' must be text or texts; got 3"),
        ("data: {law: []}", r"data: 'law' must be text or texts; got \[\]"),
        ("data: {a=b: x}", "data: a name must be text without '='; got 'a=b'"),
        ("data: {1: x}", "data: a name must be text without '='; got 1"),
        ("domains: {law: x}", r"domains must be text or a list, each text; got \{'law': 'x'\}"),
        ("domain: 2024-13-45", "not valid YAML .*month must be in"),
        ("learning-rate: " + "9" * 400, "learning-rate must be a finite number; got 9999"),
        ("domains: " + "[" * 5000, "not valid YAML .nested too deeply"),
        ("domain: '" + "x" * 300_000 + "'", "300,010 bytes; a file of settings has at most"),
        ("domain:\n  <<: {a: b}", "not valid YAML .*merge keys"),
        ('"\\e[2J": 1', r"unknown key '.x1b\[2J'"),
    ],
)
def test_refused(text, message, tmp_path):
    with pytest.raises(ValueError, match=f"settings.yaml: .*{message}"):
        read(tmp_path, text)


def test_a_text_alone_is_a_list_of_one(tmp_path):
    """As files of settings had it before a flag could be given several times."""
    assert read(tmp_path, "data: law.jsonl\ndomains: law") == {
        "data": ["law.jsonl"],
        "domains": ["law"],
    }


@pytest.mark.parametrize(("command", "name"), [("evaluate", "pairs"), ("inspect", "texts")])
def test_a_files_name_where_several_may_be_given(command, name, moe_fast_cli, workspace):
    (workspace / "old.yaml").write_text(f"model: mixture\n{name}: none.jsonl\n")
    result = moe_fast_cli(command, "--config", "old.yaml", "--domain", "law")
    assert result.exit_code == 1 and "none.jsonl" in result.stderr


def test_a_mapping_is_names_and_values(tmp_path):
    text = "data: {law: law.jsonl, medicine: [a.csv, b=c.csv]}\ncolumns: {a: question}"
    assert read(tmp_path, text) == {
        "data": ["law=law.jsonl", "medicine=a.csv", "medicine=b=c.csv"],
        "columns": ["a=question"],
    }


@pytest.mark.parametrize("level", ["[*{0}, *{0}, *{0}, *{0}, *{0}, *{0}, *{0}, *{0}, *{0}]"])
@pytest.mark.parametrize("key", ["domains", "data", "zzz", "? "])
def test_aliases_of_aliases_stay_small(tmp_path, level, key):
    """Nine to the power of twelve values in some hundred bytes."""
    names = [f"n{n}" for n in range(12)]
    lines = ["&n0 [x, x, x, x, x, x, x, x, x]"]
    lines += [
        f"&{name} {level.format(other)}" for other, name in zip(names, names[1:], strict=False)
    ]
    text = f"{key}: [{', '.join(lines)}]" if key != "? " else f"? [{', '.join(lines)}]\n: 1"
    with pytest.raises(ValueError, match="settings.yaml: ") as error:
        read(tmp_path, text)
    assert len(str(error.value)) < 1000


def test_no_such_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file .*none.yaml"):
        read_config(tmp_path / "none.yaml", ALLOWED)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "batch_size": st.integers(),
            "learning_rate": st.floats(allow_nan=False, allow_infinity=False),
            "quiet": st.booleans(),
            "domain": st.text(),
            "loss": st.sampled_from(["infonce", "clp"]),
            "domains": st.lists(st.text()),
        },
    )
)
def test_what_is_written_is_read(tmp_path_factory, settings):
    path = tmp_path_factory.mktemp("config") / "settings.yaml"
    write_config(path, settings, "a title")
    assert path.read_text().startswith("# a title\n")
    assert read_config(path, ALLOWED) == settings


@pytest.mark.parametrize("text", ["0E0", "1e5", "-2.e+3", ".5E-1", "2e-5", "1_000", "yes", "null"])
def test_a_text_that_looks_like_something_else_stays_a_text(tmp_path, text):
    settings = {"domain": text, "domains": [text, "law"]}
    write_config(tmp_path / "settings.yaml", settings, "a title")
    assert read_config(tmp_path / "settings.yaml", ALLOWED) == settings


def test_paths_and_what_is_unset(tmp_path):
    write_config(tmp_path / "s.yaml", {"output": Path("a/b"), "domain": None}, "t")
    assert yaml.safe_load((tmp_path / "s.yaml").read_text()) == {"output": "a/b"}


# --- through the command line --------------------------------------------------------------------


def test_flags_before_file_before_defaults(moe_fast_cli, workspace):
    (workspace / "s.yaml").write_text(
        "num-experts: 3\nnum-experts-per-tok: 2\nmodel: dense-model\n"
    )
    result = moe_fast_cli("upcycle", "--config", "s.yaml", "--num-experts", 4, "-o", "x")
    assert result.exit_code == 0, result.output
    saved = yaml.safe_load((workspace / "x" / "upcycle.yaml").read_text())
    assert (saved["num-experts"], saved["num-experts-per-tok"], saved["target"]) == (4, 2, "mlp")
    assert saved["model"] == "dense-model"


def test_a_mistake_in_the_file_is_wrong_usage(moe_fast_cli, workspace):
    (workspace / "s.yaml").write_text("num_expert: 3")
    result = moe_fast_cli("upcycle", "dense-model", "--config", "s.yaml", "-o", "x")
    assert result.exit_code == 2
    message = " ".join(result.stderr.replace("│", " ").split())
    assert "s.yaml: unknown key 'num_expert'; the nearest known are num-experts" in message
    assert not (workspace / "x").exists()


def test_quiet_debug_and_config_are_no_settings_of_a_file(moe_fast_cli, workspace):
    (workspace / "s.yaml").write_text("config: other.yaml")
    result = moe_fast_cli("upcycle", "dense-model", "--config", "s.yaml", "-o", "x")
    assert result.exit_code == 2 and "unknown key 'config'" in result.stderr
