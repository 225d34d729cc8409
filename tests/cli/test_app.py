"""Every command: its help, its example; exit codes and what ends up on stderr."""

import json
import logging
import os
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import typer
import yaml

import moe_fast
from moe_fast.cli.app import COMMANDS

NAMES = {
    "upcycle",
    "extract",
    "join",
    "train",
    "evaluate",
    "embed",
    "search",
    "inspect",
    "papers",
    "cocite",
    "mine",
    "tune",
    "bench",
    "demo",
    "quantize",
    "serve",
    "export",
}


def test_the_commands():
    assert set(COMMANDS) == NAMES


def test_help_lists_the_commands(moe_fast_cli):
    result = moe_fast_cli("--help")
    assert result.exit_code == 0
    assert all(name in result.output for name in NAMES)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_help_ends_with_the_example(name, moe_fast_cli):
    result = moe_fast_cli(name, "--help")
    assert result.exit_code == 0
    example = " ".join(COMMANDS[name].EXAMPLE.split())
    assert f"Example: {example}" in " ".join(result.output.split())
    for flag in ("--config", "--backend", "--seed", "--quiet"):
        assert flag in result.output


@pytest.fixture
def papers_service(monkeypatch):
    """Papers on the loopback address, in place of PubMed Central."""
    pytest.importorskip("Bio", reason="needs the extra moe-fast[papers]")
    from tests.data.pmc_service import loopback, make_service

    with loopback(make_service(), monkeypatch):
        yield


# serve does not end, and tune needs a GPU.
@pytest.mark.parametrize("name", sorted(NAMES - {"demo", "serve", "tune"}))
def test_the_example_runs(name, moe_fast_cli, workspace, request):
    if name == "papers":
        request.getfixturevalue("papers_service")
    words = shlex.split(COMMANDS[name].EXAMPLE)
    assert words[:2] == ["moe-fast", name]
    flag = "-o" if "-o" in words else "--json"
    output = workspace / words[words.index(flag) + 1]
    assert not output.exists()

    result = moe_fast_cli(*words[1:])
    assert result.exit_code == 0, result.output
    assert output.exists()

    saved = output / f"{name}.yaml" if output.is_dir() else workspace / f"{output.name}.yaml"
    settings = yaml.safe_load(saved.read_text())
    assert settings["seed"] == 0 and settings["backend"] == "auto"

    again = moe_fast_cli(*words[1:])  # what is there is kept
    assert again.exit_code == 1
    assert "exists already and is kept" in again.stderr

    replaced = moe_fast_cli(name, "--config", saved, "--overwrite")  # the saved settings run
    assert replaced.exit_code == 0, replaced.output


def test_the_demo_gets_its_settings(moe_fast_cli, monkeypatch):
    """The demo itself has its own test; here it is enough that it is asked for the right thing."""
    from moe_fast.demo import __main__ as demo

    given = []
    monkeypatch.setattr(demo, "main", lambda *settings: given.append(settings))
    assert moe_fast_cli("demo").exit_code == 0  # needs no arguments
    assert given.pop() == (False, Path("demo-output"), None, 0, "cpu")
    example = shlex.split(COMMANDS["demo"].EXAMPLE)[1:]
    assert moe_fast_cli(*example, "--seed", 3).exit_code == 0
    assert given == [(True, Path("demo-output"), None, 3, "cpu")]


def test_a_failing_demo_is_a_failure(moe_fast_cli, monkeypatch):
    from moe_fast.demo import __main__ as demo

    def fail(*settings):
        raise typer.Exit(1)

    monkeypatch.setattr(demo, "main", fail)
    assert moe_fast_cli("demo", "--quick").exit_code == 1


def test_failure_is_one_line_and_exit_code_1(moe_fast_cli):
    result = moe_fast_cli("embed", "mixture", "no-such-file.txt", "-o", "x.npy", "--domain", "law")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == "moe-fast embed: error: no such file: no-such-file.txt\n"


