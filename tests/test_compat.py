"""Names that other libraries do not promise: one module has them all, and what if they go."""

import ast
import inspect
import subprocess
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import moe_fast
from moe_fast import compat
from moe_fast.encoding.cross_encoder import MoECrossEncoder
from moe_fast.encoding.sentence_transformer import MoESentenceTransformer
from moe_fast.encoding.sparse_encoder import MoESparseEncoder
from moe_fast.encoding.three_head_encoder import MoEThreeHeadEncoder, ThreeHeadEncoder
from moe_fast.layers import MoERouter
from moe_fast.layers.attention import packed_attention
from moe_fast.models import heads, modeling
from moe_fast.ops.eager_dispatch import nobody_looks
from moe_fast.training.collator import DomainDataCollator
from moe_fast.training.trainer import MoESentenceTransformerTrainer
from tests.models.tiny import build

PACKAGE = Path(moe_fast.__file__).parent
OVERRIDING = [
    modeling.MoEBertModel,
    modeling.MoERobertaModel,
    modeling.MoEXLMRobertaModel,
    modeling.MoEModernBertModel,
    heads.MoEBertForMaskedLM,
    heads.MoEModernBertForSequenceClassification,
    MoESentenceTransformer,
    MoESparseEncoder,
    MoECrossEncoder,
    ThreeHeadEncoder,
    MoEThreeHeadEncoder,
    MoESentenceTransformerTrainer,
    DomainDataCollator,
]


@pytest.fixture(autouse=True)
def _warn_again():
    compat._warn_gone.cache_clear()
    yield
    compat._warn_gone.cache_clear()


# --- no other module -----------------------------------------------------------------------------

UNDOCUMENTED = (
    "transformers.initialization",
    "transformers.integrations",
    "transformers.masking_utils",
    "transformers.utils.output_capturing",
)
# Public, whatever their names look like: the documentation of Python, and of Ray, has them.
DOCUMENTED = {"_fields", "_replace", "_exit", "_temp_dir"}


def _is_private(name):
    return name.startswith("_") and not name.endswith("__") and name not in DOCUMENTED


