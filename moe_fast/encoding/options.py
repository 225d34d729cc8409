"""EncodeOptions: how a model's ``encode`` is called for queries and documents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from moe_fast.encoding.domains import domains_of
from moe_fast.ops.checks import check_count

Role = Literal["query", "document"]


@dataclass(frozen=True)
class EncodeOptions:
    """How a model's ``encode`` is called. For options that are ``None`` the model decides.

    Attributes:
        batch_size: texts per batch.
        truncate: whether texts longer than the model's ``max_seq_length`` are cut. Otherwise such
            a text is an error (``None``: the ``truncate`` of a `MoESentenceTransformer` decides).
        query_prompt, document_prompt: texts put before every query (``a``) and every
            document (``b``).
        query_prompt_name, document_prompt_name: names of the model's own prompts instead.
        roles: call ``encode_query`` and ``encode_document``, which choose the model's own prompts
            for the two. ``None``: only for retrieval, and if the model has these methods.
        domain: one domain for all texts, passed to the model.
        pass_domain: pass each text's own domain to the model. ``None``: if the model has
            domains, the data names them, and ``domain`` is not given.
        show_progress_bar: as in sentence-transformers.
    """

    batch_size: int | None = None
    truncate: bool | None = None
    query_prompt: str | None = None
    document_prompt: str | None = None
    query_prompt_name: str | None = None
    document_prompt_name: str | None = None
    roles: bool | None = None
    domain: str | None = None
    pass_domain: bool | None = None
    show_progress_bar: bool | None = None

    def __post_init__(self) -> None:
        for role in ("query", "document"):
            if getattr(self, f"{role}_prompt") and getattr(self, f"{role}_prompt_name"):
                raise ValueError(f"give {role}_prompt or {role}_prompt_name, not both")
        if self.domain is not None and self.pass_domain:
            raise ValueError(
                "give domain (one for all texts) or pass_domain (each its own), not both"
            )
        check_count("batch_size", 1 if self.batch_size is None else self.batch_size)

    def for_role(self, role: Role) -> dict[str, Any]:
        """Keywords of ``encode`` for the texts of one role."""
        options = {
            "batch_size": self.batch_size,
            "show_progress_bar": self.show_progress_bar,
            "domain": self.domain,
            "prompt": getattr(self, f"{role}_prompt"),
            "prompt_name": getattr(self, f"{role}_prompt_name"),
        }
        return {name: value for name, value in options.items() if value is not None}


def passes_domain(model: Any, options: EncodeOptions, domains_known: bool) -> bool:
    """Whether the domains of texts are passed to the model.

    Raises:
        ValueError: the options require it, but the data names no domains.
    """
    if options.pass_domain and not domains_known:
        raise ValueError("pass_domain=True needs data with domains; this data has none")
    if options.pass_domain is None:
        return options.domain is None and domains_known and bool(domains_of(model))
    return options.pass_domain
