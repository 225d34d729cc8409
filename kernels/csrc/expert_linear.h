// expert_linear: one linear map per expert, y_t = sum_k w[t, k] (W[e] x_t + b[e]).
// moe_fast/ops/expert_linear/ calls these functions and documents the mathematics of both
// directions.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace moe_fast {

using torch::stable::Tensor;

// The rules of expert_mlp.h apply: x [T, I], weight [E, O, I], bias [E, O]. Returns y [T, O].
Tensor expert_linear_cpu(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor top_k_weights,
                         Tensor expert_offsets, Tensor row_to_token, Tensor row_to_slot,
                         Tensor slot_to_row);

// grad_y [T, O]. Returns the gradients of x, weight, bias (0 if it is absent) and top_k_weights.
std::tuple<Tensor, Tensor, Tensor, Tensor> expert_linear_backward_cpu(
    Tensor grad_y, Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor top_k_weights,
    Tensor expert_offsets, Tensor row_to_token, Tensor row_to_slot, Tensor slot_to_row);

}  // namespace moe_fast
