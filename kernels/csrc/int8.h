// Linear maps and expert MLPs whose products are of 8-bit integers, for inference on the CPU.
//
//   q = round(x / s) + z per row of x, y = s * scale * (W q - z * sums) + bias
// moe_fast/ops/int8_linear/ and moe_fast/ops/int8_expert_mlp/ call these functions and document the
// mathematics; moe_fast/ops/int8_weight.py packs the weights.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

namespace moe_fast {

using torch::stable::Tensor;

// A weight [N, K] consists of `values`, int8 [N / 16, K / 4, 16, 4] (both rounded up, K to a multiple of
// 64, with zeros), `scale`, float32 [N], and `sums`, int32 [N]: the sums of its rows. Biases, norms and
// ranges are float32. All tensors are contiguous and on the CPU.
//
// `range` [2] holds the least and the greatest value of x, if they are fixed; otherwise each row has its
// own. With a residual, in the dtype and shape of the result, it is added, and LayerNorm is applied.
//
// Throws std::runtime_error (RuntimeError in Python) if an argument breaks these rules.

// x [T, K] float32, bfloat16 or float16 -> [T, N] in `dtype`, "float32", "bfloat16" or "float16".
Tensor int8_linear_cpu(Tensor x, Tensor values, Tensor scale, Tensor sums,
                       std::optional<Tensor> bias, std::optional<Tensor> range,
                       std::optional<Tensor> residual, std::optional<Tensor> norm_weight,
                       std::optional<Tensor> norm_bias, double eps, std::string dtype);

// The same per expert, weighted and summed; the weights have a leading dimension E. Returns [T, N] in
// x's dtype.
Tensor int8_expert_linear_cpu(Tensor x, Tensor values, Tensor scale, Tensor sums,
                              std::optional<Tensor> bias, std::optional<Tensor> range,
                              Tensor top_k_weights, Tensor expert_offsets, Tensor row_to_token,
                              Tensor row_to_slot, Tensor slot_to_row);

// Expert MLPs, as in expert_mlp.h. x and the result are [T, D].
Tensor int8_expert_mlp_cpu(Tensor x, Tensor up_values, Tensor up_scale, Tensor up_sums,
                           std::optional<Tensor> up_bias, std::optional<Tensor> up_range,
                           Tensor down_values, Tensor down_scale, Tensor down_sums,
                           std::optional<Tensor> down_bias, std::optional<Tensor> down_range,
                           Tensor top_k_weights, Tensor expert_offsets, Tensor row_to_token,
                           Tensor row_to_slot, Tensor slot_to_row, std::optional<Tensor> residual,
                           std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias,
                           double eps, std::string act, bool gated);

}  // namespace moe_fast
