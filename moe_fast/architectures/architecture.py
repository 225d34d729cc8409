"""The description of a dense encoder, from which the classes of its mixtures are made."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

# The ends of the names of the models with a head that mixtures can have.
HEADS = ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification")


def _is_class(of: type[Any]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, type) and issubclass(value, of)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_optional_name(value: Any) -> bool:
    return value is None or _is_name(value)


def _are_names(value: Any) -> bool:
    return isinstance(value, tuple) and value != () and all(map(_is_name, value))


def _is_id(value: Any) -> bool:
    is_int = isinstance(value, int) and not isinstance(value, bool)
    return _is_optional_name(value) or (is_int and value >= 0)


def _takes_keywords(value: Any) -> bool:
    if value is None or not callable(value):
        return value is None
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(value).parameters.values())


# What each field of an entry must be, as the end of a sentence.
_FIELD_KINDS: tuple[tuple[Callable[[Any], bool], str, tuple[str, ...]], ...] = (
    (_is_class(PreTrainedModel), "a class of a transformers model", ("dense_model",)),
    (_is_class(nn.Module), "a class of a torch.nn.Module", ("dense_layer",)),
    (_are_names, "a tuple of names, at least one", ("up", "mlp")),
    (_is_name, "a name", ("layers", "down", "norm", "attention")),
    (
        _is_optional_name,
        "a name or None",
        ("dropout", "attention_norm", "attention_dropout", "projections_norm"),
    ),
    (
        lambda value: value is None or (_are_names(value) and len(value) == 4),
        "a tuple of four names or None",
        ("projections",),
    ),
    (
        _is_name,
        "the name of a field of the configuration, or the value itself",
        ("activation",),
    ),
    (_is_name, "the name of a field of the configuration", ("intermediate_size",)),
    (
        lambda value: isinstance(value, bool) or _is_name(value),
        "True, False or the name of a field of the configuration",
        ("bias",),
    ),
    (_is_id, "None, an id or the name of a field of the configuration", ("padding_id",)),
    (
        lambda value: isinstance(value, bool),
        "True or False",
        ("gated", "pre_norm", "tuple_output"),
    ),
    (_takes_keywords, "None or a function that takes **keywords", ("forward",)),
    (_is_optional_name, "None or a reason, as text", ("not_packed", "not_fused")),
)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A dense encoder, described by the names of its layers and of their parts.

    A layer has two blocks, attention and MLP. Each adds its result to its input, and
    normalises either the sum (post-norm) or the input (pre-norm). Modules are named by their path
    within the layer. A setting is the name of a field of the configuration, or the value itself.

    Attributes:
        dense_model, dense_layer: the classes of the encoder and of its layers.
        layers: path of the list of layers in the encoder.
        up: the linear maps before the activation; in a gated MLP the activated one comes first.
        down: the linear map after the activation.
        gated: whether the MLP is ``down(act(z1) * z2)``; ``z1`` and ``z2`` are the results of two
            maps in ``up``, or the halves of the result of one.
        mlp: the modules that the mixture replaces.
        activation, intermediate_size, bias: settings: the activation's name, the MLP's width, and
            whether its maps have biases.
        pre_norm: whether the layer's blocks normalise their input.
        norm, dropout: of the MLP's block; the dropout is applied to the result of the MLP.
        attention: the module that computes the attention.
        attention_norm, attention_dropout: as ``norm`` and ``dropout``, for the attention's block.
            Without ``attention_norm`` the module ``attention`` computes the whole block.
        projections: the maps of the attention to queries, keys and values, and of its result.
            ``None``: they are not computed in one operation with what follows them.
        projections_norm: the norm after the attention, where ``attention`` contains it.
        padding_id: a setting: position ids start after this id. ``None``: they start at 0.
        tuple_output: whether a layer returns a tuple of the hidden states and the attention's other
            outputs.
        forward: a function in place of a dense forward that passes no keywords to the layers. It
            takes a mixture and the keywords of the dense forward, passes unknown keywords to the
            layers with experts, and returns the result of the dense forward.
        not_packed: why texts cannot be packed, as the end of a sentence. ``None``: they can be.
        not_fused: why ``fused_output`` is not supported, as a predicate of "layers". ``None``: it
            is supported, unless the layer is pre-norm.
    """

    dense_model: type[PreTrainedModel]
    dense_layer: type[Any]
    layers: str
    up: tuple[str, ...]
    down: str
    mlp: tuple[str, ...]
    norm: str
    attention: str
    gated: bool = False
    activation: str = "hidden_act"
    intermediate_size: str = "intermediate_size"
    bias: str | bool = True
    pre_norm: bool = False
    dropout: str | None = None
    attention_norm: str | None = None
    attention_dropout: str | None = None
    projections: tuple[str, str, str, str] | None = None
    projections_norm: str | None = None
    padding_id: str | int | None = None
    tuple_output: bool = False
    forward: Callable[..., Any] | None = None
    not_packed: str | None = None
    not_fused: str | None = None

    def __post_init__(self) -> None:
        for is_allowed, said, fields in _FIELD_KINDS:
            for name in fields:
                if not is_allowed(getattr(self, name)):
                    raise TypeError(f"{name} must be {said}; got {getattr(self, name)!r}.")
        self._check_together()
        if self.pre_norm and self.not_fused is None:
            reason = "normalise before their MLP and have no output block behind it"
            object.__setattr__(self, "not_fused", reason)

    def _check_together(self) -> None:
        """Raise ``ValueError`` for fields that do not go together."""
        if not self.gated and len(self.up) != 1:
            raise ValueError(f"up must name one linear map unless gated=True; got {self.up}.")
        if len(self.up) > 2:
            raise ValueError(f"up must name one linear map, or two if gated; got {self.up}.")
        if self.attention_dropout is not None and self.attention_norm is None:
            raise ValueError(
                "attention_dropout must be None without attention_norm, where the module "
                f"'attention' computes its whole block; got {self.attention_dropout!r}."
            )
        if not getattr(self.dense_config, "model_type", ""):
            raise ValueError(
                "dense_model must have a config_class with a model_type, by which a saved mixture "
                f"is found again; got {self.dense_model.__name__}, whose config_class is "
                f"{self.dense_config!r}."
            )

    @property
    def name(self) -> str:
        """The stem of the names of the mixture's classes: "Bert" in ``MoEBertModel``."""
        return self.dense_model.__name__.removesuffix("Model")

    @property
    def dense_config(self) -> type[PreTrainedConfig]:
        """The class of the encoder's configuration."""
        return self.dense_model.config_class

    @property
    def model_type(self) -> str:
        """The ``model_type`` of a mixture's configuration."""
        return f"moe_{self.dense_config.model_type.replace('-', '_')}"

    @property
    def heads(self) -> dict[str, type[PreTrainedModel]]:
        """The dense models with a head, by the end of their name; they stand beside the encoder.

        Those of :data:`HEADS` that its module has: ``BertForMaskedLM`` is "ForMaskedLM" of BERT's.
        """
        module = sys.modules[self.dense_model.__module__]
        found = {head: getattr(module, f"{self.name}{head}", None) for head in HEADS}
        return {head: model for head, model in found.items() if model is not None}

    @property
    def mlp_names(self) -> dict[str, tuple[str, ...]]:
        """For each weight of a mixture's layer, the dense weights that it is made of.

        Several dense weights are concatenated along the first dimension, in this order.
        """
        up = "mlp.gate_up_proj" if self.gated else "mlp.up_proj"
        names = {}
        for new, old in ((up, self.up), ("mlp.down_proj", (self.down,))):
            names[new] = tuple(f"{name}.weight" for name in old)
            names[f"{new}_bias"] = tuple(f"{name}.bias" for name in old)
        return names

    def split(self, name: str) -> tuple[int, str] | None:
        """(layer index, name within the layer) of a state-dict name; ``None`` outside of layers."""
        if not name.startswith(f"{self.layers}."):
            return None
        index, _, rest = name.removeprefix(f"{self.layers}.").partition(".")
        return int(index), rest

    def join(self, layer: int, name: str) -> str:
        """The state-dict name of a name within a layer; the inverse of :meth:`split`."""
        return f"{self.layers}.{layer}.{name}"


def encoder_prefix(model: PreTrainedModel) -> str:
    """What stands before the encoder's names in a state dict: "bert." with a head, "" without."""
    return "" if model.base_model is model else f"{model.base_model_prefix}."


def setting(config: Any, value: Any) -> Any:
    """The value of a setting: the configuration's field ``value``, else ``value`` itself."""
    return getattr(config, value, value) if isinstance(value, str) else value


def make_class(module: str, name: str, doc: str, bases: tuple[type, ...], **attributes: Any) -> Any:
    """Make a class and add it to ``module``, from which it can be imported and unpickled."""
    namespace = {"__module__": module, "__qualname__": name, "__doc__": doc, **attributes}
    made = type(name, bases, namespace)
    setattr(sys.modules[module], name, made)
    return made
