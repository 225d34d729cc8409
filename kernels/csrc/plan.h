// plan: the order in which experts see their rows.
//
// A slot is a (token, k) pair, numbered token * K + k. Slots are sorted by expert id, stably: within
// an expert they keep the order of their numbers. An id >= num_experts means "skip": such slots fill
// the rows behind the last expert's, in slot order.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <tuple>

namespace moe_fast {

using torch::stable::Tensor;

// top_k_index: [T, K] int32 or int64, contiguous, ids >= 0. num_experts: E >= 1. Negative ids are
// an error on the CPU; on a GPU, where looking would cost a synchronisation, they are skipped.
//
// Returns int64 tensors, with S = T * K:
//   expert_offsets [E + 1]  the rows of expert e are offsets[e] .. offsets[e + 1]
//   row_to_token   [S]      the token of each row
//   row_to_slot    [S]      the slot of each row
//   slot_to_row    [S]      the row of each slot, -1 where the slot is skipped
//
// Throws std::runtime_error, RuntimeError in Python, where an argument breaks these rules.
std::tuple<Tensor, Tensor, Tensor, Tensor> plan_cpu(Tensor top_k_index, int64_t num_experts);
// Two kernels on the current stream, no synchronisation, no atomics.
std::tuple<Tensor, Tensor, Tensor, Tensor> plan_cuda(Tensor top_k_index, int64_t num_experts);

}  // namespace moe_fast
