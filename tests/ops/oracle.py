"""The ops once more, slow and obviously right: what the tests compare everything with.

Written from the specification alone and sharing nothing with ``moe_fast``: Python loops over
tokens, slots, rows and candidates, one small vector at a time, in float64. Nothing is sorted,
batched, masked or padded; a thing that must not contribute is simply never touched. Autograd runs
through the loops, so gradients are compared too.

Letters: T tokens, B sentences, L their padded length, D hidden size, H intermediate size, E
experts, K experts per token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# --------------------------------------------------------------------------------------- route


@dataclass(frozen=True)
class OracleRouting:
    """What ``route`` returns, same fields."""

    top_k_index: Tensor  # [T, K] int64, E in every slot of padding
    top_k_weights: Tensor  # [T, K] float64, 0 for padding
    router_logits: Tensor | None  # [T, E] float64, 0 for padding
    tokens_per_expert: Tensor  # [E] int64


def softmax(logits: list[Tensor]) -> list[Tensor]:
    """Softmax of a list of scalars."""
    largest = max(v.item() for v in logits)
    exponentials = [torch.exp(v - largest) for v in logits]
    return [e / sum(exponentials) for e in exponentials]


def choose(logits: list[Tensor], k: int) -> list[int]:
    """The k largest logits' indices; of equal logits the lower index first."""
    return sorted(range(len(logits)), key=lambda e: (-logits[e].item(), e))[:k]


def weigh(logits: list[Tensor], chosen: list[int], weight_mode: str) -> list[Tensor]:
    """The weights of the chosen experts."""
    if weight_mode == "auto":
        weight_mode = "straight_through" if len(chosen) == 1 else "renormalize"
    if weight_mode == "renormalize":
        return softmax([logits[e] for e in chosen])
    if weight_mode == "one":
        return [torch.ones((), dtype=torch.float64) for _ in chosen]
    p = softmax(logits)
    if weight_mode == "straight_through":
        return [p[e] / p[e].detach() for e in chosen]
    assert weight_mode == "probability"
    return [p[e] for e in chosen]


def sentence_of_each_token(x: Tensor, cu_seqlens: Tensor | None) -> list[int | None]:
    """The sentence a token belongs to: padded [B, L, D], packed by ``cu_seqlens``, or none."""
    if x.dim() == 3:
        return [b for b in range(x.shape[0]) for _ in range(x.shape[1])]
    if cu_seqlens is None:
        return [None] * x.shape[0]
    bounds = cu_seqlens.tolist()
    return [b for b in range(len(bounds) - 1) for _ in range(bounds[b], bounds[b + 1])]


def route(
    x: Tensor,
    router_weight: Tensor | None,
    num_experts_per_tok: int,
    *,
    mode: str = "token_topk",
    weight_mode: str = "auto",
    expert_ids: Tensor | None = None,
    token_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_experts: int | None = None,
) -> OracleRouting:
    """Every routing mode, token by token."""
    tokens = x.reshape(-1, x.shape[-1])
    num_tokens = tokens.shape[0]
    real = [True] * num_tokens if token_mask is None else token_mask.reshape(-1).tolist()
    sentence = sentence_of_each_token(x, cu_seqlens)

    if mode == "enforced":
        assert num_experts is not None and expert_ids is not None
        given = expert_ids.reshape(-1).tolist()
        per_token = len(given) == num_tokens and (expert_ids.dim() == 2 or cu_seqlens is None)
        chosen = [[given[t] if per_token else given[sentence[t]]] for t in range(num_tokens)]
        weights = [[torch.ones((), dtype=torch.float64)] for _ in range(num_tokens)]
        return assemble(chosen, weights, None, real, num_experts, 1)

    assert router_weight is not None
    num_experts = router_weight.shape[0]
    # A padded token's row is never read: its logits are no numbers here at all.
    logits: list[list[Tensor] | None] = []
    for t in range(num_tokens):
        token = tokens[t].double() if real[t] else None
        logits.append(
            None
            if token is None
            else [(token * router_weight[e].double()).sum() for e in range(num_experts)]
        )

    chosen, weights = [], []
    for t in range(num_tokens):
        if not real[t]:
            chosen.append([])
            weights.append([])
            continue
        deciding = logits[t]
        if mode in ("sentence_topk", "sentence_switch"):
            mates = [u for u in range(num_tokens) if sentence[u] == sentence[t] and real[u]]
            deciding = [sum(logits[u][e] for u in mates) / len(mates) for e in range(num_experts)]
        if mode == "dense":
            chosen.append(list(range(num_experts)))
            weights.append(softmax(deciding))
        else:
            chosen.append(choose(deciding, num_experts_per_tok))
            weights.append(weigh(deciding, chosen[-1], weight_mode))
    slots = num_experts if mode == "dense" else num_experts_per_tok
    return assemble(chosen, weights, logits, real, num_experts, slots)


