"""Wraps a mixture of experts as a model that MTEB evaluates.

It needs the extra ``mteb``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch

from moe_fast.extras import missing

try:
    from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper
except ImportError as error:
    raise missing("mteb", "mteb", "MTEBEncoder", error) from error

from moe_fast.encoding.sentence_transformer import MoESentenceTransformer


class MTEBEncoder(SentenceTransformerEncoderWrapper):
    """MTEB's wrapper of a ``SentenceTransformer``; it also chooses the domain of each task.

    ``mteb.evaluate(MTEBEncoder(model, "me/my-model", domain="medicine"), tasks)``. Prompts, queries
    and documents are handled as by MTEB's own wrapper.

    MTEB stores results on the disk by a model's name and revision, and would confuse a mixture with
    the dense model that it was made from. Therefore ``name`` is required, and the revision is a
    hash of the weights, the configuration and the settings: another mixture never gets the results
    of this one.

    Args:
        model: the mixture.
        name: the model's name in MTEB's results, ``"organisation/model"``.
        domain: the domain of tasks that are not in ``task_domains``; ``None``: the learned router,
            or the model's ``default_domain``.
        task_domains: {name of a task: domain}.
        truncate: whether to cut texts that are too long for the model, as other models in MTEB do;
            ``False``: such a text is an error.
        model_prompts: prompts by task, type of task, or ``"query"`` and ``"document"``, see MTEB's
            wrapper; by default the model's own.

    Raises:
        TypeError: ``model`` is not a ``MoESentenceTransformer``.
        ValueError: the model does not know a domain, or ``name`` has another form.
    """

    def __init__(
        self,
        model: MoESentenceTransformer,
        name: str,
        *,
        domain: str | None = None,
        task_domains: Mapping[str, str] | None = None,
        truncate: bool = True,
        model_prompts: dict[str, str] | None = None,
    ) -> None:
        if not isinstance(model, MoESentenceTransformer):
            raise TypeError(
                f"model must be a MoESentenceTransformer; got {type(model).__name__}. MTEB takes a "
                "dense SentenceTransformer as it is."
            )
        if [bool(part) for part in name.split("/")] != [True, True]:
            raise ValueError(f"name must be 'organisation/model'; got {name!r}")
        config = model.transformers_model.config
        for known in (domain, *(task_domains or {}).values()):
            if known is not None:
                config.domain_id(known)
        super().__init__(model, model_prompts=model_prompts)
        self.domain, self.task_domains, self.truncate = domain, dict(task_domains or {}), truncate
        settings = domain, sorted(self.task_domains.items()), truncate, self.model_prompts
        self.mteb_model_meta = self.mteb_model_meta.model_copy(
            update={"name": name, "revision": _revision(model, settings)}
        )

    def encode(self, inputs: Any, *, task_metadata: Any, **kwargs: Any) -> Any:
        """Encode as MTEB's wrapper does, in the task's domain."""
        domain = self.task_domains.get(task_metadata.name, self.domain)
        if domain is not None:
            kwargs["domain"] = domain
        return super().encode(inputs, task_metadata=task_metadata, truncate=self.truncate, **kwargs)


def _revision(model: MoESentenceTransformer, settings: Any) -> str:
    """Return a hash of the weights, the configuration and the settings."""
    digest = hashlib.sha256(repr((settings, model.max_seq_length, model.prompts)).encode())
    digest.update(model.transformers_model.config.to_json_string().encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
