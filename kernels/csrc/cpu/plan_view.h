// The plan and the other tensors that operations on rows read on the CPU, checked before use.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "simd.h"

namespace moe_fast {

using torch::stable::Tensor;

// The index tensors of plan.h, with the routing weights [T, K].
struct PlanView {
  const int64_t* offsets;
  const int64_t* row_to_token;
  const int64_t* row_to_slot;
  const int64_t* slot_to_row;
  const float* weights;
  int64_t num_tokens;
  int64_t k;
  int64_t num_experts;

  int64_t num_slots() const { return num_tokens * k; }
  int64_t num_rows() const { return offsets[num_experts]; }
  int64_t rows_of(int64_t expert) const { return offsets[expert + 1] - offsets[expert]; }
  float weight(int64_t row) const { return weights[row_to_slot[row]]; }
};

// Throws std::runtime_error unless the tensors are a valid plan: all indices are in bounds, and the
// maps from rows to slots and from slots to rows agree, so that every slot is written at most once.
PlanView view_plan(const Tensor& top_k_weights, const Tensor& expert_offsets,
                   const Tensor& row_to_token, const Tensor& row_to_slot,
                   const Tensor& slot_to_row, int64_t num_tokens, int64_t num_experts);

// Throws std::runtime_error unless the tensor is on the CPU, of this shape and, if asked, contiguous.
void check_shape(const char* name, const Tensor& tensor, const std::vector<int64_t>& shape,
                 bool contiguous = true);

// The values of a contiguous int64 tensor [size], or of the routing weights, float32 [num_tokens, K],
// on the CPU.
const int64_t* indices_of(const char* name, const Tensor& tensor, int64_t size);
const float* weights_of(const Tensor& top_k_weights, int64_t num_tokens);

// An uninitialised tensor [sizes] on the CPU, of like's dtype or another. torch's own new_empty looks
// its operation up by name in every call, which costs microseconds.
Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& sizes,
                  std::optional<torch::headeronly::ScalarType> dtype = std::nullopt);

// The same for the largest outputs of an operation. For a large tensor it
// asks the system for large pages, where these are available: torch gets new memory for each large
// tensor, and a page fault per 4 KiB of the weights' gradients takes up to a fifth of the time of
// the experts in a training step.
Tensor new_output(const Tensor& like, const std::vector<int64_t>& sizes,
                  std::optional<torch::headeronly::ScalarType> dtype = std::nullopt);

// The dtype of x; throws for any but float32, bfloat16, float16.
Dtype dtype_of(const Tensor& x);

// The data of a tensor of x's dtype on the CPU, of the given shape and, if asked, contiguous; null if
// absent.
const void* data_of(const char* name, const Tensor& tensor, const Tensor& x,
                    std::vector<int64_t> shape, bool contiguous = true);
const void* data_of(const char* name, const std::optional<Tensor>& tensor, const Tensor& x,
                    std::vector<int64_t> shape);

}  // namespace moe_fast