def assemble(
    chosen: list[list[int]],
    weights: list[list[Tensor]],
    logits: list[list[Tensor] | None] | None,
    real: list[bool],
    num_experts: int,
    slots: int,
) -> OracleRouting:
    """Lists to tensors; padding gets id E, weight 0 and logits 0."""
    zero = torch.zeros((), dtype=torch.float64)
    num_tokens = len(real)
    ids = [chosen[t] if real[t] else [num_experts] * slots for t in range(num_tokens)]
    values = [weights[t] if real[t] else [zero] * slots for t in range(num_tokens)]
    counts = [sum(row.count(e) for row in ids) for e in range(num_experts)]
    if logits is not None:
        logits = grid([row or [zero] * num_experts for row in logits], num_experts)
    return OracleRouting(
        torch.tensor(ids, dtype=torch.int64).reshape(num_tokens, slots),
        grid(values, slots),
        logits,
        torch.tensor(counts, dtype=torch.int64),
    )


def grid(rows: list[list[Tensor]], width: int) -> Tensor:
    """A list of rows of scalars to a matrix."""
    if not rows:
        return torch.zeros(0, width, dtype=torch.float64)
    return torch.stack([torch.stack(row) for row in rows])


# ---------------------------------------------------------------------------------------- plan


@dataclass(frozen=True)
class OraclePlan:
    """What ``plan`` returns, as plain lists."""

    expert_offsets: list[int]
    row_to_token: list[int]
    row_to_slot: list[int]
    slot_to_row: list[int]
    tiles: dict[int, list[list[int]]]


def plan(top_k_index: Tensor, num_experts: int, *, block_sizes: tuple[int, ...] = ()) -> OraclePlan:
    """Deal the flat slots into one pile per expert, then lay the piles end to end."""
    ids = top_k_index.reshape(-1).tolist()
    slots_per_token = top_k_index.shape[1]
    piles: list[list[int]] = [[] for _ in range(num_experts)]
    skipped = []
    for slot, expert in enumerate(ids):
        (piles[expert] if expert < num_experts else skipped).append(slot)

    offsets = [0]
    for pile in piles:
        offsets.append(offsets[-1] + len(pile))
    row_to_slot = [slot for pile in piles for slot in pile] + skipped
    slot_to_row = [-1] * len(ids)
    for row, slot in enumerate(row_to_slot[: offsets[-1]]):
        slot_to_row[slot] = row
    return OraclePlan(
        expert_offsets=offsets,
        row_to_token=[slot // slots_per_token for slot in row_to_slot],
        row_to_slot=row_to_slot,
        slot_to_row=slot_to_row,
        tiles={block: tile_schedule(offsets, block) for block in block_sizes},
    )


def tile_schedule(offsets: list[int], block: int) -> list[list[int]]:
    """Pairs (first row, expert) covering each expert's rows in steps of ``block``; no padding."""
    schedule = []
    for expert in range(len(offsets) - 1):
        for first_row in range(offsets[expert], offsets[expert + 1], block):
            schedule.append([first_row, expert])
    return schedule


# ------------------------------------------------------------------------------------- experts


def activate(z: Tensor, act: str) -> Tensor:
    """The activations, from their definitions."""
    if act == "gelu":
        return 0.5 * z * (1.0 + torch.erf(z / math.sqrt(2.0)))
    if act in ("gelu_tanh", "gelu_new", "gelu_pytorch_tanh"):
        return 0.5 * z * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (z + 0.044715 * z**3)))
    if act == "relu":
        return torch.where(z > 0, z, torch.zeros_like(z))
    if act == "clamped_swiglu":
        z = torch.where(z > 7.0, torch.full_like(z, 7.0), z)
        return z / (1.0 + torch.exp(-1.702 * z))
    assert act in ("silu", "swish")
    return z / (1.0 + torch.exp(-z))


