// plan: the order in which experts see their rows.
// A token chooses K of E experts. Each choice (token, k) is a slot, numbered token * K + k. Sorted
// by expert id the slots are the rows that the experts compute. The sort is stable: the slots of
// one expert keep the order of their numbers. A slot with an id >= num_experts is skipped; skipped
// slots are the last rows, in slot order.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <tuple>

namespace moe_fast {

using torch::stable::Tensor;

// top_k_index: [T, K] int32 or int64, contiguous, ids >= 0. num_experts: E >= 1. Negative ids are
// an error on the CPU; on a GPU, where a check would need a synchronisation, they are skipped.
//
// Returns int64 tensors, with S = T * K:
//   expert_offsets [E + 1]  the rows of expert e are offsets[e] .. offsets[e + 1]
//   row_to_token   [S]      the token of each row
//   row_to_slot    [S]      the slot of each row
//   slot_to_row    [S]      the row of each slot, -1 where the slot is skipped
// Throws std::runtime_error (RuntimeError in Python) if an argument breaks these rules.
std::tuple<Tensor, Tensor, Tensor, Tensor> plan_cpu(Tensor top_k_index, int64_t num_experts);
// Launches two kernels on the current stream, without synchronisation and atomics.
std::tuple<Tensor, Tensor, Tensor, Tensor> plan_cuda(Tensor top_k_index, int64_t num_experts);

}  // namespace moe_fast
