"""Packing: a padded batch [B, L] runs through the encoder as its real tokens alone, [1, T].

Outputs have the shape of the inputs again, zero for padding. A caller may pack, too: ``input_ids``
[1, T] with ``cu_seq_lens_q``; then outputs stay packed, but the pooler's are [B, D].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_fast.architectures import setting
from moe_fast.compat import attention_of
from moe_fast.layers import ATTENTION
from moe_fast.layers.attention import pick, real_tokens, scatter_rows
from moe_fast.layers.routing_info import token_mask_of
from moe_fast.ops.checks import (
    INTEGER_DTYPES,
    check_dtype,
    check_shape,
    check_starts,
    checks_values,
)


@dataclass(frozen=True)
class Packing:
    """Where the T tokens of a packed batch [1, T] are, and where they came from.

    Attributes:
        cu_seqlens: [B + 1] int32, where sequences start.
        max_length: of the longest sequence.
        shape: (B, L) of the padded batch; ``None`` where the caller packed it.
        places: [T] int64, the tokens' places in [B * L]; ``None``: all are real.
        first_columns: [B] int64, where each padded sequence's first real token is.
    """

    cu_seqlens: Tensor
    max_length: int
    shape: tuple[int, int] | None = None
    places: Tensor | None = None
    first_columns: Tensor | None = None

    @classmethod
    def of_padded(cls, mask: Tensor | None, like: Tensor, contiguous: bool) -> Packing:
        """Pack a batch of ``like``'s shape [B, L, ...], real where ``mask`` [B, L] is true.

        Args:
            contiguous: whether each sequence must lie in one piece, as windows over positions need.

        Raises:
            ValueError: for a batch without real tokens, or with padding inside a sequence.
        """
        batch, length = like.shape[:2]
        mask = None if mask is None else mask.to(torch.bool)
        places, starts = real_tokens(mask, batch, length, like.device)
        if places is None:
            return cls(starts, length, (batch, length))
        assert mask is not None
        if places.numel() == 0:
            raise ValueError("attention_mask must mark at least one token as real; got all zeros.")
        if contiguous and checks_values(mask.device):
            _check_contiguous(mask)
        longest = int(starts.diff().max())
        return cls(starts, longest, (batch, length), places, mask.to(torch.uint8).argmax(1))

    @classmethod
    def of_packed(cls, like: Tensor, cu_seqlens: Tensor, max_length: int | None) -> Packing:
        """What a caller packed: ``like`` [1, T, ...] with the starts of its sequences.

        Raises:
            ValueError, TypeError: for shapes that do not fit, and, where values are checked, for
                starts that do not rise from 0 to T, empty sequences, and a ``max_length`` that is
                too small.
        """
        if like.shape[0] != 1:
            raise ValueError(
                f"a packed batch must have shape [1, T]; got {list(like.shape[:2])} with "
                "cu_seq_lens_q."
            )
        check_shape("cu_seq_lens_q", cu_seqlens, (None,), "[B + 1]")
        check_dtype("cu_seq_lens_q", cu_seqlens, INTEGER_DTYPES)
        if cu_seqlens.shape[0] < 2:
            raise ValueError(
                f"cu_seq_lens_q must hold 0 and T at least; got {cu_seqlens.tolist()}."
            )
        if max_length is not None and not checks_values(like.device):
            return cls(cu_seqlens, max_length)
        check_starts(cu_seqlens, like.shape[1])
        lengths = cu_seqlens.diff()
        if not lengths.all():
            raise ValueError(
                f"cu_seq_lens_q must hold no empty sequence; got {cu_seqlens.tolist()}."
            )
        longest = int(lengths.max())
        if max_length is not None and max_length < longest:
            raise ValueError(
                f"max_length_q must be at least the longest sequence's {longest}; got {max_length}."
            )
        return cls(cu_seqlens, longest)

    @property
    def attention_kwargs(self) -> dict[str, Any]:
        """What attention functions of packed batches take, by transformers' names."""
        return {
            "cu_seq_lens_q": self.cu_seqlens,
            "cu_seq_lens_k": self.cu_seqlens,
            "max_length_q": self.max_length,
            "max_length_k": self.max_length,
        }

    def positions(self) -> Tensor:
        """[1, T]: 0, 1, 2 ... in each sequence of a batch that the caller packed."""
        starts = self.cu_seqlens.to(torch.int64)
        counts = starts.diff()
        tokens = torch.arange(int(starts[-1]), device=starts.device)
        return (tokens - starts[:-1].repeat_interleave(counts))[None]

    def pack(self, x: Tensor) -> Tensor:
        """[B, L, ...] or [1, L, ...] to [1, T, ...]; a caller's packed tensor as it is."""
        if self.shape is None:
            return x
        return pick(x.expand(*self.shape, *x.shape[2:]).flatten(0, 1), self.places)[None]

    def unpack(self, x: Tensor) -> Tensor:
        """[1, T, ...] to [B, L, ...], zero for padding."""
        return x if self.shape is None else self.unpack_rows(x[0]).unflatten(0, self.shape)

    def unpack_rows(self, x: Tensor) -> Tensor:
        """[T, ...] to [B * L, ...], zero for padding."""
        return (
            x if self.shape is None else scatter_rows(x, self.places, self.shape[0] * self.shape[1])
        )

    def first_tokens(self, output: Tensor) -> Tensor:
        """[B, 1, D]: each sequence's first real token of :meth:`unpack`'s output."""
        if self.shape is None:
            return output[0, self.cu_seqlens[:-1].long()][:, None]
        if self.first_columns is None:
            return output[:, :1]
        rows = torch.arange(self.shape[0], device=output.device)
        return output[rows, self.first_columns][:, None]


