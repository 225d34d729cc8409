"""Mutual information between a text's domain and the expert its tokens are routed to.

With p_t = softmax of token t's router logits and d(t) the domain of its text,

    J[d, e] = sum over real tokens t with d(t) = d of p_t[e] / number of real tokens
    I       = sum_de J[d, e] * log(J[d, e] / (J[d, .] * J[., e]))       in nats

Every token counts once, in the domains' shares as in the experts'. 0 where the routing knows
nothing of the domain, at most log(min(domains, experts)): as a loss, -I asks for experts that are
used evenly over all and surely within each domain. It is differentiable through p.

Source: Chen et al. (Mod-Squad), arXiv 2212.08066, and Hallee et al., arXiv 2401.15713, whose code
counts a domain's examples twice over and detaches the probabilities.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_fast.losses.functional.router import (
    Reduce,
    check_ids,
    check_logits,
    one_process,
    zero_padding,
)
from moe_fast.ops.checks import INTEGER_DTYPES, check_dtype, check_shape


def domain_expert_joint(
    router_logits: Tensor,
    domain_ids: Tensor,
    num_domains: int,
    token_mask: Tensor | None = None,
    *,
    reduce: Reduce = one_process,
) -> Tensor:
    """J, the joint distribution of domain and expert.

    Args:
        router_logits: [T, E], or [layers, T, E] of layers that saw the same tokens.
        domain_ids: int64 [T], the domain of each token's text, in [0, num_domains).
        num_domains: how many there are, also where the batch has fewer.
        token_mask: bool [T], True for real tokens; ``None``: all are.
        reduce: sums a tensor over processes, for the joint of the global batch.

    Returns:
        [num_domains, E] or [layers, num_domains, E] float32 (float64 for float64 logits), each
        layer summing to 1 (to 0 where no token is real).

    Raises:
        ValueError, TypeError: for shapes or dtypes that do not fit or, where values are checked,
            a domain id out of range.
    """
    logits = check_logits(router_logits)
    check_dtype("domain_ids", domain_ids, INTEGER_DTYPES)
    check_shape("domain_ids", domain_ids, (logits.shape[-2],), "[T]")
    check_ids("domain_ids", domain_ids, "num_domains", num_domains)
    logits, real = zero_padding(logits, token_mask)
    domains = torch.arange(num_domains, device=logits.device)
    belongs = (domain_ids == domains[:, None]).to(logits.dtype) * real  # [domains, T]
    with torch.autocast(logits.device.type, enabled=False):
        joint = reduce(belongs @ logits.softmax(-1))
    total = joint.detach().sum((-2, -1), keepdim=True)  # the number of real tokens
    return joint / torch.where(total > 0, total, 1)


def mutual_information(joint: Tensor) -> Tensor:
    """I in nats of joint distributions.

    Args:
        joint: [..., domains, E], >= 0, summing to 1 over the last two.

    Returns:
        [...]: one number per leading index, at least 0 up to rounding.
    """
    domains, experts = joint.sum(-1), joint.sum(-2)
    return _entropy(domains) + _entropy(experts) - _entropy(joint.flatten(-2))


def _entropy(p: Tensor) -> Tensor:
    """-sum p log p over the last dimension, with a finite gradient at p = 0 (an absent domain)."""
    return -(p * p.clamp(min=torch.finfo(p.dtype).tiny).log()).sum(-1)
