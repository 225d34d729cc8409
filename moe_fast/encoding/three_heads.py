"""ThreeHeads: lexical and multi-vector outputs beside a pooled vector, as in BGE-M3.

From the last hidden states h_t [D] of a text's real tokens, t = 0 the first token:

    lexical        z_t = v . h_t + c;  the weight of vocabulary id i is max over t of relu(z_t)
                   where token t has id i; special tokens have none
    multi-vector   m_t = (M h_t + d) / |M h_t + d|,  t >= 1

The dense vector is that of the pipeline's own pooling. Source: Chen et al., arXiv 2402.03216, and
FlagEmbedding, whose names of the layers (``sparse_linear``, ``colbert_linear``) are kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from sentence_transformers.base.modules import Module
from torch import Tensor, nn

from moe_fast.ops.checks import check_count

OUTPUTS = ("dense", "sparse", "multi_vector")
# What tokenizers call the tokens that stand for no word of the text.
_SPECIAL = ("cls_token_id", "sep_token_id", "bos_token_id", "eos_token_id", "pad_token_id")


class ThreeHeads(Module):
    """Adds a lexical weight and a vector for each token to the features of a batch.

    It reads ``token_embeddings`` [B, L, D], ``input_ids`` [B, L] and ``attention_mask`` [B, L]
    (packed: [1, T, D] and [1, T] with ``cu_seq_lens_q``), and writes

    - ``token_logits`` [B, L], z; a token's weight is its positive part;
    - ``lexical_mask`` [B, L] bool, false for special tokens and padding;
    - ``multi_vectors`` [B, L, D'], normalised, in the dtype of the hidden states;
    - ``multi_vector_mask`` [B, L] bool, false for each text's first token and for padding.

    Args:
        hidden_size: D.
        multi_vector_dim: D'.
        excluded_token_ids: special tokens, which get no lexical weight. A model adds those of its
            tokenizer: CLS, SEP, BOS, EOS, PAD and UNK.
        seed: of the multi-vector layer's initialisation; the global random state is not changed.

    A new lexical layer gives every token the weight 0.1. A new multi-vector layer is the identity
    if D' = D, else a random matrix with orthonormal rows (or columns).

    Raises:
        TypeError, ValueError: a size is not an int, or below 1.
    """

    forward_kwargs = {"outputs"}

    def __init__(
        self,
        hidden_size: int,
        multi_vector_dim: int,
        *,
        excluded_token_ids: Iterable[int] = (),
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_count("hidden_size", hidden_size)
        check_count("multi_vector_dim", multi_vector_dim)
        self.excluded_token_ids = sorted(set(excluded_token_ids))
        self.sparse_linear = _empty_linear(hidden_size, 1)
        self.colbert_linear = _empty_linear(hidden_size, multi_vector_dim)
        self._initialise(seed)

    @torch.no_grad()
    def _initialise(self, seed: int) -> None:
        # Equal weights make the score the number of shared tokens, times 0.01: about as large as
        # the other scores, and far from 0, where a token would have no gradient.
        self.sparse_linear.weight.zero_()
        self.sparse_linear.bias.fill_(0.1)
        matrix = self.colbert_linear.weight
        if matrix.shape[0] == matrix.shape[1]:
            nn.init.eye_(matrix)
        else:
            nn.init.orthogonal_(matrix, generator=torch.Generator().manual_seed(seed))
        self.colbert_linear.bias.zero_()

    @property
    def hidden_size(self) -> int:
        """D, the size of the hidden states."""
        return self.colbert_linear.in_features

    @property
    def multi_vector_dim(self) -> int:
        """D', the size of a token's vector."""
        return self.colbert_linear.out_features

    def on_model_ready(self, model: Any) -> None:
        """Exclude the special tokens of the model's tokenizer from the lexical output."""
        tokenizer = model.tokenizer
        ids = [getattr(tokenizer, name, None) for name in (*_SPECIAL, "unk_token_id")]
        self.excluded_token_ids = sorted(
            {*self.excluded_token_ids, *(i for i in ids if i is not None)}
        )

    def forward(
        self, features: dict[str, Any], outputs: Iterable[str] = OUTPUTS, **_: Any
    ) -> dict[str, Any]:
        """Add the outputs of the heads that ``outputs`` names; see the class."""
        hidden = features["token_embeddings"]
        real = _real_tokens(features, hidden)
        if "sparse" in outputs:
            logits = self.sparse_linear(hidden.to(self.sparse_linear.weight.dtype))
            features["token_logits"] = logits.squeeze(-1)
            ids = features["input_ids"]
            excluded = torch.tensor(self.excluded_token_ids, dtype=ids.dtype, device=ids.device)
            features["lexical_mask"] = real & ~torch.isin(ids, excluded)
        if "multi_vector" in outputs:
            vectors = self.colbert_linear(hidden.to(self.colbert_linear.weight.dtype))
            features["multi_vectors"] = F.normalize(vectors, dim=-1)
            features["multi_vector_mask"] = real & ~_first_tokens(features, real)
        return features

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Write nothing: the model that holds the heads saves them, beside its own files."""


def _empty_linear(in_features: int, out_features: int) -> nn.Linear:
    return nn.utils.skip_init(nn.Linear, in_features, out_features)


def _real_tokens(features: dict[str, Any], hidden: Tensor) -> Tensor:
    """Where tokens are real, [B, L] bool; packed batches hold no others."""
    mask = features.get("attention_mask")
    if mask is None or "cu_seq_lens_q" in features:
        return torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    return mask.to(torch.bool)


def _first_tokens(features: dict[str, Any], real: Tensor) -> Tensor:
    """Where each text's first real token is, [B, L] bool."""
    starts = features.get("cu_seq_lens_q")
    if starts is None:  # padding may be on the left
        return real & (real.cumsum(1) == 1)
    first = torch.zeros_like(real)
    first[0, starts[:-1].long()] = True
    return first