def _check_contiguous(mask: Tensor) -> None:
    """Raise ``ValueError`` where a row's real tokens do not lie side by side."""
    turns = mask[:, :1].long() + (mask[:, 1:] & ~mask[:, :-1]).sum(1, keepdim=True)
    broken = (turns[:, 0] > 1).nonzero()
    if broken.numel():
        raise ValueError(
            "attention_mask must have no padding inside a text where attention has a window; got "
            f"some in row {int(broken[0])}."
        )


# --- a model's inputs and outputs ----------------------------------------------------------------


def packing_of(
    model: Any, like: Tensor, attention_mask: Any, kwargs: dict[str, Any]
) -> Packing | None:
    """How a batch is packed; ``None``: it is computed as it is, padding included.

    Args:
        like: input ids [B, L] or embeddings [B, L, D], for shape and device only.
        attention_mask, kwargs: the forward's.

    Raises:
        ValueError: for a packed batch where attention would not keep its texts apart, and for what
            packing cannot do.
    """
    config, architecture = model.config, model.architecture
    attention = attention_of(config)
    cu_seqlens = kwargs.get("cu_seq_lens_q")
    if architecture.not_packed and (attention == ATTENTION or cu_seqlens is not None):
        raise ValueError(
            f"{architecture.name}'s texts cannot be packed (attn_implementation={ATTENTION!r}, or "
            f"cu_seq_lens_q): {architecture.not_packed}. Give padded batches, and another "
            "attention: 'sdpa', or 'eager'."
        )
    if cu_seqlens is not None:
        if attention != ATTENTION and not (attention or "").startswith("flash_attention"):
            raise ValueError(
                f"cu_seq_lens_q needs attn_implementation={ATTENTION!r} or FlashAttention's; with "
                f"{attention!r} a packed batch's texts would see each other."
            )
        if attention_mask is not None:
            raise ValueError("attention_mask must be None beside cu_seq_lens_q; got a value.")
        return Packing.of_packed(like, cu_seqlens, kwargs.get("max_length_q"))
    if attention != ATTENTION:
        return None
    if kwargs.get("output_attentions", config.output_attentions):
        raise ValueError(
            f"output_attentions must be False with attn_implementation={ATTENTION!r}, which makes "
            "no attention weights; got True. Use 'eager'."
        )
    if attention_mask is not None and token_mask_of(attention_mask) is None:
        return None  # a mask of pairs of tokens, which packing would lose
    return Packing.of_padded(attention_mask, like, contiguous=_has_windows(config))


def _has_windows(config: Any) -> bool:
    return "sliding_attention" in getattr(config, "layer_types", ())


def pack_inputs(
    model: PreTrainedModel,
    packing: Packing,
    inputs: dict[str, Any],
    expert_ids: Tensor | None,
) -> Tensor | None:
    """Replace the dense model's inputs, in place, by those of the real tokens.

    Returns:
        ``expert_ids`` [B] as they are, or [B, L] as [T].
    """
    inputs["position_ids"] = _positions(model, packing, inputs)
    inputs["attention_mask"] = None
    inputs.update({name: packing.pack(x) for name, x in inputs.items() if x is not None})
    if _has_windows(model.config):
        # Our attention reads the window; a mask of windows would be T x T.
        inputs["attention_mask"] = {"full_attention": None, "sliding_attention": None}
    if expert_ids is None or expert_ids.dim() != 2:
        return expert_ids
    check_shape("expert_ids", expert_ids, packing.shape or (1, None), "[B] or [B, L]")
    return packing.pack(expert_ids)[0]


def _positions(model: PreTrainedModel, packing: Packing, inputs: dict[str, Any]) -> Tensor:
    """Position ids as the dense model numbers a padded batch, [B, L] or [1, L]; [1, T]."""
    if inputs["position_ids"] is not None:
        return inputs["position_ids"]
    input_ids, embeds = inputs["input_ids"], inputs["inputs_embeds"]
    padding = setting(model.config, model.architecture.padding_id)
    first = 0 if padding is None else padding + 1
    if packing.shape is None:
        return packing.positions() + first
    if padding is not None and input_ids is not None:
        real = input_ids != padding  # tokens with the padding's id are not counted
        return real.cumsum(1) * real + padding
    device = (input_ids if input_ids is not None else embeds).device
    return torch.arange(first, first + packing.shape[1], device=device)[None]


def unpack_outputs(
    model: PreTrainedModel, packing: Packing, output: Any, *, heads: int = 1
) -> None:
    """Give outputs, in place, the shape of what came in; the pooler reads first tokens.

    Args:
        heads: how many rows of router logits a token has.
    """
    output.last_hidden_state = packing.unpack(output.last_hidden_state)
    if output.hidden_states is not None:
        output.hidden_states = tuple(packing.unpack(x) for x in output.hidden_states)
    if output.router_logits is not None:
        output.router_logits = tuple(
            packing.unpack_rows(x.unflatten(0, (-1, heads))).flatten(0, 1)
            for x in output.router_logits
        )
    if getattr(model, "pooler", None) is not None:
        # What the model pooled was the first text's alone.
        output.pooler_output = model.pooler(packing.first_tokens(output.last_hidden_state))
