// varlen_attention: each token of a packed batch attends to the tokens of its own sequence.
//
//   y_i = sum over j of softmax_j(scale <q_i, k_j>) v_j,   j in i's sequence and |i - j| <= window
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

namespace moe_fast {

using torch::stable::Tensor;

// query, key and value [T, heads, head_dim] share one dtype of float32, bfloat16 and float16; they
// may be views, read in place, so long as their last stride is 1. cu_seqlens [B + 1] int64: where
// sequences start, from 0 to T; empty ones are allowed. window: how far a token sees to either side.
// Returns y [T, heads, head_dim], contiguous. A forward only: no gradient.
//
// Throws std::runtime_error, RuntimeError in Python, where an argument breaks these rules.
Tensor varlen_attention_cpu(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens, double scale,
                            std::optional<int64_t> window);

}  // namespace moe_fast
