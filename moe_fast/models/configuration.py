"""Configurations: the dense model's, plus what the mixture needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from packaging.version import InvalidVersion, Version

from moe_fast.architectures import ARCHITECTURES, Architecture, make_class, setting
from moe_fast.layers.attention import AttentionOfTheCall
from moe_fast.layers.moe_mlp import BLOCKS, TARGETS, lora_settings
from moe_fast.layers.multi_head import check_heads
from moe_fast.models.portable import auto_map, code_file, is_portable, portable_code
from moe_fast.models.quantization import check_quantization
from moe_fast.ops.checks import check_choice, check_count
from moe_fast.ops.route.modes import check_experts_per_tok, resolve_weight_mode
from moe_fast.version import __version__

AUTO = "auto"
"""In place of a domain's name: the domain that the model predicts."""


@dataclass(kw_only=True, repr=False, eq=False)
class MoEConfigFields(AttentionOfTheCall):
    """What every moe_fast configuration adds to its dense one.

    ``MoEBertConfig`` and its siblings are made of this and transformers' own, one for each entry of
    the table of architectures.

    Attributes:
        num_experts, num_experts_per_tok: E and K (K is E with ``routing="dense"``).
        routing, weight_mode: as in :func:`moe_fast.ops.route`.
        target: "mlp", "intermediate" or "output", as in :class:`moe_fast.MoEMLP`.
        moe_block: "mlp", experts in place of whole tokens' MLPs, or "multi_head", a
            :class:`moe_fast.MoEMultiHeadMLP`.
        moe_heads: the heads of a multi-head block, by default 2; ``None`` for "mlp".
        expert_form, lora_rank, lora_alpha, shared_bias: as in :class:`moe_fast.MoEMLP`.
        moe_layers: indices of the layers with experts; ``None``: all of them.
        domains: names of the domains, in the order of their ids; with enforced routing a
            domain's id is its expert's.
        default_domain: the domain of a batch that names none, or "auto": for each text the one
            that is predicted; ``None``: there is no default.
        domain_predictor: what the encoder's :class:`moe_fast.models.DomainPredictor` was fitted
            to: ``domains``, their names in the order of its columns, ``vocab_size``,
            ``num_texts`` and ``accuracy``; ``None``: there is none.
        domain_token_ids: one token id per domain, put in [CLS]'s place; empty: no such tokens.
        domain_token_replaces: the id of [CLS], whose place a domain token takes.
        fused_output: whether experts, dropout, residual and LayerNorm are one op
            (:func:`moe_fast.ops.expert_mlp_norm`); for layers that normalise behind their MLP, as
            BERT's do, target "mlp". Changes no parameter: it may be switched at any time.
        output_router_logits: whether the model reports its routing unless told otherwise.
        route_by_token_type: use ``token_type_ids`` as expert ids (enforced routing).
        quantization: of a mixture that :func:`moe_fast.quantize` made, how: ``{"method": "int8",
            "activations": "dynamic" or "static"}``; ``None``: it is not quantised.
        upcycled_from: name or path of the dense model this one was made of.
        moe_fast_version: the version that wrote the checkpoint.
    """

    architecture: ClassVar[Architecture]

    num_experts: int = 8
    num_experts_per_tok: int = 1
    routing: str = "token_topk"
    weight_mode: str = "auto"
    target: str = "mlp"
    moe_block: str = "mlp"
    moe_heads: int | None = None
    expert_form: str = "full"
    lora_rank: int | None = None
    lora_alpha: float | None = None
    shared_bias: bool = False
    moe_layers: list[int] | None = None
    domains: list[str] = field(default_factory=list)
    default_domain: str | None = None
    domain_predictor: dict[str, Any] | None = None
    domain_token_ids: list[int] = field(default_factory=list)
    domain_token_replaces: int | None = None
    fused_output: bool = False
    output_router_logits: bool = False
    route_by_token_type: bool = False
    quantization: dict[str, str] | None = None
    upcycled_from: str | None = None
    moe_fast_version: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self._check_types()
        if self.moe_fast_version is None:
            self.moe_fast_version = __version__
        if self.moe_layers is None:
            self.moe_layers = list(range(self.num_hidden_layers))
        self.moe_layers = sorted(self.moe_layers)
        if self.routing == "dense":
            check_count("num_experts", self.num_experts)
            self.num_experts_per_tok = self.num_experts
        self.lora_rank, self.lora_alpha = self._lora_settings()
        if self.moe_block == "multi_head" and self.moe_heads is None:
            self.moe_heads = 2
        self.check()

    def check(self) -> None:
        """Raise unless all settings go together; also called when a model is built.

        Raises:
            ValueError, TypeError: naming the setting, what it is and what is allowed.
        """
        self._check_types()
        _check_version(self.moe_fast_version or __version__)
        _check_layers(self.moe_layers or [], self.num_hidden_layers)
        check_experts_per_tok(self.routing, self.num_experts_per_tok, self.num_experts, "routing")
        resolve_weight_mode(self.routing, self.weight_mode, self.num_experts_per_tok, "routing")
        check_choice("target", self.target, TARGETS)
        self._lora_settings()
        self._check_block()
        if self.fused_output and self.expert_form != "full":
            raise ValueError(
                "fused_output must be False unless experts have weights of their own "
                f"(expert_form='full'); got True with expert_form={self.expert_form!r}."
            )
        if self.fused_output and self.target != "mlp":
            raise ValueError(
                "fused_output needs target='mlp' (only a mixture of whole MLPs is fused with what "
                f"follows it); got target={self.target!r}."
            )
        if self.fused_output and self.shared_bias:
            raise ValueError(
                "fused_output must be False with shared_bias=True, whose bias stands between the "
                "experts and what is fused with them; got True."
            )
        architecture = type(self).architecture  # a dense configuration may have such a field
        reason = architecture.not_fused
        if self.fused_output and reason is not None:
            raise ValueError(
                f"fused_output must be False: {architecture.name}'s layers {reason}; got True."
            )
        if self.route_by_token_type and self.routing != "enforced":
            raise ValueError(
                "route_by_token_type needs routing='enforced' (token types are expert ids then); "
                f"got routing={self.routing!r}."
            )
        check_quantization(self.quantization)
        self._check_domains()

    def _check_block(self) -> None:
        check_choice("moe_block", self.moe_block, BLOCKS)
        if self.moe_block == "mlp":
            if self.moe_heads is not None:
                raise ValueError(
                    f"moe_heads must be None with moe_block='mlp'; got {self.moe_heads}."
                )
            return
        size = setting(self, type(self).architecture.intermediate_size)
        check_heads(self.moe_heads, self.hidden_size, size, "moe_heads")
        for name, allowed in _OF_WHOLE_MLPS.items():
            if getattr(self, name) != allowed:
                raise ValueError(
                    f"{name} must be {allowed!r} with moe_block='multi_head', whose experts are "
                    f"MLPs of their own; got {getattr(self, name)!r}."
                )

    def _lora_settings(self) -> tuple[int | None, float | None]:
        return lora_settings(self.expert_form, self.lora_rank, self.lora_alpha, self.shared_bias)

    def _check_types(self) -> None:
        for kind, said, names in _KINDS:
            for name in names:
                value = getattr(self, name)
                # ESM's has no vocabulary by default, and transformers makes one to compare with.
                left_open = value is None and getattr(type(self), name, 0) is None
                if not kind(value) and not left_open:
                    raise TypeError(f"{name} must be {said}; got {value!r}.")

    def _check_domains(self) -> None:
        if not all(isinstance(d, str) and d for d in self.domains):
            raise TypeError(f"domains must be non-empty names (str); got {self.domains}.")
        if len(set(self.domains)) != len(self.domains):
            raise ValueError(f"domains must be distinct names; got {self.domains}.")
        if AUTO in self.domains:
            raise ValueError(
                f"domains must not have the name {AUTO!r}, by which encode(texts, domain={AUTO!r}) "
                f"asks the model to predict the domain; got {self.domains}. Give it another name."
            )
        self._check_predictor()
        if self.default_domain is not None:
            if not self.domains:
                raise ValueError(
                    f"default_domain needs domains; got {self.default_domain!r} and no domains."
                )
            if self.default_domain != AUTO:
                check_choice("default_domain", self.default_domain, self.domains)
        if self.routing == "enforced" and len(self.domains) not in (0, self.num_experts):
            raise ValueError(
                "domains must name one domain per expert with routing='enforced' (a domain's id "
                f"is its expert's); got {len(self.domains)} domains and "
                f"num_experts={self.num_experts}."
            )
        if self.domain_token_ids and len(self.domain_token_ids) != len(self.domains):
            raise ValueError(
                "domain_token_ids must hold one id per domain; "
                f"got {len(self.domain_token_ids)} ids and {len(self.domains)} domains."
            )
        replaces, size = self.domain_token_replaces, self.vocab_size or 0
        if self.domain_token_ids and (replaces is None or not 0 <= replaces < size):
            raise ValueError(
                "domain_token_replaces must be the id of [CLS], in [0, vocab_size) = "
                f"[0, {size}); got {replaces}."
            )
        last = list(range(size - len(self.domain_token_ids), size))
        if self.domain_token_ids != last:
            raise ValueError(
                f"domain_token_ids must be the vocabulary's last {len(last)} ids, {last}; got "
                f"{self.domain_token_ids}. Add other tokens to the dense model, before upcycling."
            )
        if self.domains and self.routing != "enforced" and not self.domain_token_ids:
            raise ValueError(
                f"domains with routing={self.routing!r} need domain tokens: without them a domain "
                "would have no effect. Leave domains out, or domain_tokens on."
            )

    def _check_predictor(self) -> None:
        if self.domain_predictor is None:
            return
        names: Any = self.domain_predictor.get("domains")
        for key in ("vocab_size", "num_texts"):
            size: Any = self.domain_predictor.get(key)
            if not _is_int(size) or size < 1:
                raise ValueError(
                    f"domain_predictor's {key} must be a whole number above 0; got {size!r}."
                )
        fits = isinstance(names, list) and bool(names) and all(d in self.domains for d in names)
        if not fits or len(set(names)) != len(names):
            raise ValueError(
                "domain_predictor's domains must be distinct names of the model's domains "
                f"({', '.join(self.domains) or 'it has none'}); got {names!r}."
            )

    def domain_id(self, domain: str) -> int:
        """The id of ``domain``.

        Raises:
            TypeError: for anything but one name.
            ValueError: for a name the model does not know; the message lists the known ones.
        """
        if not isinstance(domain, str):
            raise TypeError(
                "domain must be one name for the whole batch, a str; got "
                f"{type(domain).__name__}. For one domain per text use "
                "MoESentenceTransformer.encode(texts, domain=[...]), or domain_ids."
            )
        if domain not in self.domains:
            known = ", ".join(repr(d) for d in self.domains) or "none: the model has no domains"
            raise ValueError(
                f"domain must be one of the model's domains ({known}); got {domain!r}."
            )
        return self.domains.index(domain)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers', but a checkpoint of another architecture is an error, not a warning."""
        given = config_dict.get("model_type")
        if given is not None and given != cls.model_type:
            hint = " It is a dense model: make a mixture of it with moe_fast.upcycle(...)."
            raise ValueError(
                f"{cls.__name__} reads checkpoints with model_type {cls.model_type!r}; "
                f"got {given!r}." + ("" if given.startswith("moe_") else hint)
            )
        if config_dict.get("auto_map") not in (None, auto_map(cls)):  # the dense model's code
            config_dict = {k: v for k, v in config_dict.items() if k != "auto_map"}
        return super().from_dict(config_dict, **kwargs)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As transformers'; that of a portable mixture with its code beside it."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if is_portable(self):
            code = portable_code(type(self).architecture)
            Path(save_directory, code_file(self)).write_text(code, encoding="utf-8")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_optional_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _are_ints(value: Any) -> bool:
    return isinstance(value, (list, tuple, range)) and all(map(_is_int, value))


