"""What moe_fast uses of other libraries beyond their public interfaces, in one place.

Every private or undocumented name that moe_fast uses is looked up here, because it may change or
disappear with any release of its library. Each function says what the name is for, and what happens
without it: a fallback, or an error when the feature is used. ``import moe_fast`` always works.

A method of ours that overrides one of another library's class is marked by :func:`overrides`.
:func:`check_overrides` finds marked methods that the library would no longer call.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

Method = Callable[..., Any]


def _found(module: str, *names: str) -> Any:
    """Return a module of another library, or an object in it; ``None`` if it does not exist."""
    try:
        found: Any = importlib.import_module(module)
        for name in names:
            found = getattr(found, name)
    except (ImportError, AttributeError):
        return None
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gone(package: str, name: str, consequence: str) -> RuntimeError:
    return RuntimeError(
        f"{package} {_version(package)} no longer has {name}, without which {consequence}. Install "
        f"an earlier {package}, or a later moe_fast."
    )


def _function(module: str, name: str, consequence: str) -> Method:
    """Return a function of transformers, or one that raises an error when it is called."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise _gone("transformers", name, consequence)

    return _found(module, name) or refuse


@functools.cache  # once for each
def _warn_gone(package: str, name: str, consequence: str) -> None:
    warnings.warn(
        f"{package} {_version(package)} no longer has {name}: {consequence}.",
        RuntimeWarning,
        stacklevel=3,
    )


# --- methods of other libraries that ours override -----------------------------------------------


def overrides(method: Method) -> Method:
    """Mark a method that has an effect only if a base class of another library calls it."""
    method.__overrides__ = True  # type: ignore[attr-defined]
    return method


def lost_overrides(cls: type) -> list[str]:
    """Return the marked methods of ``cls`` that the other library's classes no longer call.

    A method counts as lost if no such base class has it, or if it names a parameter that theirs
    does not take (by name or by ``**kwargs``); the result then names the parameter, too.
    """
    lost = []
    for owner in cls.__mro__:
        for name, method in vars(owner).items():
            function = getattr(method, "__func__", method)
            if not getattr(function, "__overrides__", False):
                continue
            later = cls.__mro__[cls.__mro__.index(owner) + 1 :]
            theirs = next((vars(c)[name] for c in later if name in vars(c) and _foreign(c)), None)
            if theirs is None:
                lost.append(name)
            else:
                names = _lost_parameters(function, getattr(theirs, "__func__", theirs))
                lost += [f"{name}({parameter})" for parameter in names]
    return lost


def _foreign(cls: type) -> bool:
    return cls.__module__.partition(".")[0] != "moe_fast"


def _lost_parameters(ours: Method, theirs: Method) -> list[str]:
    known = inspect.signature(theirs).parameters
    kinds = {p.kind for p in known.values()}
    if inspect.Parameter.VAR_KEYWORD in kinds:
        return []
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
    return [
        p.name
        for p in inspect.signature(ours).parameters.values()
        if p.kind in named and p.name not in known
    ]


def check_overrides(cls: type) -> None:
    """Raise ``RuntimeError`` for a class with marked methods that its library no longer calls."""
    lost = lost_overrides(cls)
    if lost:
        libraries = sorted({c.__module__.partition(".")[0] for c in cls.__mro__[1:] if _foreign(c)})
        installed = {name: _version(name) for name in libraries if _version(name)}
        raise RuntimeError(
            f"{cls.__name__} overrides {lost}, which its base classes no longer have like that in "
            f"{installed}: what it is for would not happen. Install earlier versions, or a later "
            "moe_fast."
        )


# --- torch ---------------------------------------------------------------------------------------


