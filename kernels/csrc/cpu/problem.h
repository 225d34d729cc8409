// What the operations on rows share on the CPU: the plan, checked; work cut into tasks that
// keep every thread busy; and the weighted sum over a token's slots.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "vector.h"

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

// Throws std::runtime_error unless the tensors are a plan: one that lies in bounds and whose two
// directions agree, so that every slot is written at most once.
PlanView view_plan(const Tensor& top_k_weights, const Tensor& expert_offsets,
                   const Tensor& row_to_token, const Tensor& row_to_slot,
                   const Tensor& slot_to_row, int64_t num_tokens, int64_t num_experts);

// Throws std::runtime_error unless the tensor is contiguous, on the CPU and of this shape.
void check_shape(const char* name, const Tensor& tensor, const std::vector<int64_t>& shape);

// The values of a contiguous int64 tensor [size], or of the routing weights, float32 [num_tokens, K],
// on the CPU.
const int64_t* indices_of(const char* name, const Tensor& tensor, int64_t size);
const float* weights_of(const Tensor& top_k_weights, int64_t num_tokens);

// An empty tensor [sizes] on the CPU, of like's dtype or another. Where it is large and the system
// lends large pages to those who ask, it asks: torch gets fresh memory for each large tensor, and a
// page fault per 4 KiB of the weights' gradients costs up to a fifth of a training step's experts.
Tensor new_output(const Tensor& like, const std::vector<int64_t>& sizes,
                  std::optional<torch::headeronly::ScalarType> dtype = std::nullopt);

// The dtype of x; throws for any but float32, bfloat16, float16.
Dtype dtype_of(const Tensor& x);

// The data of a contiguous tensor of x's dtype on the CPU, of the given shape; null where absent.
const void* data_of(const char* name, const Tensor& tensor, const Tensor& x,
                    std::vector<int64_t> shape);
const void* data_of(const char* name, const std::optional<Tensor>& tensor, const Tensor& x,
                    std::vector<int64_t> shape);

// Rows first .. last of an expert, over begin .. end of the dimension that is cut for more tasks
// than there are blocks of rows: part number `part` of the expert's.
struct Task {
  int64_t expert;
  int64_t first, last;
  int64_t begin, end;
  int64_t part;
};

// How an expert's work is cut.
struct Cut {
  int64_t size;      // of the dimension that can be cut
  int64_t unit;      // where: at multiples of it
  int64_t max_rows;  // per block of rows; 0: rows are never cut
};

struct Tasks {
  std::vector<Task> list;      // the largest first
  std::vector<int64_t> parts;  // [E], 0 for experts without rows
  int64_t max_parts = 1;
};

// A function of the plan's offsets and the number of threads: the same work, cut the same way, sums
// in the same order.
Tasks cut_into_tasks(const PlanView& plan, const Cut& cut);

// Calls work(i) for i < count, or work(task) for each, on all threads; a free thread takes the next.
void run_all(int64_t count, const std::function<void(int64_t)>& work);
void run_tasks(const std::vector<Task>& tasks, const std::function<void(const Task&)>& work);

// Calls work(begin, end) over static chunks of 0 .. n.
void run_chunks(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& work);

// y[t] = sum_k w[t, k] * sum_part rows[part, row of (t, k)]; skipped slots contribute nothing.
// rows: [max_parts, num_slots, dim]. weighted = false: all w are 1.
void combine(const PlanView& plan, const Tasks& tasks, const float* rows, int64_t dim,
             bool weighted, Dtype dtype, void* y);

// out[t, k] = sum_part values[part, row of (t, k)], 0 where the slot is skipped.
void slot_sums(const PlanView& plan, const Tasks& tasks, const float* values, float* out);

// Zeros in the rows [dim] of the tokens whose (only) slot is skipped. K = 1.
void zero_skipped_tokens(const PlanView& plan, int64_t dim, Dtype dtype, void* y);

}  // namespace moe_fast
