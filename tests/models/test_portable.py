"""Folders that load where moe_fast is not installed: the same vectors by the code in them."""

import builtins
import dis
import importlib.util
import json
import os
import re
import subprocess
import symtable
import sys
import types
import venv
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM, BertModel

import moe_fast
from moe_fast.architectures import ARCHITECTURES
from moe_fast.models import portable
from moe_fast.models.source_bundle import SourceBundle
from tests.models.tiny import (
    CLS,
    ENCODERS,
    build,
    build_head,
    relative_error,
    same_weights,
    save_sentence_transformer,
)

PAGE = Path(__file__).parents[2] / "docs" / "portable.md"
DOMAINS = {"routing": "enforced", "domains": ["a", "b", "c"], "cls_token_id": CLS}
LEARNED = {"num_experts_per_tok": 2}
# What every program in the environment without moe_fast begins with.
NOT_INSTALLED = """
import importlib.metadata
import importlib.util

assert importlib.util.find_spec("moe_fast") is None
assert "moe-fast" not in {d.metadata["Name"] for d in importlib.metadata.distributions()}
"""


def mixture(name="bert", **settings):
    """A mixture of three experts that differ."""
    moe = moe_fast.upcycle(build(name), **{"num_experts": 3, **settings})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return moe


def loaded_by_its_code(folder, moe):
    """The model that the folder's file makes, in this process, where moe_fast would go first."""
    name = f"portable_{moe.config.model_type}"
    spec = importlib.util.spec_from_file_location(name, folder / portable.code_file(moe.config))
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = getattr(module, type(moe).__name__).from_pretrained(folder)
    assert type(made).__module__ == name and same_weights(made, moe)
    return made