def observers_of_ops() -> tuple[Callable[[], bool], Callable[[], Any], Callable[[], int]]:
    """Return three functions that tell whether something observes ops.

    Only if nothing does, eager calls bypass the dispatcher (:mod:`moe_fast.ops.eager_dispatch`).
    Without the private names the first function always returns True: ops then go through the
    dispatcher, which is right but slower; a warning says so.

    Returns:
        Whether a dispatch mode is active; ``torch.func``'s interpreter, or ``None``; the level of
        forward-mode autograd, or -1.
    """
    interpreter = _found("torch._C._functorch", "peek_interpreter_stack")
    dispatching = _found("torch.utils._python_dispatch", "is_in_torch_dispatch_mode")
    level = _found("torch.autograd.forward_ad", "_current_level")
    if None not in (interpreter, dispatching, level):
        forward_ad = torch.autograd.forward_ad
        return dispatching, interpreter, functools.partial(getattr, forward_ad, "_current_level")

    def unknown() -> bool:
        _warn_gone(
            "torch",
            "peek_interpreter_stack, is_in_torch_dispatch_mode or forward_ad._current_level",
            "ops go through the dispatcher, 8 to 35 microseconds slower each",
        )
        return True

    return unknown, lambda: None, lambda: -1


def onednn_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Compute ``x @ weight.t()`` by oneDNN, in float32.

    Raises ``AttributeError`` if this torch lacks the op. :mod:`moe_fast.ops.cpu_matmul` tries it
    once, and multiplies by torch's own functions if it fails.
    """
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], None)


def in_backward() -> bool:
    """Whether a backward pass is running, in which checkpointing computes a forward again.

    Without the private name: ``False`` and a warning; tokens are then counted twice.
    """
    task = getattr(torch._C, "_current_graph_task_id", None)
    if task is None:
        _warn_gone(
            "torch",
            "_C._current_graph_task_id",
            "with gradient checkpointing tokens are counted twice in the experts' shares",
        )
        return False
    return bool(task() != -1)


def has_forward_hook(module: nn.Module, hook: Method) -> bool:
    """Whether the function is among the module's forward hooks; an error if that is not known."""
    hooks = getattr(module, "_forward_hooks", None)
    if hooks is None:
        raise _gone("torch", "Module._forward_hooks", "routing cannot be recorded for a loss")
    return hook in hooks.values()


def are_unhooked(modules: Iterable[nn.Module]) -> bool:
    """Whether modules surely have no forward hooks, but those that collect outputs."""
    names = ("_forward_hooks", "_forward_pre_hooks")
    hooks = [vars(module).get(name, {0: None}) for module in modules for name in names]
    hooks += [getattr(nn.modules.module, f"_global{name}", {0: None}) for name in names]
    collector = "transformers.utils.output_capturing"
    return all(getattr(h, "__module__", "") == collector for some in hooks for h in some.values())


def is_compiled(module: nn.Module) -> bool:
    """Whether ``module.compile()`` was called; ``False`` without the private attribute.

    ``encode`` then leaves out padding for compiled modules too, which is right, but each batch's
    shape is compiled anew.
    """
    return getattr(module, "_compiled_call_impl", None) is not None


# --- transformers: models ------------------------------------------------------------------------


def initialization() -> Any:
    """Return ``transformers.initialization``, whose functions leave loaded weights unchanged.

    Raises:
        RuntimeError: it is gone; torch's own functions would overwrite loaded weights.
    """
    found = _found("transformers.initialization")
    if found is None:
        raise _gone("transformers", "initialization", "new weights cannot be initialised")
    return found


def recorded_outputs(base: type, **recorded: tuple[type, int]) -> dict[str, Any]:
    """Return a model's ``_can_record_outputs``: the base's, and (module class, index) by name.

    Without transformers' recorder only the base's are returned; see :func:`check_recorded`.
    """
    recorder = _found("transformers.utils.output_capturing", "OutputRecorder")
    theirs = getattr(base, "_can_record_outputs", None) or {}
    if recorder is None:
        return dict(theirs)
    ours = {name: recorder(module, index=index) for name, (module, index) in recorded.items()}
    return {**theirs, **ours}


def capture_outputs(forward: Method) -> Method:
    """Decorate a model's forward to record the outputs in ``_can_record_outputs``.

    Without transformers' decorator nothing is recorded: see :func:`check_recorded`.
    """
    capture = _found("transformers.utils.output_capturing", "capture_outputs")
    return forward if capture is None else capture(forward)


