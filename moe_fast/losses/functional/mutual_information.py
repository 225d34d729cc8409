"""Mutual information between a text's domain and the expert its tokens are routed to.

With p_t = softmax of token t's router logits and d(t) the domain of its text,

    J[d, e] = sum over real tokens t with d(t) = d of p_t[e] / number of real tokens
    I       = sum_de J[d, e] * log(J[d, e] / (J[d, .] * J[., e]))       in nats

J[d, .] and J[., e] are sums over experts and over domains. Every token counts once in both. I is 0
if routing is independent of the domain, and at most log(min(domains, experts)). As a loss, -I makes
the router use all experts evenly over the batch, and few experts, with certainty, within each
domain. I is differentiable through p.

Source: Chen et al. (Mod-Squad), arXiv 2212.08066, and Hallee et al., arXiv 2401.15713. The code of
the latter counts the examples of a domain twice and detaches the probabilities.
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
    """Compute J, the joint distribution of domain and expert (see the module's docstring).

    Args:
        router_logits: [T, E] for T tokens and E experts, or [layers, T, E] of layers that saw the
            same tokens.
        domain_ids: int64 [T], the domain of each token's text, in [0, num_domains).
        num_domains: the number of domains, including those that the batch lacks.
        token_mask: bool [T], True for real tokens; ``None``: all are real.
        reduce: sums a tensor over processes, for the joint distribution of the global batch.

    Returns:
        [num_domains, E] or [layers, num_domains, E] float32 (float64 for float64 logits); each
        layer sums to 1 (to 0 if no token is real).

    Raises:
        ValueError: a shape does not fit, or (if values are checked) a domain id is out of range.
        TypeError: a dtype does not fit.
    """
    return joint_from_sums(
        reduce(domain_expert_sums(router_logits, domain_ids, num_domains, token_mask))
    )


def domain_expert_sums(
    router_logits: Tensor,
    domain_ids: Tensor,
    num_domains: int,
    token_mask: Tensor | None = None,
) -> Tensor:
    """Compute J times the number of real tokens; the sums of a batch's parts can be added up.

    Arguments, shape and errors are those of :func:`domain_expert_joint`.
    """
    logits = check_logits(router_logits)
    check_dtype("domain_ids", domain_ids, INTEGER_DTYPES)
    check_shape("domain_ids", domain_ids, (logits.shape[-2],), "[T]")
    check_ids("domain_ids", domain_ids, "num_domains", num_domains)
    logits, real = zero_padding(logits, token_mask)
    domains = torch.arange(num_domains, device=logits.device)
    belongs = (domain_ids == domains[:, None]).to(logits.dtype) * real  # [domains, T]
    with torch.autocast(logits.device.type, enabled=False):
        return belongs @ logits.softmax(-1)


def joint_from_sums(sums: Tensor) -> Tensor:
    """Compute J from the :func:`domain_expert_sums` of a whole batch."""
    total = sums.detach().sum((-2, -1), keepdim=True)  # the number of real tokens
    return sums / torch.where(total > 0, total, 1)


def mutual_information(joint: Tensor) -> Tensor:
    """Compute I, in nats, of joint distributions.

    Args:
        joint: [..., domains, E], >= 0; the last two dimensions sum to 1.

    Returns:
        [...]: one number per leading index, at least 0 up to rounding.
    """
    domains, experts = joint.sum(-1), joint.sum(-2)
    return _entropy(domains) + _entropy(experts) - _entropy(joint.flatten(-2))


def _entropy(p: Tensor) -> Tensor:
    """Return -sum p log p over the last dimension; its gradient is finite at p = 0.

    p = 0 occurs for a domain that the batch lacks.
    """
    return -(p * p.clamp(min=torch.finfo(p.dtype).tiny).log()).sum(-1)
