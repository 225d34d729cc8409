// gather_rows and combine_rows: from tokens to rows sorted by expert, and back.
//   gather_rows   rows[r] = x[row_to_token[r]], 0 in the skipped rows from expert_offsets[E] on
//   combine_rows  y[t] = sum_k w[t, k] rows[slot_to_row[t, k]], in slot order; skipped slots add 0
//
// The gradient of gather_rows is combine_rows with weights of 1, and
//
//   combine_rows_backward  grad_rows[r] = w[slot of r] grad_y[token of r], 0 in skipped rows;
//                          grad_w[t, k] = <rows[slot_to_row[t, k]], grad_y[t]>, 0 if skipped
// Sums and products are computed in float32, and results are rounded once.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <tuple>

namespace moe_fast {

using torch::stable::Tensor;

// All tensors are contiguous and on one device. x [T, D], rows [S, D] and grad_y [T, D] share one
// dtype of float32, bfloat16 and float16; top_k_weights [T, K] is float32, S = T * K; the index
// tensors are those of plan.h.
// All throw std::runtime_error (RuntimeError in Python) if an argument breaks these rules. Values
// of index tensors are checked on the CPU; on a GPU an index out of bounds counts as "skipped".
Tensor gather_rows_cpu(Tensor x, Tensor expert_offsets, Tensor row_to_token);
Tensor gather_rows_cuda(Tensor x, Tensor expert_offsets, Tensor row_to_token);

Tensor combine_rows_cpu(Tensor rows, Tensor top_k_weights, Tensor slot_to_row);
Tensor combine_rows_cuda(Tensor rows, Tensor top_k_weights, Tensor slot_to_row);

std::tuple<Tensor, Tensor> combine_rows_backward_cpu(Tensor grad_y, Tensor rows,
                                                     Tensor top_k_weights, Tensor expert_offsets,
                                                     Tensor slot_to_row);
std::tuple<Tensor, Tensor> combine_rows_backward_cuda(Tensor grad_y, Tensor rows,
                                                      Tensor top_k_weights, Tensor expert_offsets,
                                                      Tensor slot_to_row);

}  // namespace moe_fast