def check_recorded(output: Any, name: str) -> None:
    """Raise ``RuntimeError`` if an output that was asked for has not been recorded."""
    if getattr(output, name, None) is None:
        raise _gone(
            "transformers",
            "OutputRecorder and _can_record_outputs as they were",
            f"{name} cannot be given (output_router_logits=True)",
        )


def tied_weights(model: Any) -> dict[str, str]:
    """The names of a model's tied weights, each with the name of the weight that it is tied to.

    Without transformers' list: none, and a checkpoint that contradicts it is not found out.
    """
    expanded = getattr(model, "get_expanded_tied_weights_keys", None)
    if expanded is None:
        _warn_gone(
            "transformers",
            "get_expanded_tied_weights_keys",
            "a checkpoint with two weights in the place of a tied one is not refused",
        )
        return {}
    return expanded(all_submodels=True)


def unsplit_modules(base: type, *names: str) -> list[str]:
    """Return a model's ``_no_split_modules``: the base's, if it still has them, and ``names``."""
    return [*(getattr(base, "_no_split_modules", None) or ()), *names]


def checkpoints_reentrantly(layer: nn.Module) -> bool:
    """Whether the layer's forward runs under ``torch.utils.checkpoint(use_reentrant=True)``.

    Raises:
        RuntimeError: the layer is checkpointed, but transformers no longer says how.
    """
    if not (layer.training and getattr(layer, "gradient_checkpointing", False)):
        return False
    checkpoint = getattr(layer, "_gradient_checkpointing_func", None)
    if checkpoint is None:
        raise _gone(
            "transformers",
            "_gradient_checkpointing_func of layers",
            "router logits under gradient checkpointing may have no gradient",
        )
    return bool(getattr(checkpoint, "keywords", {}).get("use_reentrant", False))


# --- transformers: attention, experts, files -----------------------------------------------------


def attention_of(config: Any) -> Any:
    """Return the name of the attention that a configuration asks for.

    Raises:
        RuntimeError: it has no attribute of a known name for it.
    """
    for name in ("_attn_implementation", "attn_implementation"):
        if hasattr(config, name):
            return getattr(config, name)
    raise _gone("transformers", "config._attn_implementation", "the attention is not known")


def attention_setting(choice: ContextVar[str | None]) -> property:
    """Return a property for ``_attn_implementation``: the current choice, else the base's value.

    Its functions raise ``RuntimeError`` if the base class no longer has such a property.
    """
    name = "_attn_implementation"

    def base(config: Any) -> Any:
        classes = iter(type(config).__mro__)
        next(c for c in classes if vars(c).get(name) is setting)
        theirs = next((vars(c)[name] for c in classes if name in vars(c)), None)
        if not isinstance(theirs, property):
            raise _gone("transformers", "PreTrainedConfig._attn_implementation", "none can be set")
        return theirs

    def get(config: Any) -> Any:
        # torch.compile cannot trace a context variable; compiled models are never asked to pack.
        chosen = None if torch.compiler.is_compiling() else choice.get()
        return chosen or base(config).fget(config)

    def put(config: Any, value: Any) -> None:
        base(config).fset(config, value)

    setting = property(get, put)
    return setting


def attention_can_be_chosen() -> bool:
    """Whether transformers' configurations have that property.

    If not, padding is computed too, and a warning says so.
    """
    config = _found("transformers", "PreTrainedConfig")
    known = isinstance(getattr(config, "_attn_implementation", None), property)
    if not known:
        _warn_gone(
            "transformers",
            "PreTrainedConfig._attn_implementation",
            "encode computes padding too, which is slower",
        )
    return known


def sdpa_attention() -> Method:
    """Return transformers' attention by SDPA, or a function that raises ``RuntimeError``."""
    consequence = "attn_implementation='moe_fast' cannot take a mask of pairs of tokens"
    module = "transformers.integrations.sdpa_attention"
    return _function(module, "sdpa_attention_forward", consequence)


def bidirectional_mask() -> Method:
    """Return transformers' function from a model's 2-D mask to its layers' mask.

    Without it, a function that raises ``RuntimeError``.
    """
    consequence = "MPNet's padding cannot be masked"
    return _function("transformers.masking_utils", "create_bidirectional_mask", consequence)