# Settings that go with experts in place of the MLP alone, and their values in other blocks.
_OF_WHOLE_MLPS: dict[str, Any] = {
    "target": "mlp",
    "expert_form": "full",
    "shared_bias": False,
    "fused_output": False,
}

# What a field must be before it is used: a configuration may come from anybody's file.
_KINDS: tuple[tuple[Callable[[Any], bool], str, tuple[str, ...]], ...] = (
    (lambda v: _is_int(v) and v > 0, "a whole number above 0", ("num_hidden_layers", "vocab_size")),
    (_is_int, "a whole number", ("num_experts", "num_experts_per_tok")),
    (
        lambda v: isinstance(v, str),
        "a name (str)",
        ("routing", "weight_mode", "target", "expert_form", "moe_block"),
    ),
    (
        lambda v: isinstance(v, bool),
        "true or false",
        ("shared_bias", "fused_output", "output_router_logits", "route_by_token_type"),
    ),
    (lambda v: v is None or _are_ints(v), "a list of whole numbers", ("moe_layers",)),
    (_are_ints, "a list of whole numbers", ("domain_token_ids",)),
    (
        lambda v: v is None or _is_int(v),
        "a whole number",
        ("domain_token_replaces", "lora_rank", "moe_heads"),
    ),
    (lambda v: isinstance(v, (list, tuple)), "a list of names", ("domains",)),
    (lambda v: v is None or isinstance(v, dict), "a JSON object", ("domain_predictor",)),
    (_is_optional_text, "text", ("default_domain", "upcycled_from", "moe_fast_version")),
)


