// route: chooses the experts of each token, and their weights.
//
// moe_fast/ops/route/ calls these functions and documents the modes, the weight modes and the
// mathematics of both directions.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

namespace moe_fast {

using torch::stable::Tensor;

// All tensors are contiguous and on the CPU. x [T, D] and router_weight [E, D] are float32, bfloat16
// or float16, possibly different; token_mask [T] is bool; starts [B + 1] is int64, rises from 0 to
// T and is needed by the sentence modes. k is in 1 .. E; mode "dense" ignores it.
//
// Returns top_k_weights [T, K] and router_logits [T, E], float32, top_k_index [T, K] and
// tokens_per_expert [E], int64. Products and sums are float32.
// Throws std::runtime_error (RuntimeError in Python) if an argument breaks these rules, and for
// logits that are not finite.
std::tuple<Tensor, Tensor, Tensor, Tensor> route_cpu(Tensor x, Tensor router_weight, int64_t k,
                                                     std::string mode, std::string weight_mode,
                                                     std::optional<Tensor> token_mask,
                                                     std::optional<Tensor> starts);

// grad_weights [T, K] and grad_logits [T, E], float32; logits as returned above. Returns the gradients
// of x and router_weight, in their dtypes.
std::tuple<Tensor, Tensor> route_backward_cpu(Tensor grad_weights, Tensor grad_logits, Tensor x,
                                              Tensor router_weight, Tensor logits, int64_t k,
                                              std::string mode, std::string weight_mode,
                                              std::optional<Tensor> token_mask,
                                              std::optional<Tensor> starts);

}  // namespace moe_fast