def gate(z2: Tensor, act: str) -> Tensor:
    """What gated experts multiply the activated half with."""
    if act != "clamped_swiglu":
        return z2
    return 1.0 + torch.where(z2.abs() > 7.0, 7.0 * torch.sign(z2).detach(), z2)


def expert_mlp(
    x: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    up_proj_bias: Tensor | None,
    down_proj_bias: Tensor | None,
    top_k_weights: Tensor,
    top_k_index: Tensor,
    *,
    act: str = "gelu",
    gated: bool = False,
) -> Tensor:
    """Each token through the MLPs of its experts. Takes the ids where the op takes their plan."""

    def one_expert(token: Tensor, e: int) -> Tensor:
        z = up_proj[e].double() @ token
        if up_proj_bias is not None:
            z = z + up_proj_bias[e].double()
        if gated:
            half = z.shape[0] // 2
            h = activate(z[:half], act) * gate(z[half:], act)
        else:
            h = activate(z, act)
        f = down_proj[e].double() @ h
        return f if down_proj_bias is None else f + down_proj_bias[e].double()

    return mix(x, top_k_weights, top_k_index, up_proj.shape[0], down_proj.shape[1], one_expert)


def expert_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    top_k_weights: Tensor,
    top_k_index: Tensor,
) -> Tensor:
    """Each token through the linear maps of its experts."""

    def one_expert(token: Tensor, e: int) -> Tensor:
        f = weight[e].double() @ token
        return f if bias is None else f + bias[e].double()

    return mix(x, top_k_weights, top_k_index, weight.shape[0], weight.shape[1], one_expert)


