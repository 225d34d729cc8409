"""Models saved as a PEFT adapter: a reference to a base model, and weights to add to it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors import safe_open

from moe_fast.extras import missing
from moe_fast.models.json_files import read_json, read_modules, read_object
from moe_fast.models.lora import freeze_shared, has_lora

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def adapter_folder(path: str) -> Path | None:
    """The folder within the model folder ``path`` that holds an adapter, if one does.

    It is the folder itself, or that of the ``Transformer`` of a ``SentenceTransformer``.
    """
    folder = Path(path)
    modules = folder / "modules.json"
    if modules.is_file():
        folder /= read_modules(modules)[0][0]
    return folder if (folder / CONFIG).is_file() else None


def load_with_adapter(path: str, adapter: Path, load_base: Any) -> Any:
    """Load the base model and merge the adapter into its weights.

    Args:
        path: the path of the model, which is a bare adapter, or a ``SentenceTransformer`` with
            one, whose other modules and prompts are loaded too.
        adapter: the folder that :func:`adapter_folder` found there.
        load_base: a function that loads the base model, a ``SentenceTransformer`` or a bare
            encoder, from its path.

    Raises:
        ImportError: PEFT is not installed.
        FileNotFoundError: the base model is not at the path that the adapter names.
        ValueError: the adapter's files cannot be used.
    """
    if find_spec("peft") is None:
        raise missing("peft", "peft", f"{path}, an adapter,")
    from peft import PeftModel

    base = base_of(path, adapter)
    if not (adapter / WEIGHTS).is_file():
        raise ValueError(
            f"{adapter} has no {WEIGHTS}: save the adapter as safetensors (save_pretrained's "
            "default); files of another format are not read"
        )
    model = load_base(base)
    try:
        wrapped = PeftModel.from_pretrained(_encoder(model), str(adapter))
        check_complete(wrapped, adapter)
        encoder = wrapped.merge_and_unload(safe_merge=True)
    except (RuntimeError, KeyError, TypeError) as error:
        raise ValueError(f"the adapter in {adapter} does not fit its base: {error}") from error
    encoder.requires_grad_(True)  # PEFT has frozen all weights but the adapter's
    if has_lora(encoder):
        freeze_shared(encoder)
    if encoder is not _encoder(model):
        raise ValueError(f"the adapter in {adapter} is of a kind that is not merged in place")
    if not (Path(path) / "modules.json").is_file():
        return model
    if not hasattr(model, "encode"):
        raise ValueError(f"{path} is a SentenceTransformer, and its base {base} a bare encoder")
    return _with_modules_of(path, model)


def check_complete(wrapped: Any, adapter: Path) -> None:
    """Raise if the adapter's file lacks tensors, which PEFT would leave at random values.

    Raises:
        ValueError: the message names the tensors.
    """
    from peft import get_peft_model_state_dict

    with safe_open(adapter / WEIGHTS, framework="pt") as file:
        stored = set(file.keys())
    wanted = get_peft_model_state_dict(wrapped, save_embedding_layers=False).keys()
    if lacking := sorted(wanted - stored):
        names = ", ".join(lacking[:10]) + (", ..." if len(lacking) > 10 else "")
        raise ValueError(
            f"{adapter / WEIGHTS} lacks {len(lacking)} tensors of the adapter: {names}."
        )


def _encoder(model: Any) -> Any:
    return getattr(model, "transformers_model", model)


def base_of(path: str, adapter: Path) -> str:
    """The path or hub id of the base model that an adapter names.

    Raises:
        ValueError: it names none, or the base is an adapter itself.
        FileNotFoundError: it names a folder that does not exist.
    """
    base = read_object(adapter / CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(
            f"{adapter / CONFIG}: base_model_name_or_path must name the base model; got {base!r}"
        )
    if Path(base).is_dir() and adapter_folder(base) is not None:
        raise ValueError(
            f"the adapter in {path} names an adapter as its base, {base}: merge that one first"
        )
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise FileNotFoundError(
            f"the adapter in {path} belongs to the base model {base!r}, and there is no such "
            f"folder: put it there, or name its place in {adapter / CONFIG}"
        )
    return base


def _with_modules_of(path: str, model: Any) -> Any:
    """The base's encoder with the other modules and the prompts that are saved with the adapter."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.util import import_from_string

    entries = read_json(Path(path) / "modules.json")[1:]  # checked when the adapter was found
    others = []
    for entry in entries:
        if not str(entry["type"]).startswith("sentence_transformers."):
            raise ValueError(f"{path}: a module of {entry['type']} is not loaded")
        others.append(import_from_string(entry["type"]).load(path, subfolder=entry["path"]))
    file = Path(path) / "config_sentence_transformers.json"
    saved = read_object(file) if file.is_file() else {}
    new: SentenceTransformer = type(model)(
        modules=[model[0], *others],
        device=str(model.device),
        prompts=saved.get("prompts"),
        default_prompt_name=saved.get("default_prompt_name"),
    )
    new.similarity_fn_name = saved.get("similarity_fn_name")
    new.module_kwargs = model.module_kwargs
    return new