def _names_of_our_own(trees):
    """Private functions, classes, fields and attributes that moe_fast itself defines."""
    names = set()
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names.add(node.attr)
            elif isinstance(node, (ast.AnnAssign, ast.Assign)):
                targets = [node.target] if isinstance(node, ast.AnnAssign) else node.targets
                names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def _private_uses(tree, own, overridden):
    """(line, what) for each private name of another library that a module touches."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr):
            inherited = ast.unparse(node.value) in ("self", "super()") and node.attr in overridden
            if node.attr not in own and not inherited:
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.ImportFrom) and node.module:
            path = [*node.module.split("."), *(alias.name for alias in node.names)]
            foreign = path[0] not in ("moe_fast", "__future__")
            names = {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
            if foreign and (any(map(_is_private, path)) or any(map(_is_undocumented, names))):
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if any(map(_is_private, alias.name.split("."))) or _is_undocumented(alias.name):
                    yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Call):
            for keyword in node.keywords:
                if keyword.arg and _is_private(keyword.arg):
                    yield node.lineno, f"{ast.unparse(node.func)}({keyword.arg}=)"
            looked_up = ast.unparse(node.func) in ("getattr", "setattr", "hasattr", "delattr")
            name = node.args[1] if looked_up and len(node.args) > 1 else None
            if isinstance(name, ast.Constant) and _is_private(str(name.value)):
                yield node.lineno, ast.unparse(node)


def _is_undocumented(name):
    return any(name == module or name.startswith(f"{module}.") for module in UNDOCUMENTED)


def _marked(tree):
    """The methods that carry ``compat.overrides``."""
    return {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        and any(ast.unparse(d) == "compat.overrides" for d in node.decorator_list)
    }


def test_no_other_module_touches_a_private_name_of_another_library():
    paths = [p for p in sorted(PACKAGE.rglob("*.py")) if p.name != "compat.py"]
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in paths}
    marked = {path: _marked(tree) for path, tree in trees.items()}
    own = _names_of_our_own(trees.values()) - set().union(*marked.values())
    found = [
        f"{path.relative_to(PACKAGE)}:{line}: {what}"
        for path, tree in trees.items()
        for line, what in _private_uses(tree, own, marked[path])
    ]
    assert not found, "put these into moe_fast/compat.py, or mark them with compat.overrides"


@pytest.mark.parametrize(
    "source",
    [
        "x._hf_flag",
        "getattr(x, '_hf_flag', None)",
        "f(_hf_flag=1)",
        "from torch._C import f",
        "from torch import _dynamo",
        "import torch._dynamo",
        "from transformers import initialization as init",
        "from transformers.integrations import moe",
        "super()._save(x)",
    ],
)
def test_the_search_finds_each_way_to_a_private_name(source):
    assert list(_private_uses(ast.parse(source), own=set(), overridden=set()))


# --- overridden methods --------------------------------------------------------------------------


@pytest.mark.parametrize("cls", OVERRIDING)
def test_every_overridden_method_is_still_there(cls):
    assert compat.lost_overrides(cls) == []


@pytest.mark.parametrize("cls", OVERRIDING)
def test_every_private_method_that_is_overridden_is_marked(cls):
    for owner in cls.__mro__:
        if compat._foreign(owner):
            continue
        later = [c for c in cls.__mro__[cls.__mro__.index(owner) + 1 :] if compat._foreign(c)]
        for name, method in vars(owner).items():
            known = any(name in vars(c) for c in later)
            if inspect.isfunction(method) and _is_private(name) and known:
                assert getattr(method, "__overrides__", False), f"{owner.__name__}.{name}"


def _library(**methods):
    return type("Base", (), {"__module__": "library", **methods})


def _ours(base):
    class Ours(base):
        @compat.overrides
        def _save(self, folder, state=None):
            pass

    Ours.__module__ = "moe_fast.somewhere"
    return Ours


@pytest.mark.parametrize(
    ("base", "lost"),
    [
        (_library(_save=lambda self, folder, state: None), []),
        (_library(_save=lambda self, **kwargs: None), []),
        (_library(), ["_save"]),
        (_library(_save=lambda self, folder: None), ["_save(state)"]),
    ],
)
def test_a_method_or_a_parameter_that_is_lost_is_an_error_when_used(base, lost):
    assert compat.lost_overrides(_ours(base)) == lost
    if not lost:
        compat.check_overrides(_ours(base))
        return
    with pytest.raises(RuntimeError, match=r"Ours overrides \['_save.*no longer have"):
        compat.check_overrides(_ours(base))


@pytest.mark.parametrize("cls", [c for c in OVERRIDING if c is not MoESentenceTransformer])
def test_the_classes_look_before_they_are_used(cls, monkeypatch):
    def fail(got):
        assert got is cls
        raise RuntimeError("looked")

    monkeypatch.setattr(compat, "check_overrides", fail)
    with pytest.raises(RuntimeError, match="looked"):
        if issubclass(cls, transformers.PreTrainedModel):
            cls(cls.config_class(num_hidden_layers=1, hidden_size=32, num_attention_heads=4))
        elif cls is DomainDataCollator:
            cls(preprocess_fn=len)
        else:
            cls()


# --- names that are gone -------------------------------------------------------------------------

WITHOUT = """
import importlib, sys, warnings
import torch, transformers
import transformers.integrations.moe, transformers.utils.output_capturing
from tests.models.tiny import build
dense = build("bert")
x = torch.arange(5, 17).view(2, 6)
want = dense(x).last_hidden_state
for module, *names in {gone!r}:
    owner = importlib.import_module(module)
    for name in names[:-1]:
        owner = getattr(owner, name)
    if names:
        delattr(owner, names[-1])
    else:
        sys.modules[module] = None
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    import moe_fast
    {code}
