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
// may be views with a last stride of 1, which are read in place. cu_seqlens [B + 1] int64: the
// starts of the sequences, from 0 to T; sequences may be empty. window: the largest distance
// |i - j|, or none for no limit. Returns y [T, heads, head_dim], contiguous. There is no backward.
//
// Throws std::runtime_error (RuntimeError in Python) if an argument breaks these rules.
Tensor varlen_attention_cpu(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens, double scale,
                            std::optional<int64_t> window);

}  // namespace moe_fast
