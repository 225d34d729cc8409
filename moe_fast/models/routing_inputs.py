"""From what a caller says about a batch (a domain, ids, a mask) to what the layers need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_fast.layers.routing_info import RoutingInfo, token_mask_of
from moe_fast.models.configuration import AUTO, MoEConfigFields
from moe_fast.ops.checks import (
    INTEGER_DTYPES,
    check_dtype,
    check_like,
    check_shape,
    check_tensor,
    checks_values,
)


def resolve_ids(
    config: MoEConfigFields,
    like: Tensor,
    batch: int,
    *,
    expert_ids: Tensor | None,
    domain: str | None,
    domain_ids: Tensor | None,
    token_type_ids: Tensor | None,
    predict: Callable[[], Tensor],
) -> tuple[Tensor | None, Tensor | None]:
    """The batch's expert ids ([B] or [B, L], enforced routing only) and domain ids ([B]).

    Domain ids without effect (a learned router and no domains) are dropped: our collator gives
    them to every encoder, for the losses. ``predict`` gives the domain ids for the domain "auto".

    Raises:
        ValueError, TypeError: for contradictions, unknown domains, and ids that do not fit.
    """
    if domain is not None and (expert_ids is not None or domain_ids is not None):
        other = "expert_ids" if expert_ids is not None else "domain_ids"
        raise ValueError(f"give domain or {other}, not both; got domain={domain!r} and {other}.")
    enforced = config.routing == "enforced"
    if expert_ids is not None and not enforced:
        raise ValueError(
            f"expert_ids need routing='enforced'; this model's routing is {config.routing!r}."
        )
    if domain_ids is not None and not config.domains and not enforced:
        domain_ids = None
    if expert_ids is None and domain_ids is None and domain is None:
        if config.route_by_token_type and token_type_ids is not None:
            return token_type_ids, None
        domain = config.default_domain
    if domain == AUTO:
        domain_ids = predict()
    elif domain is not None:
        domain_ids = torch.full((batch,), config.domain_id(domain), device=like.device)
    if domain_ids is not None:
        _check_domain_ids(config, domain_ids, like, batch)
    if enforced:
        return _enforced_ids(config, expert_ids, domain_ids, batch)
    return None, domain_ids


def _enforced_ids(
    config: MoEConfigFields, expert_ids: Tensor | None, domain_ids: Tensor | None, batch: int
) -> tuple[Tensor, Tensor | None]:
    """A domain's id is its expert's: one [B] gives the other, and both must agree."""
    if expert_ids is None and domain_ids is None:
        known = f" (known: {', '.join(config.domains)})" if config.domains else ""
        raise ValueError(
            f"routing='enforced' needs expert_ids or a domain{known}; got neither, and the model "
            "has no default_domain."
        )
    if expert_ids is None:
        assert domain_ids is not None
        return domain_ids, domain_ids
    check_tensor("expert_ids", expert_ids)
    if not config.domains or expert_ids.shape != (batch,):
        return expert_ids, domain_ids
    if domain_ids is None:
        said = f"[0, num_experts) = [0, {config.num_experts})"  # they choose the domains' tokens
        _check_range("expert_ids", expert_ids, config.num_experts, said)
        return expert_ids, expert_ids
    if _reads_values(domain_ids) and not torch.equal(expert_ids.long(), domain_ids.long()):
        raise ValueError(
            "expert_ids and domain_ids must agree (a domain's id is its expert's); got "
            f"expert_ids {expert_ids.tolist()} and domain_ids {domain_ids.tolist()}."
        )
    return expert_ids, domain_ids


def _reads_values(tensor: Tensor) -> bool:
    return not torch.compiler.is_compiling() and checks_values(tensor.device)


def _check_range(name: str, ids: Tensor, size: int, said: str) -> None:
    check_dtype(name, ids, INTEGER_DTYPES)
    if not _reads_values(ids):
        return
    wrong = ids[(ids < 0) | (ids >= size)]
    if wrong.numel():
        raise ValueError(f"{name} must lie in {said}; got {int(wrong[0])}.")


def _check_domain_ids(config: MoEConfigFields, ids: Tensor, like: Tensor, batch: int) -> None:
    if not config.domains:
        raise ValueError("domain_ids need a model with domains; this one has none.")
    check_tensor("domain_ids", ids)
    check_shape("domain_ids", ids, (batch,), "[B]")
    check_like("the model's inputs", like, dtype=False, domain_ids=ids)
    size = len(config.domains)
    _check_range("domain_ids", ids, size, f"[0, {size}), one per domain of {config.domains}")


def build_routing(
    config: MoEConfigFields,
    like: Tensor,
    expert_ids: Tensor | None,
    attention_mask: Any,
    cu_seqlens: Tensor | None,
    dtype: torch.dtype,
) -> RoutingInfo:
    """The RoutingInfo that all layers share; enforced routing is planned here, once.

    Args:
        like: input ids [B, L] or embeddings [B, L, D], for shape and device only.
        cu_seqlens: where sentences start in a packed batch of shape [1, T].
        dtype: of the hidden states.
    """
    info = RoutingInfo(expert_ids, token_mask_of(attention_mask), cu_seqlens)
    if config.routing != "enforced" or config.moe_block != "mlp":  # other blocks route parts
        return info
    shape = (*like.shape[:2], 1)
    return info.with_shared_plan(
        config.num_experts, torch.empty(shape, dtype=dtype, device=like.device)
    )


def place_domain_tokens(
    config: MoEConfigFields,
    input_ids: Tensor | None,
    domain_ids: Tensor | None,
    attention_mask: Any,
    cu_seqlens: Tensor | None,
) -> Tensor | None:
    """``input_ids`` with each sentence's [CLS] replaced by its domain's token.

    Raises:
        ValueError: for ``inputs_embeds`` in place of ids, and, where values are checked, for a
            sentence whose first real token is not [CLS]: a domain would have no place there.
    """
    if domain_ids is None or not config.domain_token_ids:
        return input_ids
    if input_ids is None:
        raise ValueError(
            "a domain needs input_ids, to put its token in [CLS]'s place; got inputs_embeds."
        )
    tokens = torch.tensor(config.domain_token_ids, device=input_ids.device)[domain_ids]
    starts = _starts(input_ids, token_mask_of(attention_mask), cu_seqlens)
    if cu_seqlens is not None:
        sentence = starts.reshape(-1).cumsum(0).view_as(input_ids) - 1
        tokens = tokens[sentence.clamp(min=0)]
    else:
        tokens = tokens[:, None]
    place = starts & (input_ids == config.domain_token_replaces)
    if _reads_values(input_ids) and not torch.equal(place, starts):
        row, column = (starts & ~place).nonzero()[0].tolist()
        raise ValueError(
            f"input_ids must start each text with [CLS] (id {config.domain_token_replaces}), whose "
            f"place its domain's token takes; got id {int(input_ids[row, column])} in row {row}."
        )
    return torch.where(place, tokens, input_ids)


def _starts(input_ids: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """[B, L] bool, True at each sentence's first real token."""
    if cu_seqlens is not None:
        position = torch.arange(input_ids.numel(), device=input_ids.device).view_as(input_ids)
        return torch.isin(position, cu_seqlens[:-1])
    if mask is None:
        return torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids) == 0
    return mask & (mask.to(torch.int64).cumsum(1) == 1)
