"""train: what its options do to the model, the data and the folder that it writes."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from moe_fast.cli import training_pictures
from moe_fast.evaluation import plots
from moe_fast.inference import load_model
from tests.cli.conftest import DOMAINS, read_jsonl, words, write_jsonl


@pytest.fixture
def train(moe_fast_cli):
    """Trains for two steps, unless told otherwise, and asserts that it worked."""

    def run(model, *arguments, output="out", data="pairs.jsonl", steps=2):
        few = ["--data", data, "--max-steps", steps, "--batch-size", 4, "--device", "cpu"]
        result = moe_fast_cli("train", model, *few, "-o", output, *arguments, "--debug")
        assert result.exit_code == 0, result.output
        return result

    return run


def weights(path):
    return load_model(path, device="cpu").state_dict()


def changed(before, after):
    """Names of the tensors that training has changed."""
    before, after = weights(before), weights(after)
    assert list(before) == list(after)
    return {name for name in before if not torch.equal(before[name], after[name])}


def log(path="out"):
    with open(f"{path}/training_log.json") as file:
        return json.load(file)


# --- what is written -----------------------------------------------------------------------------


def test_the_folder(train, workspace):
    result = train(
        "mixture", "--learn-temperature", "--eval-data", "pairs.jsonl", "--eval-steps", 1
    )
    names = {path.name for path in (workspace / "out").iterdir()}
    assert {"train.yaml", "training_log.json", "training.png", "expert_usage.png"} <= names
    assert "loss_state.safetensors" in names
    assert "24 training rows" in result.stdout
    history = log()["history"]
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [1, 2]
    assert {"loss", "in_batch_accuracy", "temperature"} <= set(history[0])
    counts = log()["tokens_per_expert"]
    assert set(counts) == {"layer_0", "layer_1", "layer_2"} and len(counts["layer_0"]) == 2
    assert load_model("out", device="cpu").encode("w1", domain="law").shape == (32,)
    assert changed("mixture", "out")


def test_the_saved_settings_train_the_same_model(train, moe_fast_cli):
    train("mixture", "--seed", 3, "--swap", "--learning-rate", "1e-3", "--bf16")
    result = moe_fast_cli("train", "--config", "out/train.yaml", "-o", "again")
    assert result.exit_code == 0, result.output
    assert not changed("out", "again")
    settings = yaml.safe_load(Path("again/train.yaml").read_text())
    assert (settings["output"], settings["learning-rate"]) == ("again", 1e-3)


def test_quiet(moe_fast_cli):
    arguments = ["--data", "pairs.jsonl", "--max-steps", 1, "--batch-size", 4, "-o", "out"]
    result = moe_fast_cli("train", "mixture", *arguments, "--device", "cpu", "--quiet")
    assert (result.exit_code, result.stdout) == (0, "")


def test_the_seed_matters(train):
    train("mixture", "--seed", 3)
    train("mixture", "--seed", 4, output="other")
    assert changed("out", "other")


def test_stopped_and_resumed_is_the_same_as_never_stopped(train, moe_fast_cli):
    arguments = ["--save-steps", 2, "--learning-rate", "1e-3", "--learn-temperature", "--swap"]
    train("mixture", *arguments, output="whole", steps=6)
    train("mixture", *arguments, steps=6)
    shutil.rmtree("out/checkpoints/checkpoint-6")  # as if it had been killed after step 4
    result = moe_fast_cli("train", "--config", "out/train.yaml", "--resume")
    assert result.exit_code == 0, result.output
    assert not changed("whole", "out")
    states = [load_file(f"{path}/loss_state.safetensors") for path in ("whole", "out")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_an_interrupted_run_has_its_settings_beside_its_checkpoints(train, moe_fast_cli, workspace):
    """And goes on with these alone."""
    train("mixture", "--save-steps", 1, steps=2)
    for path in [*(workspace / "out").glob("*.*"), workspace / "out/checkpoints/checkpoint-2"]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    again = ["train", "--config", "out/checkpoints/train.yaml", "--resume"]
    result = moe_fast_cli(*again, "--learning-rate", 1e-3)
    assert result.exit_code == 1
    assert "--resume: --learning-rate was 2e-05 and is now 0.001; go on with" in result.stderr
    result = moe_fast_cli(*again, "--swap")
    assert result.exit_code == 1 and "--swap was False and is now True" in result.stderr
    result = moe_fast_cli(*again, "--max-steps", 3, "--logging-steps", 1)
    assert result.exit_code == 0, result.output
    assert log()["steps"] == 3


def test_overwrite_forgets_the_other_run(train, workspace):
    train("mixture", "--save-steps", 1, "--learn-temperature", steps=3)
    train("dense-model", "--save-steps", 1, "--overwrite", steps=1)
    out = workspace / "out"
    names = {path.name for path in (out / "checkpoints").iterdir()}
    assert names == {"checkpoint-1", "train.yaml", "inputs.json"}
    assert (out / "training.png").exists()
    stale = {"expert_usage.png", "loss_state.safetensors"} & {path.name for path in out.iterdir()}
    assert not stale
    train("dense-model", "--save-steps", 0, "--overwrite", output="new")


def test_saved_settings_carry_no_consent(train, moe_fast_cli):
    """Not --overwrite, nor --resume, which would look for checkpoints wherever they are run."""
    train("mixture", "--save-steps", 1, "--overwrite")
    shutil.rmtree("out/checkpoints/checkpoint-2")
    result = moe_fast_cli("train", "--config", "out/train.yaml", "--resume")
    assert result.exit_code == 0, result.output
    result = moe_fast_cli("train", "--config", "out/train.yaml")
    assert result.exit_code == 1 and "exists already and is kept" in result.stderr
    result = moe_fast_cli("train", "--config", "out/train.yaml", "-o", "again")
    assert result.exit_code == 0, result.output
    assert not changed("out", "again")


# --- the model -----------------------------------------------------------------------------------


def test_a_dense_model_stays_dense_or_becomes_a_mixture(train):
    train("dense-model")
    assert type(load_model("out", device="cpu")).__name__ == "SentenceTransformer"
    train("dense-model", "--routing", "enforced", output="moe")
    config = load_model("moe", device="cpu").transformers_model.config
    assert (config.domains, config.num_experts, config.routing) == (DOMAINS, 2, "enforced")
    flags = ["--num-experts", 3, "--num-experts-per-tok", 2, "--routing", "token_topk"]
    train("dense-model", *flags, "--layers", "single", output="learned")
    config = load_model("learned", device="cpu").transformers_model.config
    assert (config.num_experts, config.num_experts_per_tok, config.moe_layers) == (3, 2, [1])


def test_experts_with_few_rows_can_be_pooled(train):
    hint = "fewer than 100 rows of training data: law 12, medicine 12"
    assert hint in train("mixture", output="alone").stdout
    assert hint not in train("mixture", "--pool-experts", 300, output="pooled").stdout
    assert changed("alone", "pooled")
    assert "--pool-experts" not in train("dense-model", output="dense").stdout


def test_what_is_frozen_does_not_change(train):
    train("mixture", "--trainable", "experts", "--learning-rate", "1e-2")
    assert changed("mixture", "out")
    assert all(".up_proj" in n or ".down_proj" in n for n in changed("mixture", "out"))
    train("mixture", "--freeze-embeddings", "--learning-rate", "1e-2", output="other")
    names = changed("mixture", "other")
    assert names and not [name for name in names if ".embeddings." in name]


# --- data ----------------------------------------------------------------------------------------


def test_a_domain_per_file(train, workspace, monkeypatch):
    drawn = {}
    monkeypatch.setattr(training_pictures, "_USAGE_TEXTS", 6)
    monkeypatch.setattr(plots, "plot_expert_usage", lambda *args, **kwargs: drawn.update(of=args))
    for domain in DOMAINS:
        rows = read_jsonl("pairs.jsonl")
        rows = [{k: row[k] for k in "ab"} for row in rows if row["domain"] == domain]
        write_jsonl(workspace / f"{domain}.jsonl", rows)
    train("mixture", "--data", "law=law.jsonl", data="medicine=medicine.jsonl")
    counts = log()["tokens_per_expert"]["layer_0"]
    assert all(counts)
    usages, names, path = drawn["of"]
    assert (names, path.name) == (DOMAINS, "expert_usage.png")  # the model's order, none left out
    assert usages["trained"][:, 0].tolist() == [[1, 0], [0, 1]]


@pytest.mark.slow
def test_listwise_distillation(train, workspace):
    rng = random.Random(0)
    rows = []
    for i in range(8):
        query, *passages = (words(rng, DOMAINS[i % 2], 6) for _ in range(4))
        scores = {"pos_scores": [0.9], "neg_scores": [0.3, 0.2]}
        texts = {"query": query, "pos": passages[:1], "neg": passages[1:]}
        rows.append({**texts, **scores, "domain": DOMAINS[i % 2]})
    write_jsonl(workspace / "flag.jsonl", rows)
    flags = ["--loss", "listwise_distillation", "--negatives-from", "same_domain"]
    train("mixture", *flags, "--hard-negatives", 2, data="flag.jsonl")
    assert any("distillation" in entry for entry in log()["history"])


def test_flag_rows_with_prompts_lengths_negatives_and_a_teacher(train, workspace):
    rng = random.Random(0)
    rows = []
    for i in range(12):
        domain = DOMAINS[i % 2]
        some = [words(rng, domain, 6) for _ in range(8)]
        rows.append({"query": some[0], "pos": some[1:3], "neg": some[3:6], "domain": domain})
        rows[-1] |= {"neg_q": [words(rng, domain) for _ in range(3)]}
        rows[-1] |= {"pos_scores": [0.9, 0.8], "neg_scores": [0.3, 0.2, 0.1]}
    write_jsonl(workspace / "flag.jsonl", rows)
    flags = ["--hard-negatives", 2, "--query-prompt", "w1 ", "--passage-prompt", "w2 w3 "]
    flags += ["--max-length-query", 6, "--max-length-passage", 9]
    train("mixture", *flags, "--loss", "clp", data="flag.jsonl")
    assert any("penalty" in entry for entry in log()["history"])
    model = load_model("out", device="cpu")
    assert (model.prompts["query"], model.prompts["document"]) == ("w1 ", "w2 w3 ")
    result = train("mixture", *flags, "--loss", "distillation", data="flag.jsonl", output="other")
    assert any("distillation" in entry for entry in log("other")["history"])
    # the queries of negatives would have become hard negatives
    assert "neg_q, the queries of negatives, is for --loss clp" in result.stdout


def test_positives_only(train, workspace):
    rows = read_jsonl("pairs.jsonl")
    write_jsonl(
        workspace / "labels.jsonl", [row | {"label": i % 3 > 0} for i, row in enumerate(rows)]
    )
    lines = (workspace / "labels.jsonl").read_text().replace("true", "1").replace("false", "0")
    (workspace / "labels.jsonl").write_text(lines)
    result = train("mixture", "--positives-only", data="labels.jsonl")
    assert "16 training rows" in result.stdout


# --- the loss ------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["infonce", "mnr_plus", "sigmoid", "clp"])
def test_losses(loss, train):
    train("mixture", "--loss", loss, "--matryoshka-dims", "32,16")
    assert np.isfinite(log()["metrics"]["train_loss"])


def test_router_losses_and_schedules_of_a_learned_router(train):
    flags = ["--load-balance", 0.05, "--z-loss", 0.01, "--mutual-information", 0.01]
    flags += ["--expert-supervision", 0.01, "--joint-decay", 0.9, "--symmetric"]
    flags += ["--negatives-from", "same_domain", "--batches", "single"]
    flags += ["--routing", "token_topk", "--domains", "law,medicine"]
    train("dense-model", *flags, "--gradient-accumulation", 2)
    entry = log()["history"][0]
    assert {"load_balance", "z_loss", "mutual_information", "expert_supervision"} <= set(entry)


@pytest.mark.parametrize("term", ["mutual-information", "expert-supervision"])
def test_a_router_may_learn_domains_that_the_model_does_not_name(term, train):
    flags = ["--routing", "token_topk", "--num-experts", 3, f"--{term}", 1, "--load-balance", 0.05]
    train("dense-model", *flags, "--eval-data", "pairs.jsonl", "--eval-steps", 1)
    assert load_model("out", device="cpu").transformers_model.config.domains == []
    name = term.replace("-", "_")
    assert {name, f"eval_{name}"} <= {key for entry in log()["history"] for key in entry}


def test_domains_of_the_evaluation_alone_have_an_id_too(train, workspace):
    rows = read_jsonl("pairs.jsonl")
    write_jsonl(workspace / "more.jsonl", [*rows, {"a": "w1", "b": "w2", "domain": "art"}])
    flags = ["--routing", "token_topk", "--num-experts", 3, "--mutual-information", 1]
    train("dense-model", *flags, "--eval-data", "more.jsonl", "--eval-steps", 2)
    assert any("eval_mutual_information" in entry for entry in log()["history"])


def test_early_stopping_takes_the_best_model_back(train):
    """With a rate of zero no evaluation is better than the first."""
    flags = ["--eval-data", "pairs.jsonl", "--eval-steps", 1, "--early-stopping", 2]
    train("mixture", *flags, "--learning-rate", 0, "--warmup", 0, steps=9)
    assert log()["steps"] == 3
    assert log()["best_checkpoint"].endswith("checkpoint-1")


def test_early_stopping_goes_on_counting_when_resumed(train, moe_fast_cli):
    flags = ["--eval-data", "pairs.jsonl", "--eval-steps", 1, "--early-stopping", 3]
    train("mixture", *flags, "--learning-rate", 0, "--warmup", 0, "--save-total-limit", 9, steps=9)
    assert log()["steps"] == 4
    for step in (3, 4):
        shutil.rmtree(f"out/checkpoints/checkpoint-{step}")
    result = moe_fast_cli("train", "--config", "out/train.yaml", "--resume")
    assert result.exit_code == 0, result.output
    assert log()["steps"] == 4


def test_tensorboard(train, workspace):
    pytest.importorskip("tensorboard")
    train("mixture", "--report-to", "tensorboard")
    assert list((workspace / "out").rglob("events.out.tfevents.*"))


# --- several processes ---------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes(files, workspace):
    """torchrun: one folder, written by the first process; both saw their half of the batches."""
    arguments = ["train", "mixture", "--data", "pairs.jsonl", "--max-steps", "2", "-o", "out"]
    arguments += ["--batch-size", "4", "--learn-temperature", "--device", "cpu"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launch += ["--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    done = subprocess.run(
        [*launch, "-m", "moe_fast.cli", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("the model, train.yaml") == 1
    assert log()["processes"] == 2
    assert changed("mixture", "out")


def test_the_pooling_is_set_and_saved(train):
    train("dense-model", "--pooling", "cls", "--gather", data="pairs.jsonl", steps=1)
    model = load_model("out", device="cpu")
    tokens = model.encode(["w1 w2"], output_value="token_embeddings")[0]
    np.testing.assert_allclose(model.encode(["w1 w2"])[0], tokens[0].numpy(), rtol=1e-5)


# --- the recipe of examples/recipes ------------------------------------------------------------

RECIPE = Path(__file__).resolve().parents[2] / "examples" / "recipes" / "clp_moe.yaml"


@pytest.fixture
def recipe(moe_fast_cli, workspace):
    """Runs the recipe on a few rows of words and a tiny model."""
    rng = random.Random(0)
    rows = []
    for domain in DOMAINS * 8:
        texts = [words(rng, domain) for _ in range(6)]
        row = {"query": texts[0], "pos": texts[1:2], "neg": texts[2:4], "neg_q": texts[4:]}
        rows.append(row)
    write_jsonl(workspace / "rows.jsonl", rows)

    def run(*flags):
        few = ["--max-steps", 2, "--batch-size", 4, "--device", "cpu", "--learning-rate", "1e-2"]
        lengths = ["--max-length-query", 16, "--max-length-passage", 16]
        arguments = ["dense-model", "--config", RECIPE, "-o", "out", *few, *lengths, *flags]
        result = moe_fast_cli("train", *arguments, "--debug")
        assert result.exit_code == 0, result.output
        start = ["upcycle", "dense-model", "--num-experts", 2, "--target", "intermediate"]
        assert moe_fast_cli(*start, "--routing", "token_topk", "-o", "start").exit_code == 0
        return changed("start", "out"), load_model("out", device="cpu").transformers_model

    return run


def test_the_recipe_trains_the_experts_and_the_router(recipe):
    names, model = recipe()
    parts = {name.rpartition(".mlp.")[2] for name in names}
    assert parts == {"up_proj", "up_proj_bias", "router.weight"}, names
    assert model.config.weight_mode == "straight_through" and model.config.target == "intermediate"


def test_its_authors_form_leaves_the_router_as_it_was(recipe):
    """Even where it may change, as here: its gradient is 0."""
    names, model = recipe("--weight-mode", "renormalize")
    assert {name.rpartition(".mlp.")[2] for name in names} == {"up_proj", "up_proj_bias"}
    assert model.config.weight_mode == "renormalize"


# --- bad input -----------------------------------------------------------------------------------

LEARNED = ["--routing", "token_topk", "--num-experts", "2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none/at/all", "--data", "pairs.jsonl"], "there is no such folder"),
        (["mixture", "--data", "none.jsonl"], "none.jsonl"),
        (["mixture", "--data", "law=pairs.jsonl"], "has a column 'domain' already"),
        (["mixture", "--data", "pairs.jsonl", "--data", "plain.jsonl"], "must have the same"),
        (["mixture", "--data", "plain.jsonl"], "no column 'domain'"),
        (["mixture", "--data", "one.jsonl"], "one domain only, 'law'; the model has 2"),
        (["mixture", "--data", "labels.jsonl"], "1 of 2 pairs have label 0"),
        (["mixture", "--data", "pairs.jsonl", "--num-experts", "2"], "is one already"),
        (["dense-model", "--data", "plain.jsonl", "--batches", "mixed"], "--batches needs data"),
        (["dense-model", "--data", "pairs.jsonl", "--trainable", "experts"], "the model is dense"),
        (["mixture", "--data", "pairs.jsonl", "--early-stopping", "2"], "needs --eval-data"),
        (["mixture", "--data", "pairs.jsonl", "--resume"], "there is no checkpoint"),
        (
            ["mixture", "--data", "pairs.jsonl", "--loss", "mnr_plus", "--symmetric"],
            "--symmetric",
        ),
        (["mixture", "--data", "pairs.jsonl", "--loss", "sigmoid", "--gather"], "--gather is for"),
        (
            ["mixture", "--data", "pairs.jsonl", "--loss", "listwise_distillation"],
            "needs FlagEmb",
        ),
        (["mixture", "--data", "pairs.jsonl", "--temperature", "-1"], "temperature"),
        (["mixture", "--data", "pairs.jsonl", "--load-balance", "0.1"], "enforced"),
        (["mixture", "--data", "pairs.jsonl", "--epochs", "0"], "--epochs must be above 0; got 0"),
        (["mixture", "--data", "pairs.jsonl", "--epochs", "-1"], "--epochs must be above 0"),
        (
            ["dense-model", "--data", "pairs.jsonl", "--layers", "0", "--num-experts-per-tok", "2"],
            "--num-experts-per-tok, --layers shape the mixture",
        ),
        (["mixture", "--data", "pairs.jsonl", "--target", "output"], "--target shape the mixture"),
        (["mixture", "--data", "pairs.jsonl", "--joint-decay", ".9"], "for --mutual-information"),
        (
            ["dense-model", "--data", "plain.jsonl", *LEARNED, "--mutual-information", "1"],
            "--mutual-information need data with domains",
        ),
        (["dense-model", "--data", "pairs.jsonl", "--pool-experts", "9"], "--pool-experts needs"),
        (["dense-model", "--data", "pairs.jsonl", "--batch-size", "1"], "at least 2 rows; got"),
        (["dense-model", "--data", "row.jsonl", "--loss", "mnr_plus"], "and 1 rows of data"),
        (
            ["dense-model", "--data", "pairs.jsonl", "--matryoshka-dims", "64,16"],
            "at most the model's embedding size, 32; got 64",
        ),
    ],
)
def test_failures_come_before_any_work(arguments, message, moe_fast_cli, workspace):
    write_jsonl(workspace / "plain.jsonl", [{"a": "w1", "b": "w2"}] * 4)
    write_jsonl(workspace / "row.jsonl", [{"a": "w1", "b": "w2"}])
    write_jsonl(workspace / "one.jsonl", [{"a": "w1", "b": "w2", "domain": "law"}] * 4)
    labels = [{"a": "w1", "b": "w2", "domain": d, "label": i} for i, d in enumerate(DOMAINS)]
    write_jsonl(workspace / "labels.jsonl", labels)
    result = moe_fast_cli("train", *arguments, "-o", "out", "--quiet")
    assert result.exit_code == 1, result.output
    assert message in result.stderr
    assert not (workspace / "out").exists()


def test_a_run_that_diverges_is_a_failure(moe_fast_cli, workspace):
    few = ["--data", "pairs.jsonl", "--max-steps", 3, "--batch-size", 4, "--device", "cpu"]
    rate = ["--learning-rate", 1e38, "--warmup", 0, "--save-steps", 0]
    result = moe_fast_cli("train", "dense-model", *few, *rate, "-o", "out", "--quiet")
    assert result.exit_code == 1, result.output
    assert "training has diverged" in result.stderr and "--learning-rate" in result.stderr
    assert not (workspace / "out" / "model.safetensors").exists()


def test_one_domain_where_it_is_meant(train, workspace):
    write_jsonl(
        workspace / "one.jsonl", [{"a": f"w{i}", "b": "w2", "domain": "law"} for i in range(8)]
    )
    train("mixture", "--allow-one-domain", data="one.jsonl")