def padding_mask() -> Method:
    """Return transformers' mask function that keeps a mask [B, L] as it is.

    Without it, a function that raises ``RuntimeError``.
    """
    consequence = "attn_implementation='moe_fast' cannot take a mask"
    return _function("transformers.masking_utils", "flash_attention_mask", consequence)


def register_experts(name: str, forward: Method) -> None:
    """Make ``experts_implementation=name`` known to transformers.

    Without its interface nothing is registered, and transformers refuses the name.
    """
    interface = _found("transformers.integrations.moe", "ExpertsInterface")
    if interface is not None:
        interface.register(name, forward)


def gate_of(experts: Any) -> Method:
    """Return the gate function of a model's experts: from [T, 2H] to [T, H].

    Raises:
        RuntimeError: the experts no longer have it under its private name.
    """
    gate = getattr(experts, "_apply_gate", None)
    if gate is None:
        raise _gone("transformers", "_apply_gate of experts", "their gate cannot be computed")
    return gate


def has_usual_gate(experts: Any) -> bool:
    """Whether the experts' gate is transformers' own.

    Without the private names: False, which is right, but slower.
    """
    usual = _found("transformers.integrations.moe", "_default_apply_gate")
    return usual is not None and getattr(type(experts), "_apply_gate", None) is usual


# transformers' classes whose gate is act="clamped_swiglu", and what they call alpha and limit.
_CLAMPED_GATES = {
    "GptOssExperts": ("alpha", "limit"),
    "OpenAIPrivacyFilterExperts": ("alpha", "limit"),
    "MiniMaxM3VLExperts": ("swiglu_alpha", "swiglu_limit"),
}
_IN_FLOAT32 = ("OpenAIPrivacyFilterExperts",)


def clamped_gate(experts: Any) -> tuple[float, float] | None:
    """Return alpha and limit of a gate (clamp(up) + 1) gate sigmoid(alpha gate), else ``None``.

    It is recognised by the class that defines it. A class with another name runs unfused, which is
    correct but slower.
    """
    gate: Any = getattr(type(experts), "_apply_gate", None)
    if not getattr(gate, "__module__", "").startswith("transformers.models."):
        return None
    names = _CLAMPED_GATES.get(gate.__qualname__.partition(".")[0])
    if names is None or not all(hasattr(experts, name) for name in names):
        return None
    return tuple(getattr(experts, name) for name in names)


def computes_in_float32(experts: Any) -> bool:
    """Whether transformers' own forward computes these experts in float32 whatever their dtype.

    Only the code of that forward says so, no attribute.
    """
    return type(experts).__name__ in _IN_FLOAT32


def file_of(path: Any, name: str) -> str | None:
    """Return the path of a file of a model folder or of the hub; ``None`` if it does not exist."""
    from transformers.utils import cached_file

    missing = "_raise_exceptions_for_missing_entries"
    options = {missing: False} if _takes(cached_file, missing) else {}
    try:
        return cached_file(path, name, **options)
    except OSError:
        if options:
            raise
        return None  # this transformers does not distinguish a missing file from a missing model


def _takes(function: Method, parameter: str) -> bool:
    parameters = inspect.signature(function).parameters
    return parameter in parameters or any(
        p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()
    )


def replaced_backend(tokenizer: Any, backend: Any) -> bool:
    """Replace a tokenizer's object of the tokenizers library; return whether that worked."""
    tokenizer._tokenizer = backend
    return getattr(tokenizer, "backend_tokenizer", None) is backend


def rotate_checkpoints(*args: Any, **kwargs: Any) -> None:
    """Remove older checkpoints by transformers' function; ``RuntimeError`` if it is gone."""
    name = "rotate_checkpoints"
    _function("transformers.trainer_utils", name, "older checkpoints stay")(*args, **kwargs)


_LOSS_SUMS = ("_tr_loss", "_total_loss_scalar", "_globalstep_last_logged")