def lora_weights(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Every expert's weight [E, O, I], entry by entry: W + scale * B[e] A[e]."""
    experts = []
    for e in range(a.shape[0]):
        change = torch.zeros(weight.shape, dtype=torch.float64)
        for r in range(a.shape[1]):
            change = change + scale * b[e, :, r, None].double() * a[e, r].double()
        experts.append(weight.double() + change)
    return torch.stack(experts)


def mix(x, top_k_weights, top_k_index, num_experts, width, one_expert) -> Tensor:
    """y_t = sum over k of w[t, k] * f_e(x_t), leaving out the ids >= E."""
    outputs = []
    for t in range(x.shape[0]):
        y = torch.zeros(width, dtype=torch.float64)
        for k in range(top_k_index.shape[1]):
            e = int(top_k_index[t, k])
            if e < num_experts:
                y = y + top_k_weights[t, k].double() * one_expert(x[t].double(), e)
        outputs.append(y)
    return torch.stack(outputs) if outputs else torch.zeros(0, width, dtype=torch.float64)


# ------------------------------------------------------------------------------------ info_nce


@dataclass(frozen=True)
class OracleLoss:
    """The loss and its statistics."""

    loss: Tensor  # []
    row_loss: Tensor  # [B]
    rank: Tensor  # [B] int64
    accuracy: float


def cross_entropy(
    logits: list[Tensor], positives: list[int], candidates: list[int], label_smoothing: float
) -> Tensor:
    """Against an even target over ``positives``, smoothed over ``candidates``, by definition."""
    largest = max(logits[j].item() for j in candidates)
    log_sum = largest + torch.log(sum(torch.exp(logits[j] - largest) for j in candidates))
    hard = sum(log_sum - logits[j] for j in positives) / len(positives)
    if not label_smoothing:
        return hard
    even = sum(log_sum - logits[j] for j in candidates) / len(candidates)
    return (1.0 - label_smoothing) * hard + label_smoothing * even


def info_nce(
    a: Tensor,
    b: Tensor,
    negatives: Tensor | None = None,
    *,
    scale: float | Tensor,
    similarity: str = "cosine",
    symmetric: bool = True,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    domain_ids: Tensor | None = None,
    group_ids: Tensor | None = None,
    weights: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> OracleLoss:
    """The contrastive loss, one pair of embeddings at a time."""
    num_rows = a.shape[0]
    everyone = list(b.double()) + ([] if negatives is None else list(negatives.double()))
    per_row = 0 if negatives is None else negatives.shape[0] // num_rows

    def owner(j: int) -> int:
        """The row that candidate j was brought along by."""
        return j if j < num_rows else (j - num_rows) // per_row

    def is_positive(i: int, j: int) -> bool:
        if j >= num_rows:
            return False
        return i == j or (group_ids is not None and bool(group_ids[i] == group_ids[j]))

    def clashes(i: int, j: int) -> bool:
        """Whether candidate j must not be a negative of row i."""
        if domain_ids is not None and domain_ids[owner(j)] != domain_ids[i]:
            return True
        if col_ids is not None and col_ids[j] == col_ids[i]:
            return True
        if col_ids is not None and row_ids is not None and col_ids[j] == row_ids[i]:
            return True
        return j < num_rows and row_ids is not None and bool(row_ids[j] == row_ids[i])

    def is_candidate(i: int, j: int) -> bool:
        if is_positive(i, j):
            return True
        # Anchor against positive works both ways: a pair is out if either row objects.
        return not (clashes(i, j) or (j < num_rows and clashes(j, i)))

    def similar(i: int, j: int) -> Tensor:
        u, v = a[i].double(), everyone[j]
        if similarity == "dot":
            return (u * v).sum()
        return (u * v).sum() / torch.sqrt((u * u).sum()) / torch.sqrt((v * v).sum())

    s = [[scale * similar(i, j) for j in range(len(everyone))] for i in range(num_rows)]
    row_loss, rank = [], []
    for i in range(num_rows):
        candidates = [j for j in range(len(everyone)) if is_candidate(i, j)]
        positives = [j for j in range(num_rows) if is_positive(i, j)]
        loss = cross_entropy(s[i], positives, candidates, label_smoothing)
        if symmetric:
            column = [s[j][i] for j in range(num_rows)]
            anchors = [j for j in range(num_rows) if is_candidate(j, i)]
            loss = (loss + cross_entropy(column, positives, anchors, label_smoothing)) / 2.0
        row_loss.append(loss)
        rivals = [j for j in candidates if j not in positives]
        rank.append(1 + sum(s[i][j].item() >= s[i][i].item() for j in rivals))

    w = [1.0] * num_rows if weights is None else weights.tolist()
    total = sum(w_i * l_i for w_i, l_i in zip(w, row_loss, strict=True)) / sum(w)
    accuracy = sum(r == 1 for r in rank) / num_rows
    return OracleLoss(total, torch.stack(row_loss), torch.tensor(rank), accuracy)


# --------------------------------------------------------------------------------------- rows


def gather_rows(x: Tensor, top_k_index: Tensor, num_experts: int) -> Tensor:
    """[S, D]: each row its token's vector, zeros where the plan skips."""
    order = plan(top_k_index, num_experts)
    valid = order.expert_offsets[-1]
    rows = [x[t] if r < valid else torch.zeros_like(x[t]) for r, t in enumerate(order.row_to_token)]
    return torch.stack(rows) if rows else x.new_zeros(0, x.shape[1])


def combine_rows(
    rows: Tensor, top_k_weights: Tensor, top_k_index: Tensor, num_experts: int
) -> Tensor:
    """[T, D]: each token's rows, one at a time, times their weights."""
    order = plan(top_k_index, num_experts)
    tokens, k = top_k_index.shape
    sums = []
    for t in range(tokens):
        total = torch.zeros(rows.shape[1], dtype=torch.float64)
        for j in range(k):
            row = order.slot_to_row[t * k + j]
            if row >= 0:
                total = total + top_k_weights[t, j] * rows[row]
        sums.append(total)
    return torch.stack(sums) if sums else rows.new_zeros(0, rows.shape[1])


def maxsim(queries, documents, query_starts, document_starts, mean=True):
    """The score of every query against every document, one pair after the other, [Q, P]."""
    rows = []
    for a, b in zip(query_starts, query_starts[1:], strict=False):
        row = []
        for c, d in zip(document_starts, document_starts[1:], strict=False):
            pairs = (queries[a:b, None] * documents[None, c:d]).sum(-1)
            best = [pair.max() for pair in pairs] if d > c else []
            total = sum(best, torch.zeros((), dtype=queries.dtype))
            row.append(total / len(best) if mean and best else total)
        rows.append(torch.stack(row))
    return torch.stack(rows)