def test_failure_says_what_was_noted_on_its_way(moe_fast_cli, monkeypatch):
    """On a full disk, which checkpoint is left."""
    from moe_fast.inference import embed

    def fail(*arguments, **settings):
        error = OSError("no space")
        error.add_note("the last whole one: x")
        raise error

    monkeypatch.setattr(embed, "embed_file", fail)
    result = moe_fast_cli("embed", "mixture", "texts.jsonl", "-o", "x.npy")
    assert result.stderr == "moe-fast embed: error: no space the last whole one: x\n"


def test_debug_shows_the_traceback(moe_fast_cli):
    result = moe_fast_cli("embed", "mixture", "no-file.txt", "-o", "x.npy", "--debug")
    assert isinstance(result.exception, FileNotFoundError)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-command"], "no-such-command"),
        (["embed", "mixture"], "Missing argument"),
        (["embed", "mixture", "texts.jsonl", "-o", "x.npy", "--precision", "int4"], "float16"),
        (["embed", "mixture", "texts.jsonl", "-o", "x.npy", "--batch-size", "0"], "batch-size"),
        (["embed", "mixture", "x", "-o", "x.npy", "--engine", "ray"], "x.npy will be a folder"),
        (["embed", "mixture", "x", "-o", "y", "--engine", "ray", "--skip-invalid"], "engine local"),
        (["embed", "mixture", "x.txt", "-o", "x.npy", "--ray-address", "auto"], "engine ray"),
        (["upcycle", "dense-model", "-o", "x"], "--num-experts"),
        (["train", "x", "--data", "x", "-o", "x", "--epochs", "nan"], "finite number; got nan"),
        (["upcycle", "dense-model", "-o", "x", "--num-experts", "2", "--layers", "1,b"], "1, b"),
        (["upcycle", "dense-model", "-o", "x", "--seed", "-1"], "'--seed'"),
        (["train", "x", "--data", "x", "-o", "x", "--learning-rate", "-1"], "'--learning-rate'"),
        (["join", "law=law-model", "-o", "x"], "at least 2 models; got 1"),
        (["join", "law", "b=c", "-o", "x"], "must be NAME=PATH; got 'law'"),
        (["join", "b=c", "b=d", "-o", "x"], "the name 'b' is there twice"),
        (["evaluate", "mixture"], "--pairs, --retrieval or --sts"),
        (["search", "--queries", "queries.jsonl"], "--documents or --load-index"),
        (["search", "--documents", "texts.jsonl"], "nothing to do"),
        (
            ["search", "--documents", "x.npy", "--queries", "x.npy"],
            "--queries and --output together",
        ),
        (["inspect", "mixture", "-o", "x.png"], "give --texts as well"),
        (
            ["embed", "mixture", "texts.jsonl", "-o", "x.npy", "--threads", "100000"],
            "'--threads': ",
        ),
        (
            ["embed", "m", "t.jsonl", "-o", "x.npy", "--domain", "a", "--domain-column", "b"],
            "--domain or --domain-column, not both",
        ),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments, message, moe_fast_cli):
    result = moe_fast_cli(*arguments)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.replace("│", " ").split())


QUIET = [
    ["upcycle", "dense-model", "--num-experts", "2", "-o", "x"],
    ["extract", "mixture", "--expert", "law", "-o", "x"],
    ["join", "law=law-model", "medicine=medicine-model", "-o", "x"],
    ["embed", "mixture", "texts.jsonl", "--domain", "law", "-o", "x.npy"],
    ["search", "--documents", "numbers.npy", "--queries", "numbers.npy", "-o", "x.trec"],
    ["cocite", "papers.jsonl", "--fractions", ".5,.5,0", "-o", "x"],
    ["mine", "pairs.jsonl", "--bm25", "--max-ratio", "0", "-o", "x.jsonl"],
]