"""
GONE = [
    ("torch._C._functorch", "peek_interpreter_stack"),
    ("torch.utils._python_dispatch", "is_in_torch_dispatch_mode"),
    ("torch.autograd.forward_ad", "_current_level"),
    ("transformers.utils.output_capturing", "OutputRecorder"),
    ("transformers.integrations.moe", "ExpertsInterface"),
    ("transformers.integrations.moe", "_default_apply_gate"),
    ("transformers.integrations.sdpa_attention", "sdpa_attention_forward"),
    ("transformers.masking_utils", "flash_attention_mask"),
    ("transformers", "BertModel", "_no_split_modules"),
]


def _run_without(gone, code):
    script = WITHOUT.format(gone=gone, code=code.replace("\n", "\n    "))
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)


@pytest.mark.parametrize("path", [*GONE, ("transformers.initialization",)])
def test_every_name_of_an_import_is_there(path):
    assert compat._found(*path) is not None


def test_nobody_looks_in_plain_eager_mode_alone(recwarn):
    assert nobody_looks()
    with torch.autograd.forward_ad.dual_level():
        assert not nobody_looks()
    seen = []
    torch.func.vmap(lambda x: seen.append(nobody_looks()) or x)(torch.ones(2))
    with FlopCounterMode(display=False):
        seen.append(nobody_looks())
    assert seen == [False, False] and not recwarn.list


def test_without_any_name_of_an_import_models_still_run():
    """Ops take the dispatcher's way, with one warning; recorded routing is refused by name."""
    result = _run_without(
        GONE,
        """
moe = moe_fast.upcycle(dense, num_experts=2)
assert torch.allclose(moe(x).last_hidden_state, want, atol=1e-6)
said = [w for w in warned if "through the dispatcher" in str(w.message)]
assert len(said) == 1, warned
try:
    moe(x, output_router_logits=True)
except RuntimeError as error:
    print(error)
""",
    )
    assert result.returncode == 0, result.stderr
    assert "OutputRecorder" in result.stdout and "tokens_per_expert" in result.stdout


def test_without_transformers_initialization_no_weight_is_overwritten():
    code = """
moe = moe_fast.upcycle(dense, num_experts=2)
print("imported", moe(x).last_hidden_state.shape)
type(moe)(moe.config)
"""
    result = _run_without([("transformers.initialization",)], code)
    assert "imported" in result.stdout and result.returncode == 1
    assert "RuntimeError: transformers" in result.stderr
    assert "no longer has initialization" in result.stderr


def test_backward_is_not_known_without_torchs_question(monkeypatch):
    assert not compat.in_backward()
    monkeypatch.delattr(torch._C, "_current_graph_task_id")
    with pytest.warns(RuntimeWarning, match="counted twice"):
        assert not compat.in_backward()


def test_backward_is_known(monkeypatch):
    seen = []
    x = torch.ones(1, requires_grad=True)
    y = x * 2
    y.register_hook(lambda grad: seen.append(compat.in_backward()))
    y.backward()
    assert seen == [True] and not compat.in_backward()


def test_hooks_are_refused_without_their_dict():
    def hook(*_):
        pass

    module = nn.Linear(1, 1)
    assert not compat.has_forward_hook(module, hook)
    module.register_forward_hook(hook)
    assert compat.has_forward_hook(module, hook)
    with pytest.raises(RuntimeError, match="_forward_hooks.*routing cannot be recorded"):
        compat.has_forward_hook(types.SimpleNamespace(), hook)


def test_a_module_counts_as_not_compiled_where_it_cannot_be_known():
    module = nn.Linear(1, 1)
    assert not compat.is_compiled(module)
    module.compile()
    assert compat.is_compiled(module)
    assert not compat.is_compiled(types.SimpleNamespace())


def test_the_form_of_checkpointing_must_be_known_where_it_matters():
    layer = build("bert").encoder.layer[0].train()
    assert not compat.checkpoints_reentrantly(layer)
    layer.gradient_checkpointing = True
    with pytest.raises(RuntimeError, match="_gradient_checkpointing_func.*no gradient"):
        compat.checkpoints_reentrantly(layer)


def test_the_attention_of_a_configuration():
    config = build("bert").config
    assert compat.attention_of(config) == "sdpa"
    assert compat.attention_of(types.SimpleNamespace(attn_implementation="eager")) == "eager"
    with pytest.raises(RuntimeError, match="_attn_implementation.*not known"):
        compat.attention_of(types.SimpleNamespace())


def test_attention_is_not_chosen_where_transformers_would_not_ask(monkeypatch):
    config = moe_fast.upcycle(build("bert"), num_experts=2).config
    with packed_attention():
        assert compat.attention_of(config) == "moe_fast"
    monkeypatch.delattr(transformers.PreTrainedConfig, "_attn_implementation")
    with pytest.warns(RuntimeWarning, match="computes padding"), packed_attention():
        pass