def _check_version(written_by: str) -> None:
    """A newer minor version may have written what this one would misread."""
    try:
        newer = Version(written_by).release[:2] > Version(__version__).release[:2]
    except InvalidVersion:
        raise ValueError(
            f"moe_fast_version must be a version such as {__version__!r}; got {written_by!r}."
        ) from None
    if newer:
        raise ValueError(
            f"moe_fast_version: the checkpoint was written by moe_fast {written_by}, newer than "
            f"this {__version__}. Upgrade moe_fast."
        )


def _check_layers(moe_layers: list[int], num_layers: int) -> None:
    wrong = [i for i in moe_layers if not 0 <= i < num_layers]
    if wrong or len(set(moe_layers)) != len(moe_layers) or not moe_layers:
        raise ValueError(
            f"moe_layers must be distinct indices in [0, num_hidden_layers) = [0, {num_layers}), "
            f"at least one; got {moe_layers}."
        )


def config_class(architecture: Architecture) -> type[MoEConfigFields]:
    """The configuration of an architecture's mixture, made and put into this module."""
    dense = architecture.dense_config
    return make_class(
        __name__,
        f"MoE{architecture.name}Config",
        f"``{dense.__name__}`` plus :class:`MoEConfigFields`.",
        (MoEConfigFields, dense),
        architecture=architecture,
        model_type=architecture.model_type,
    )


for _architecture in ARCHITECTURES:
    config_class(_architecture)