def loss_sums(trainer: Any) -> list[float]:
    """Return the sums of the loss that a trainer keeps during training; [] without these names.

    Returns:
        [the sum since its last log, the sum up to that log, the step of that log].
    """
    known = all(hasattr(trainer, name) for name in _LOSS_SUMS)
    return [float(getattr(trainer, name)) for name in _LOSS_SUMS] if known else []


def restore_loss_sums(trainer: Any, sums: list[float]) -> None:
    """Restore what :func:`loss_sums` returned; without these names, the sums start anew."""
    if sums and loss_sums(trainer):
        since, total, step = sums
        trainer._tr_loss.fill_(since)
        trainer._total_loss_scalar, trainer._globalstep_last_logged = total, int(step)


# --- sentence-transformers, tqdm -----------------------------------------------------------------


def child_modules(module: nn.Module) -> dict[str, nn.Module]:
    """Return a pipeline's modules by name; a module that occurs twice has two names.

    Without torch's private dict the public method is used, which names it once.
    """
    modules = getattr(module, "_modules", None)
    return dict(module.named_children() if modules is None else modules)


def forwards_names(first: Any, names: Iterable[str]) -> None:
    """Make sentence-transformers' Transformer pass these arguments to its (new) encoder.

    Raises:
        RuntimeError: it no longer has a list of such arguments.
    """
    declared = getattr(first, "_declared_forward_params", None)
    if declared is None:
        raise _gone(
            "sentence-transformers",
            "Transformer._declared_forward_params",
            "a mixture in it would not be told its experts",
        )
    first._declared_forward_params = declared | set(names)
    first._method_signature_cache = {}


def is_plain_call(model: Any) -> bool:
    """Whether a SentenceTransformer runs in this process, on padded batches.

    Without the private names: ``False``; texts are then tokenized as in the original class, in more
    passes.
    """
    if getattr(model, "_distributed_inference", None) is not None:
        return False
    flattens = getattr(model, "_can_flatten_inputs", None)
    return flattens is not None and not flattens()


def running_bars(tqdm: Any) -> list[Any]:
    """Return the progress bars that are not finished; none if tqdm no longer lists them."""
    return list(getattr(tqdm, "_instances", ()))


# --- transformers and peft -----------------------------------------------------------------------


@contextmanager
def adapter_methods() -> Iterator[None]:
    """Within the block, raise a helpful error if transformers' adapter methods refuse peft.

    A release of transformers may refuse even the newest peft (5.24 requires 0.22, but 0.21.2 is the
    last). The new error quotes theirs, and recommends peft's own functions, which do not use
    transformers.

    Raises:
        ValueError: transformers refused the installed version of peft.
    """
    try:
        yield
    except (ValueError, ImportError) as error:
        reason = str(error)
        if "peft" not in reason.lower() or "version" not in reason.lower():
            raise
        installed = {name: _version(name) for name in ("transformers", "peft")}
        if installed["peft"] is None:
            raise
        raise ValueError(
            f"transformers {installed['transformers']} refuses peft {installed['peft']} in its own "
            f"methods for adapters ({reason}). Use peft's functions, which work with both: "
            "peft.get_peft_model(model, config), for a saved adapter "
            "peft.PeftModel.from_pretrained(model, folder); in a SentenceTransformer: "
            "model[0].model = peft.get_peft_model(model[0].model, config). Or install a peft that "
            "this transformers accepts, or an earlier transformers."
        ) from error


def saves_adapter_alone(model: Any) -> bool:
    """Whether transformers' ``save_pretrained`` writes an adapter instead of the whole model.

    It does so after its own ``add_adapter`` or ``load_adapter``; a private flag tells.

    Raises:
        RuntimeError: the flag is gone, and the model has adapters: what would be written is not
            known.
    """
    alone = getattr(model, "_hf_peft_config_loaded", None)
    if alone is None and any(hasattr(module, "get_base_layer") for module in model.modules()):
        raise RuntimeError(
            f"transformers {_version('transformers')} no longer says whether a model with an "
            "adapter is saved whole or as the adapter alone. Merge the adapter first "
            "(PeftModel.merge_and_unload), or install an earlier transformers."
        )
    return bool(alone)
