"""What a person can get wrong, and the message that says so before any work starts.

Each case goes through the public surface; the modules' own tests look closer.
"""

import errno
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, GPT2Config, GPT2Model

import moe_fast
from tests.models.tiny import build, save_sentence_transformer

IDS = torch.tensor([[4, 7, 9], [4, 8, 6]])
DOMAINS = ["a", "b", "c"]


def _learned(**settings):
    return moe_fast.upcycle(build("bert"), **{"num_experts": 3, **settings})


def _enforced(**settings):
    return _learned(routing="enforced", **settings)


def _with_domains():
    return _enforced(domains=DOMAINS, cls_token_id=4)


def _nan_router():
    model = _learned()
    with torch.no_grad():
        model.moe_mlps()[0].router.weight[0, 0] = torch.nan
    return model


def _mixed_dtypes():
    model = _enforced()
    model.moe_mlps()[1].double()
    return model


def _sentence_transformer(folder: Path):
    """A mixture over three domains, saved and loaded by the stock class, and the mixture itself."""
    st = pytest.importorskip("sentence_transformers", reason="needs the extra moe-fast[train]")
    dense = save_sentence_transformer(folder)
    model = moe_fast.upcycle(dense, num_experts=3, routing="enforced", domains=DOMAINS)
    model.save_pretrained(str(folder / "moe"))
    return st.SentenceTransformer(str(folder / "moe"), device="cpu"), model


def _saved(folder: Path, **changes):
    """A saved mixture whose configuration file was changed."""
    _learned().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return str(folder)


