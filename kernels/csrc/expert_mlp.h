// expert_mlp: applies to every token the MLPs of its K experts, and sums them by routing weight.
//
//   z = W1[e] x + b1[e];  h = act(z), gated act(z1) * z2;  y_t = sum_k w[t, k] (W2[e] h + b2[e])
// moe_fast/ops/expert_mlp/ calls these functions and documents the mathematics of both directions.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>

namespace moe_fast {

using torch::stable::Tensor;

// All tensors are contiguous and on the CPU; x, weights and biases share one dtype of float32,
// bfloat16 and float16. With S = T * K and U = H, gated 2H:
//   x [T, D], up_proj [E, U, D], down_proj [E, D, H], up_proj_bias [E, U], down_proj_bias [E, D],
//   top_k_weights [T, K] float32; the four index tensors of plan.h.
// The forward also takes weights and biases of 16 bits beside an x of float32; both weights stored
// the other way around, [E, D, U] and [E, H, D]; and a gated up_proj [E, 2, H, D], which may then be
// stored as [E, D, H, 2].
//
// Returns y [T, D] and, if `save`, z [S, U] (else [0, U]), with zeros in skipped rows.
//
// Throws std::runtime_error (RuntimeError in Python) if an argument breaks these rules or the index
// tensors are no valid plan.
std::tuple<Tensor, Tensor> expert_mlp_cpu(Tensor x, Tensor up_proj, Tensor down_proj,
                                          std::optional<Tensor> up_proj_bias,
                                          std::optional<Tensor> down_proj_bias,
                                          Tensor top_k_weights, Tensor expert_offsets,
                                          Tensor row_to_token, Tensor row_to_slot,
                                          Tensor slot_to_row, std::string act, bool gated,
                                          bool save);

// grad_y [T, D]; saved: what the forward returned ([0, U]: z is computed again).
//
// Returns the gradients of x, up_proj, down_proj, up_proj_bias, down_proj_bias and top_k_weights;
// those of biases that are absent are 0.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> expert_mlp_backward_cpu(
    Tensor grad_y, Tensor x, Tensor up_proj, Tensor down_proj, std::optional<Tensor> up_proj_bias,
    std::optional<Tensor> down_proj_bias, Tensor top_k_weights, Tensor expert_offsets,
    Tensor row_to_token, Tensor row_to_slot, Tensor slot_to_row, Tensor saved, std::string act,
    bool gated);

}  // namespace moe_fast
