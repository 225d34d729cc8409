// info_nce: the contrastive loss with in-batch negatives, of a batch whose logits fit in memory.
//
// moe_fast/ops/info_nce/ calls these functions and documents the mathematics of both directions.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace moe_fast {

using torch::stable::Tensor;

// All tensors are contiguous and on the CPU. a and b [B, d] and negatives [B * G, d] are float32,
// bfloat16 or float16, possibly different; scale is float32 [], positive; row_ids, domain_ids and
// group_ids [B] and col_ids [N] are int64; weights [B] are float32 and sum to 1.
//
// Returns the loss [], row losses [B], ranks [B] int64, and for the backward pass the sums of rows
// [4, B] and of columns ([4, B] or [4, 0]) and the logits [B, N] in base 2. Products and sums are
// float32.
// Throws std::runtime_error (RuntimeError in Python) if an argument breaks these rules, and for
// embeddings that are not finite or whose products may not be.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> info_nce_cpu(
    Tensor a, Tensor b, std::optional<Tensor> negatives, Tensor scale,
    std::optional<Tensor> row_ids, std::optional<Tensor> col_ids, std::optional<Tensor> domain_ids,
    std::optional<Tensor> group_ids, std::optional<Tensor> weights, double label_smoothing,
    bool symmetric, bool cosine);

// grad_loss [] is float32; the last three tensors are as returned above. Returns the gradients of a, b,
// negatives ([0, d] without any) and scale, in their dtypes.
std::tuple<Tensor, Tensor, Tensor, Tensor> info_nce_backward_cpu(
    Tensor grad_loss, Tensor a, Tensor b, std::optional<Tensor> negatives, Tensor scale,
    std::optional<Tensor> row_ids, std::optional<Tensor> col_ids, std::optional<Tensor> domain_ids,
    std::optional<Tensor> group_ids, std::optional<Tensor> weights, Tensor row_sums,
    Tensor column_sums, Tensor logits, double label_smoothing, bool symmetric, bool cosine);

}  // namespace moe_fast