CASES = {
    "more experts per token than experts": (
        lambda _: _learned(num_experts_per_tok=4),
        r"num_experts_per_tok must lie in 1 .. num_experts = 3; got 4",
    ),
    "expert id too large": (
        lambda _: _enforced()(IDS, expert_ids=torch.tensor([0, 3])),
        r"expert_ids must lie in \[0, num_experts\) = \[0, 3\); got 3",
    ),
    "expert id negative": (
        lambda _: _enforced()(IDS, expert_ids=torch.tensor([0, -1])),
        r"expert_ids must lie in \[0, num_experts\) = \[0, 3\); got -1",
    ),
    "expert ids of the wrong length": (
        lambda _: _enforced()(IDS, expert_ids=torch.tensor([0, 1, 2])),
        r"expert_ids must have shape \[2, 3\] .*or \[2\] .*; got \[3\]",
    ),
    "expert ids of the wrong dtype": (
        lambda _: _enforced()(IDS, expert_ids=torch.tensor([0.0, 1.0])),
        r"expert_ids must have dtype int64, int32; got float32",
    ),
    "enforced routing without ids": (
        lambda _: _with_domains()(IDS),
        r"needs expert_ids or a domain \(known: a, b, c\); got neither",
    ),
    "both domain and expert_ids": (
        lambda _: _with_domains()(IDS, domain="a", expert_ids=torch.tensor([0, 1])),
        r"give domain or expert_ids, not both; got domain='a'",
    ),
    "unknown domain": (
        lambda _: _with_domains()(IDS, domain="law"),
        r"one of the model's domains \('a', 'b', 'c'\); got 'law'",
    ),
    "NaN in router logits": (
        lambda _: _nan_router()(IDS),
        r"router logits must not be NaN or infinite; got \[nan, .*\] for token 0",
    ),
    "unsupported architecture": (
        lambda _: moe_fast.upcycle(
            GPT2Model(GPT2Config(n_layer=1, n_embd=8, n_head=2)), num_experts=2
        ),
        r"one of BertModel, RobertaModel, XLMRobertaModel, .*ModernBertModel.*; got GPT2Model",
    ),
    "mixed dtypes": (
        lambda _: _mixed_dtypes()(IDS, expert_ids=torch.tensor([0, 1])),
        r"up_proj must have the dtype of x, torch.float32 .*; got torch.float64",
    ),
    "mixed devices": (
        lambda _: _enforced()(IDS, expert_ids=torch.zeros(2, dtype=torch.long, device="meta")),
        r"expert_ids must be on the device of x, cpu; got meta",
    ),
    "ids longer than the model's positions": (
        lambda _: _learned()(torch.full((1, 41), 7)),
        r"input_ids must hold at most 40 tokens per text .*; got 41",
    ),
    "a stock SentenceTransformer given a list of domains": (
        lambda folder: _sentence_transformer(folder)[0].encode(["w1", "w2"], domain=["a", "b"]),
        r"domain must be one name for the whole batch, a str; got list.*MoESentenceTransformer",
    ),
    "texts longer than the model allows": (
        lambda folder: _sentence_transformer(folder)[1].encode(["w1 " * 40], domain="a"),
        r"max_seq_length = 32 tokens each; text 0 has 42 .* Pass truncate=True",
    ),
    "checkpoint of another architecture": (
        lambda folder: moe_fast.models.MoERobertaModel.from_pretrained(_saved(folder)),
        r"MoERobertaConfig reads checkpoints with model_type 'moe_roberta'; got 'moe_bert'",
    ),
    "checkpoint of a newer version": (
        lambda folder: AutoModel.from_pretrained(_saved(folder, moe_fast_version="7.1.0")),
        r"written by moe_fast 7.1.0, newer than this .*Upgrade moe_fast\.",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_message_names_the_argument_what_was_given_and_what_is_allowed(case, tmp_path):
    do, message = CASES[case]
    with pytest.raises((ValueError, TypeError), match=message):
        do(tmp_path)


# --- files ---------------------------------------------------------------------------------------


def _write(folder: Path, name: str, *rows) -> Path:
    """Rows (objects, or lines as they are) as a file of lines."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines))
    return path


def _pairs(folder: Path, *rows):
    from moe_fast.data import read_pairs

    return read_pairs(_write(folder, "pairs.jsonl", *rows))


def _retrieval(folder: Path, corpus, qrels):
    from moe_fast.data import read_retrieval

    _write(folder, "set/corpus.jsonl", *corpus)
    _write(folder, "set/queries.jsonl", {"_id": "q", "text": "w1"})
    _write(folder, "set/qrels/test.tsv", *qrels)
    return read_retrieval(folder / "set")


def _papers(folder: Path, *rows):
    from moe_fast.data import cocitation_pairs

    return cocitation_pairs(_write(folder, "papers.jsonl", *rows))


def _cut_weights(folder: Path):
    """What a copy that was interrupted leaves."""
    _learned().save_pretrained(folder / "model")
    weights = folder / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return folder / "model"


def _without(folder: Path, name: str):
    _learned().save_pretrained(folder / "model")
    (folder / "model" / name).unlink()
    return folder / "model"


def _broken_config(folder: Path):
    model = _cut_weights(folder)
    (model / "config.json").write_text('{"model_type": "moe_')
    return model


def _load(folder: Path):
    return moe_fast.models.MoEBertModel.from_pretrained(folder)


def _cli(*arguments):
    """The command line; its message and exit code as an exception, for the table below."""
    from typer.testing import CliRunner

    from moe_fast.cli.app import app

    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "300"})
    raise RuntimeError(f"exit code {result.exit_code}: {result.stderr}")


def _existing_output(folder: Path):
    dense = save_sentence_transformer(folder)
    texts = _write(folder, "texts.txt", "w1")
    (folder / "vectors.npy").write_bytes(b"somebody's work")
    try:
        _cli("embed", dense, texts, "-o", folder / "vectors.npy")
    finally:
        assert (folder / "vectors.npy").read_bytes() == b"somebody's work"


def _one_domain(folder: Path):
    _sentence_transformer(folder)
    rows = [{"a": "w1", "b": "w2", "domain": "a"}] * 4
    data = _write(folder, "pairs.jsonl", *rows)
    _cli("train", folder / "moe", "--data", data, "-o", folder / "out")


def _settings(folder: Path, text: str):
    settings = folder / "settings.yaml"
    settings.write_text(text)
    _cli("train", "model", "--data", "x", "-o", folder / "out", "--config", settings)


PAIR = {"a": "w1", "b": "w2"}
FILE_CASES = {
    "a missing column": (
        lambda f: _pairs(f, {"a": "w1", "c": "w2"}),
        r"pairs.jsonl, line 1: column 'b' is missing; columns present: \['a', 'c'\]",
    ),
    "a broken line": (
        lambda f: _pairs(f, PAIR, '{"a": "w1", "b'),
        r"pairs.jsonl, line 2: not valid JSON",
    ),
    "an empty text": (
        lambda f: _pairs(f, PAIR, PAIR, {"a": "w1", "b": "  "}),
        r"pairs.jsonl, line 3: b is empty",
    ),
    "an empty text to embed": (
        lambda f: _cli("embed", "model", _write(f, "t.txt", "w1", "", "w2"), "-o", f / "v.npy"),
        r"exit code 1: .*t.txt, line 2: text is empty",
    ),
    "one domain only": (
        _one_domain,
        r"exit code 1: .*one domain only, 'a'; the model has 3 \(a, b, c\)",
    ),
    "duplicate ids of documents": (
        lambda f: _retrieval(f, [{"_id": "d", "text": "w1"}] * 2, ["q\td\t1"]),
        r"corpus.jsonl, line 2: .*'d'.*line 1",
    ),
    "duplicate ids of papers": (
        lambda f: _papers(f, *[{"id": "p", "abstract": "w1", "citing": [], "cited_by": []}] * 2),
        r"papers.jsonl, line 2: .*'p'.*line 1",
    ),
    "qrels that name unknown documents": (
        lambda f: _retrieval(f, [{"_id": "d", "text": "w1"}], ["q\td\t1", "q\tx\t1"]),
        r"test.tsv.*'x'",
    ),
    "a label that is not 0 or 1": (
        lambda f: _pairs(f, {**PAIR, "label": 1}, {**PAIR, "label": 2}),
        r"pairs.jsonl, line 2: label=2; allowed are 0 and 1",
    ),
    "weights that are cut off": (lambda f: _load(_cut_weights(f)), r"model.safetensors"),
    "a checkpoint without weights": (
        lambda f: _load(_without(f, "model.safetensors")),
        r"model.safetensors",
    ),
    "a checkpoint without configuration": (
        lambda f: _load(_without(f, "config.json")),
        r"config.json",
    ),
    "a configuration that is cut off": (lambda f: _load(_broken_config(f)), r"config.json"),
    "an output that exists": (
        _existing_output,
        r"exit code 1: .*vectors.npy exists already and is kept.*--overwrite",
    ),
    "an unknown YAML key": (
        lambda f: _settings(f, "learning_rat: 0.1"),
        r"exit code 2: .*unknown key 'learning_rat'; the nearest known are learning-rate",
    ),
    "a YAML value of the wrong type": (
        lambda f: _settings(f, "batch-size: many"),
        r"exit code 2: .*batch-size must be a whole number; got 'many' \(str\)",
    ),
}


@pytest.mark.parametrize("case", FILE_CASES)
def test_the_message_names_the_file_and_what_is_wrong(case, tmp_path):
    pytest.importorskip("datasets", reason="needs the extra moe-fast[train]")
    do, message = FILE_CASES[case]
    with pytest.raises((ValueError, OSError, RuntimeError), match=f"(?s){message}"):
        do(tmp_path)


def test_a_full_disk_while_saving_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    import safetensors.torch
    from transformers import modeling_utils

    old = _learned()
    old.save_pretrained(tmp_path / "model")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    monkeypatch.setattr(modeling_utils, "safe_save_file", full)
    with pytest.raises(OSError, match="No space left on device"):
        _learned(seed=1).save_pretrained(tmp_path / "model")
    _assert_equal(_load(tmp_path / "model"), old)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]  # nothing half-written


def _assert_equal(model, other):
    weights = other.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_an_empty_batch_works():
    empty = torch.zeros(0, 3, dtype=torch.long)
    assert _learned()(empty).last_hidden_state.shape == (0, 3, 32)
    ids = torch.zeros(0, dtype=torch.long)
    assert _enforced()(empty, expert_ids=ids).last_hidden_state.shape == (0, 3, 32)