def test_recorders_and_lists_of_modules_are_the_bases_and_ours():
    base = type("Base", (), {})
    assert set(compat.recorded_outputs(base, router_logits=(MoERouter, 0))) == {"router_logits"}
    assert compat.unsplit_modules(base, "MoEBertLayer") == ["MoEBertLayer"]
    ours = compat.recorded_outputs(transformers.BertModel, router_logits=(MoERouter, 0))
    assert set(ours) == {*transformers.BertModel._can_record_outputs, "router_logits"}


def test_gates_of_experts():
    usual = pytest.importorskip("transformers.integrations.moe")._default_apply_gate
    experts = type("Experts", (), {"_apply_gate": usual})()
    assert compat.has_usual_gate(experts) and compat.gate_of(experts)
    own = type("Experts", (), {"_apply_gate": lambda self, x: x + 1})()
    assert not compat.has_usual_gate(own) and compat.gate_of(own)(1) == 2
    with pytest.raises(RuntimeError, match="_apply_gate.*gate cannot be computed"):
        compat.gate_of(types.SimpleNamespace())


@pytest.mark.parametrize("private", [True, False])
def test_a_file_of_a_folder_or_none(tmp_path, monkeypatch, private):
    (tmp_path / "config.json").write_text("{}")
    if not private:
        monkeypatch.setattr(compat, "_takes", lambda function, name: False)
    assert compat.file_of(tmp_path, "config.json") == str(tmp_path / "config.json")
    assert compat.file_of(tmp_path, "modules.json") is None


def test_rotation_of_checkpoints_says_when_it_is_gone(monkeypatch, tmp_path):
    compat.rotate_checkpoints(str(tmp_path), None)
    monkeypatch.delattr("transformers.trainer_utils.rotate_checkpoints")
    with pytest.raises(RuntimeError, match="rotate_checkpoints.*older checkpoints stay"):
        compat.rotate_checkpoints(str(tmp_path), None)


def test_sums_of_a_loss_are_restored_where_they_are_known():
    names = {"_tr_loss": torch.tensor(0.0), "_total_loss_scalar": 0.0}
    trainer = SimpleNamespace(**names, _globalstep_last_logged=3)
    compat.restore_loss_sums(trainer, [0.5, 2.0, 7.0])
    assert compat.loss_sums(trainer) == [0.5, 2.0, 7.0]
    compat.restore_loss_sums(trainer, [])
    assert compat.loss_sums(trainer) == [0.5, 2.0, 7.0]
    other = SimpleNamespace(**names)
    assert compat.loss_sums(other) == []
    compat.restore_loss_sums(other, [0.5, 2.0, 7.0])
    assert vars(other) == names


def test_modules_of_a_pipeline():
    layer = nn.ReLU()
    pipeline = nn.Sequential(layer, layer)
    assert list(compat.child_modules(pipeline)) == ["0", "1"]
    public = types.SimpleNamespace(named_children=lambda: [("0", layer)])
    assert compat.child_modules(public) == {"0": layer}


def test_a_sentence_transformer_that_no_longer_lists_what_it_forwards():
    first = types.SimpleNamespace(_declared_forward_params={"input_ids"})
    compat.forwards_names(first, ["domain"])
    assert first._declared_forward_params == {"input_ids", "domain"}
    with pytest.raises(RuntimeError, match="_declared_forward_params.*told its experts"):
        compat.forwards_names(types.SimpleNamespace(), ["domain"])


def test_whether_a_call_is_plain_is_no_where_it_cannot_be_known():
    plain = types.SimpleNamespace(_can_flatten_inputs=lambda: False)
    assert compat.is_plain_call(plain)
    assert not compat.is_plain_call(types.SimpleNamespace())
    plain._distributed_inference = object()
    assert not compat.is_plain_call(plain)


def test_progress_bars():
    from tqdm import tqdm

    with tqdm(total=1, file=open("/dev/null", "w")) as bar:
        assert bar in compat.running_bars(tqdm)
    assert compat.running_bars(object()) == []


def test_what_an_adapter_is_saved_as_must_be_known():
    model = build("bert")
    assert not compat.saves_adapter_alone(model)
    adapted = types.SimpleNamespace(modules=lambda: [types.SimpleNamespace(get_base_layer=None)])
    with pytest.raises(RuntimeError, match="no longer says whether.*Merge the adapter"):
        compat.saves_adapter_alone(adapted)
    adapted.modules = list
    assert not compat.saves_adapter_alone(adapted)
