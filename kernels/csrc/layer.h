// The parts of an encoder layer around the MLP, for inference on packed rows. There is no backward.
//
// The sum that runs through the layers (the residual stream) is read and written in float32 where
// asked for, while products are computed in the dtype of the rows.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace moe_fast {

using torch::stable::Tensor;

// out = LayerNorm(y + residual) = weight (s - mean(s)) / sqrt(var(s) + eps) + bias,  s = y + residual
//
// y [T, D] is float32, bfloat16 or float16; residual [T, D] is of y's dtype or float32; weight [D]
// and bias [D] (or none, for zeros) are of any of these dtypes. Returns out in y's dtype, and in
// float32, which is empty [0, D] unless keep_exact.
//
// Throws std::runtime_error (RuntimeError in Python) if an argument breaks these rules.
std::tuple<Tensor, Tensor> add_norm_cpu(Tensor y, Tensor residual, Tensor weight,
                                        std::optional<Tensor> bias, double eps, bool keep_exact);

// The attention of a layer with its projections, then the same sum and norm:
//
//   q, k, v = x Wq^T + bq, x Wk^T + bk, x Wv^T + bv
//   q, k    = rotated by cos and sin, if these are given
//   out     = LayerNorm(varlen_attention(q, k, v) Wo^T + bo + residual)
//
// x [T, D]; q_weight, k_weight and v_weight [N, D], out_weight [D, N], their biases [N] and [D] (or
// none), all of x's dtype; N = heads * head_dim. residual, norm_weight, norm_bias and the results
// as for add_norm. cos and sin [T, head_dim] are of x's dtype or float32: element i of a head's row
// becomes r_i cos_i - r_{i+h} sin_i in its first half of length h, r_i cos_i + r_{i-h} sin_i in its
// second. cu_seqlens, scale and window as for varlen_attention.
//
// Weights are read as they are in each call: nothing is kept that could become stale.
std::tuple<Tensor, Tensor> attention_block_cpu(
    Tensor x, Tensor residual, Tensor q_weight, Tensor k_weight, Tensor v_weight, Tensor out_weight,
    std::optional<Tensor> q_bias, std::optional<Tensor> k_bias, std::optional<Tensor> v_bias,
    std::optional<Tensor> out_bias, Tensor norm_weight, std::optional<Tensor> norm_bias,
    Tensor cu_seqlens, std::optional<Tensor> cos, std::optional<Tensor> sin, int64_t heads,
    double scale, std::optional<int64_t> window, double eps, bool keep_exact);

}  // namespace moe_fast