@pytest.fixture(scope="module")
def without_moe_fast(tmp_path_factory):
    """Runs a program in a fresh environment that has all of this one's packages but moe_fast."""
    environment = tmp_path_factory.mktemp("environment")
    venv.create(environment, symlinks=True)
    (site_packages,) = environment.glob("lib/python*/site-packages")
    for entry in [
        e for path in sys.path if path.endswith("-packages") for e in Path(path).iterdir()
    ]:
        ours = re.match(r"(__editable__)?[._]*moe_fast", entry.name) or entry.name == "__pycache__"
        if not ours and not (site_packages / entry.name).exists():
            (site_packages / entry.name).symlink_to(entry.resolve())
    python = environment / "bin" / "python"

    def run(code, folder):
        variables = {**os.environ, "HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
        result = subprocess.run(
            [python, "-I", "-c", NOT_INSTALLED + code],
            cwd=folder,
            env=variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run


def compare(got, want, mask):
    real = mask.bool()
    states = zip(
        (got.last_hidden_state, *got.hidden_states),
        (want.last_hidden_state, *want.hidden_states),
        strict=True,
    )
    for g, w in states:
        assert relative_error(g[real], w[real]) <= 1e-5
    if want.get("pooler_output") is not None:
        assert relative_error(got.pooler_output, want.pooler_output) <= 1e-5


# --- the file computes what moe_fast does --------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "how"), [(LEARNED, {}), (DOMAINS, {"domain_ids": torch.tensor([2, 0, 1])})]
)
@pytest.mark.parametrize("name", ENCODERS)
def test_every_encoder(name, settings, how, batch, tmp_path):
    moe = mixture(name, **settings)
    moe.save_pretrained(tmp_path, portable=True)
    other = loaded_by_its_code(tmp_path, moe)
    with torch.no_grad():
        got, want = (m(**batch, **how, output_hidden_states=True) for m in (other, moe))
    compare(got, want, batch["attention_mask"])


@pytest.mark.parametrize(
    "settings",
    [
        {"layers": [1]},
        {"num_experts_per_tok": 2, "weight_mode": "probability"},
        {"routing": "sentence_topk", "num_experts_per_tok": 2},
        {"routing": "sentence_switch"},
        {"routing": "dense"},
        {"target": "intermediate", **LEARNED},
        {"target": "output", **LEARNED},
        {"domains": ["x", "y"], "cls_token_id": CLS, "default_domain": "y"},
    ],
    ids=str,
)
def test_every_routing_and_target_with_its_gradients(settings, batch, tmp_path):
    moe = mixture(**settings)
    moe.config.output_router_logits = True
    moe.save_pretrained(tmp_path, portable=True)
    other = loaded_by_its_code(tmp_path, moe)
    real = batch["attention_mask"].bool()
    direction = torch.randn(3, 9, 32, generator=torch.Generator().manual_seed(2))
    outputs = []
    for model in (other, moe):
        output = model(**batch, output_hidden_states=True)
        (output.last_hidden_state * direction)[real].sum().backward()
        outputs.append(output)
    compare(*outputs, batch["attention_mask"])
    for name in ("router_logits", "tokens_per_expert"):
        for g, w in zip(outputs[0][name], outputs[1][name], strict=True):
            assert torch.allclose(g, w, atol=1e-5)
    for (name, g), w in zip(other.named_parameters(), moe.parameters(), strict=True):
        assert (g.grad is None) == (w.grad is None), name
        if g.grad is not None:
            assert torch.allclose(g.grad, w.grad, atol=1e-4), name


@pytest.mark.parametrize(
    "how",
    [
        {"domain": "b"},
        {"expert_ids": torch.tensor([2, 0, 1])},
        {"expert_ids": torch.randint(3, (3, 9), generator=torch.Generator().manual_seed(3))},
    ],
)
def test_every_way_to_enforce(how, batch, tmp_path):
    moe = mixture(**DOMAINS)
    moe.config.fused_output = True
    moe.save_pretrained(tmp_path, portable=True)
    other = loaded_by_its_code(tmp_path, moe)
    with torch.no_grad():
        got, want = (m(**batch, **how, output_hidden_states=True) for m in (other, moe))
        parts = other(**batch, **how, return_dict=False)
        with torch.autocast("cpu", torch.bfloat16):
            assert other(**batch, **how).last_hidden_state.isfinite().all()
    compare(got, want, batch["attention_mask"])
    assert isinstance(parts, tuple) and torch.equal(parts[0], got.last_hidden_state)


def test_wrong_calls_are_refused_as_by_moe_fast(batch, tmp_path):
    moe = mixture(**DOMAINS)
    moe.save_pretrained(tmp_path, portable=True)
    other = loaded_by_its_code(tmp_path, moe)
    for how, message in (
        ({}, "needs expert_ids or a domain"),
        ({"domain": "x"}, r"domain must be one of.*'x'"),
        ({"expert_ids": torch.tensor([0, 1])}, "shape"),
        ({"expert_ids": torch.tensor([0, 1, 3])}, "expert_ids must lie in"),
        ({"domain": "a", "domain_ids": torch.tensor([0, 1, 2])}, "not both"),
    ):
        for model in (other, moe):
            with pytest.raises(ValueError, match=message):
                model(**batch, **how)
    with pytest.raises(ValueError, match="packed batches need moe_fast"):
        other(**batch, domain="a", cu_seq_lens_q=torch.tensor([0, 27]))
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        other(domain="a")


def globals_of(code):
    """The global names that the functions within a code object read."""
    names = {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
    inner = (globals_of(c) for c in code.co_consts if isinstance(c, types.CodeType))
    return names.union(*inner)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_the_file_stands_alone(architecture):
    text = portable.portable_code(architecture)
    assert text == portable.portable_code(architecture), "the same in every save"
    imported = set(re.findall(r"^ *(?:import|from) (\w+)", text, re.MULTILINE))
    assert imported - set(sys.stdlib_module_names) == {"torch", "transformers"}
    known = {*symtable.symtable(text, "file", "exec").get_identifiers(), *vars(builtins)}
    assert globals_of(compile(text, "file", "exec")) - known <= {"__name__"}


def test_two_definitions_of_one_name_are_an_error():
    bundle = SourceBundle(stand_in="moe_fast.models.portable_template")
    bundle.add("moe_fast.ops.plan", "_prepare")
    with pytest.raises(RuntimeError, match="_prepare is defined in moe_fast.ops.route and in"):
        bundle.add("moe_fast.ops.route", "_prepare")


# --- where moe_fast is not installed -------------------------------------------------------------


@pytest.mark.slow  # another process loads the libraries
def test_transformers_alone(batch, tmp_path, without_moe_fast):
    wanted = {}
    for name, settings, how in (
        ("bert", DOMAINS, {"domain_ids": torch.tensor([2, 0, 1])}),
        ("xlm_roberta", LEARNED, {}),
    ):
        moe = mixture(name, **settings)
        moe.save_pretrained(tmp_path / name, portable=True)
        with torch.no_grad():
            wanted[name] = moe(**batch, **how).last_hidden_state
        torch.save({**batch, **how}, tmp_path / f"{name}.inputs")
    code = """
import sys

import torch
from transformers import AutoModel

for name in ("bert", "xlm_roberta"):
    try:
        AutoModel.from_pretrained(name)
    except ValueError as error:
        print(error)
    model = AutoModel.from_pretrained(name, trust_remote_code=True)
    with torch.no_grad():
        output = model(**torch.load(f"{name}.inputs"))
    torch.save(output.last_hidden_state, f"{name}.output")
    model.save_pretrained(f"{name}-again")
    AutoModel.from_pretrained(f"{name}-again", trust_remote_code=True)
assert not any(module.partition(".")[0] == "moe_fast" for module in sys.modules)
"""
    said = without_moe_fast(code, tmp_path)
    assert said.count("trust_remote_code=True") >= 2, "transformers' own error"
    real = batch["attention_mask"].bool()
    for name, want in wanted.items():
        got = torch.load(tmp_path / f"{name}.output")
        assert relative_error(got[real], want[real]) <= 1e-5


@pytest.mark.slow  # another process loads the libraries
def test_the_pages_example(tmp_path, monkeypatch, without_moe_fast):
    pytest.importorskip("sentence_transformers", reason="needs the extra moe-fast[train]")
    here, there = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    base = save_sentence_transformer(tmp_path)
    monkeypatch.chdir(tmp_path)
    here = here.replace("sentence-transformers/all-MiniLM-L6-v2", base)
    names = {}
    exec(compile(here, str(PAGE), "exec"), names)
    model = names["model"]
    with torch.no_grad():
        for mlp in model.transformers_model.moe_mlps().values():
            mlp.up_proj[1] *= -1.0  # experts that differ
    model.save_pretrained("law-and-medicine")
    assert (tmp_path / "law-and-medicine" / "modeling_moe_bert.py").exists(), "stays portable"
    texts = ["w1 w2 w3", "w4 w5 w6 w7 w8", "w9"]
    there = re.sub(r"\[\".*?\"\]", repr(texts), there)
    code = f"""{there}
import json
other = model.encode({texts!r}, domain="medicine")
json.dump([vectors.tolist(), other.tolist()], open("vectors.json", "w"))
try:
    SentenceTransformer("law-and-medicine")
except ValueError as error:
    print(error)
"""
    assert "trust_remote_code=True" in without_moe_fast(code, tmp_path)
    got = json.loads((tmp_path / "vectors.json").read_text())
    for domain, vectors in zip(("law", "medicine"), got, strict=True):
        want = torch.from_numpy(model.encode(texts, domain=domain))
        assert relative_error(torch.tensor(vectors), want) <= 1e-5
    assert relative_error(torch.tensor(got[0]), torch.tensor(got[1])) > 1e-2


# --- saving and loading with moe_fast ------------------------------------------------------------


def files(folder):
    """Its files of code, and whether its configuration names one."""
    names = sorted(path.name for path in folder.glob("*.py"))
    return names, "auto_map" in json.loads((folder / "config.json").read_text())


def test_moe_fast_loads_its_own_classes_and_keeps_the_code(tmp_path):
    moe = mixture()
    moe.save_pretrained(tmp_path / "plain")
    assert files(tmp_path / "plain") == ([], False)
    moe.save_pretrained(tmp_path / "model", portable=True)
    there = (["modeling_moe_bert.py"], True)
    assert files(tmp_path / "model") == there
    for options in ({}, {"trust_remote_code": False}, {"trust_remote_code": True}):
        found = AutoModel.from_pretrained(tmp_path / "model", **options)
        assert type(found) is moe_fast.models.MoEBertModel and same_weights(found, moe)
    found.save_pretrained(tmp_path / "again")
    assert files(tmp_path / "again") == there
    found.save_pretrained(tmp_path / "again", portable=False)
    assert files(tmp_path / "again") == ([], False), "the file of the earlier save is gone"
    found.save_pretrained(tmp_path / "again")
    assert files(tmp_path / "again") == ([], False)


def test_models_made_of_a_portable_one(tmp_path):
    moe = mixture(**DOMAINS)
    moe.save_pretrained(tmp_path / "model", portable=True)
    moe_fast.extract_expert(moe, 1).save_pretrained(tmp_path / "dense")
    assert files(tmp_path / "dense") == ([], False)
    moe_fast.add_expert(moe, "d").save_pretrained(tmp_path / "grown")
    assert files(tmp_path / "grown") == (["modeling_moe_bert.py"], True)
    dense = build("bert")
    dense.config.auto_map = {"AutoModel": "somebody/model--modeling.Model"}
    moe_fast.upcycle(dense, num_experts=2).save_pretrained(tmp_path / "upcycled")
    assert files(tmp_path / "upcycled") == ([], False), "that was the dense model's code"
    headed = AutoModelForMaskedLM.from_pretrained(tmp_path / "model")
    headed.save_pretrained(tmp_path / "headed")
    assert files(tmp_path / "headed") == ([], False), "the file has no heads"


def test_the_cards_say_what_to_install(tmp_path):
    mixture().save_pretrained(tmp_path / "bare", portable=True)
    card = (tmp_path / "bare" / "README.md").read_text(encoding="utf-8")
    assert "pip install -e . (in a checkout of moe_fast)" in card
    assert "`pip install torch transformers==" in card
    assert "trust_remote_code=True` runs the file `modeling_moe_bert.py`" in card
    mixture().save_pretrained(tmp_path / "plain")
    assert "trust_remote_code" not in (tmp_path / "plain" / "README.md").read_text("utf-8")
    pytest.importorskip("sentence_transformers", reason="needs the extra moe-fast[train]")
    dense = save_sentence_transformer(tmp_path)
    settings = {"routing": "enforced", "domains": ["law", "medicine"]}
    model = moe_fast.upcycle(dense, num_experts=2, **settings)
    for _ in range(2):  # the second card is made from the first
        model.save(str(tmp_path / "whole"), portable=True)
        card = (tmp_path / "whole" / "README.md").read_text(encoding="utf-8")
        assert card.count("`pip install sentence-transformers==") == 1
        assert "pip install -e '.[train]'" in card
        assert "trust_remote_code=True)\nvectors = model.encode([\"a text\"], domain='law')" in card
        model = moe_fast.MoESentenceTransformer(str(tmp_path / "whole"), device="cpu")


class Foreign(BertModel):
    """An encoder of somebody else."""


def foreign(model, **inputs):
    """A forward of somebody else."""


def test_what_cannot_be_portable_is_named_before_anything_is_written(tmp_path, monkeypatch):
    moe = mixture()
    config = type(moe.config)
    own = config.architecture
    for changes, message in (
        ({"dense_model": Foreign}, "transformers' encoders alone; got tests.models.test_portable"),
        ({"forward": foreign}, "moe_fast's own forwards alone; got tests.models.test_portable"),
    ):
        parts = {name: getattr(own, name) for name in own.__dataclass_fields__}
        monkeypatch.setattr(config, "architecture", type(own)(**{**parts, **changes}))
        with pytest.raises(ValueError, match=f"portable must be False: .*{message}"):
            moe.save_pretrained(tmp_path / "model", portable=True)
    monkeypatch.setattr(config, "architecture", own)
    headed = moe_fast.upcycle(build_head("bert", "ForMaskedLM"), num_experts=2)
    with pytest.raises(ValueError, match="without a head; got MoEBertForMaskedLM"):
        headed.save_pretrained(tmp_path / "model", portable=True)
    monkeypatch.setattr(portable.compat, "saves_adapter_alone", lambda model: True)
    with pytest.raises(ValueError, match="saved as an adapter alone"):
        moe.save_pretrained(tmp_path / "model", portable=True)
    assert not (tmp_path / "model").exists() and not hasattr(moe.config, "auto_map")