@pytest.mark.parametrize("arguments", QUIET, ids=lambda words: words[0])
def test_quiet_prints_nothing(arguments, moe_fast_cli, workspace):
    np.save("numbers.npy", np.eye(3, dtype="float32"))
    result = moe_fast_cli(*arguments, "--quiet")
    assert (result.exit_code, result.output) == (0, "")


def test_quiet_silences_warnings_and_not_errors(moe_fast_cli, monkeypatch, capfd):
    def upcycle(*arguments, **settings):
        warnings.warn("a library's warning", stacklevel=1)
        for name in ("transformers", "moe_fast.models"):
            logging.getLogger(name).warning("a library's warning")
        raise ValueError("an error")

    monkeypatch.setattr(moe_fast, "upcycle", upcycle)
    arguments = ["upcycle", "dense-model", "--num-experts", 2, "-o", "x"]
    result = moe_fast_cli(*arguments, "--quiet")
    assert (result.exit_code, result.output) == (1, "moe-fast upcycle: error: an error\n")
    assert capfd.readouterr() == ("", "")
    with pytest.warns(UserWarning, match="a library's warning"):  # as before
        moe_fast_cli(*arguments)


def test_version(moe_fast_cli):
    result = moe_fast_cli("--version")
    assert (result.exit_code, result.output) == (0, f"moe-fast {moe_fast.__version__}\n")


def modules_after(arguments):
    """(exit code, output, top-level modules) of the program in a fresh process."""
    code = (
        "import json, sys; from moe_fast_cli import main\n"
        "try: main()\n"
        "except SystemExit as end: code = end.code\n"
        "names = sorted({name.partition('.')[0] for name in sys.modules})\n"
        "print('\\n' + json.dumps([code, names]))"
    )
    run = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(run, capture_output=True, text=True)
    exit_code, names = json.loads(done.stdout.splitlines()[-1])
    return exit_code, done.stdout + done.stderr, set(names)


@pytest.mark.parametrize(
    ("arguments", "exit_code", "shown"),
    [
        (["--help"], 0, "evaluate"),
        (["train", "--help"], 0, "--temperature"),
        (["--version"], 0, "moe-fast "),
        (["train", "--no-such-flag"], 2, "no-such-flag"),
    ],
)
def test_help_and_wrong_usage_load_no_library(arguments, exit_code, shown):
    code, output, modules = modules_after(arguments)
    assert code == exit_code and shown in output
    assert not modules & {"torch", "transformers", "numpy", "sentence_transformers", "datasets"}


def test_the_program_loads_the_library_for_a_command():
    code, output, modules = modules_after(["extract", "none/at/all", "--expert", "0", "-o", "x"])
    assert code == 1 and "error: model 'none/at/all': there is no such folder" in output
    assert "torch" in modules
    loaded = modules & {"sentence_transformers", "datasets", "faiss", "matplotlib", "pyarrow"}
    # Some releases of transformers load scikit-learn, and with it pandas and pyarrow.
    assert loaded <= ({"pyarrow"} if "sklearn" in modules else set())


@pytest.mark.parametrize("quiet", [[], ["--quiet"]])
def test_processes_that_a_command_starts_are_told(quiet, moe_fast_cli, monkeypatch):
    """Workers load the model anew, and with it the libraries and their talk."""
    names = ("PYTHONWARNINGS", "HF_HUB_DISABLE_PROGRESS_BARS")
    monkeypatch.setenv("PYTHONWARNINGS", "default")
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    seen = []

    def upcycle(*arguments, **settings):
        seen.extend(map(os.environ.get, names))
        raise ValueError("seen")

    monkeypatch.setattr(moe_fast, "upcycle", upcycle)
    moe_fast_cli("upcycle", "dense-model", "--num-experts", 2, "-o", "x", *quiet)
    assert seen == ["ignore" if quiet else "default", "1"]
    assert [os.environ.get(name) for name in names] == ["default", None]  # as before
