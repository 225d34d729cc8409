#include "problem.h"

#include <torch/headeronly/util/Exception.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstring>
#include <numeric>
#include <stdexcept>

#include "blocks.h"

namespace moe_fast {
namespace {

using torch::headeronly::ScalarType;

std::string list(const std::vector<int64_t>& sizes) {
  std::string text = "[";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}

std::vector<int64_t> sizes_of(const Tensor& tensor) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < tensor.dim(); ++d) sizes.push_back(tensor.size(d));
  return sizes;
}

void check(bool holds, const std::string& message) {
  if (!holds) throw std::runtime_error(message);
}

void check_values(const PlanView& plan) {
  int64_t previous = 0;
  for (int64_t e = 0; e <= plan.num_experts; ++e) {
    const bool ascending = plan.offsets[e] >= previous && plan.offsets[e] <= plan.num_slots();
    check(ascending && (e > 0 || plan.offsets[0] == 0),
          "plan.expert_offsets must ascend from 0 to at most T * K = " +
              std::to_string(plan.num_slots()) + "; got " + std::to_string(plan.offsets[e]) +
              " at " + std::to_string(e) + ".");
    previous = plan.offsets[e];
  }
  for (int64_t row = 0; row < plan.num_rows(); ++row) {
    const int64_t slot = plan.row_to_slot[row];
    const bool agrees = slot >= 0 && slot < plan.num_slots() && plan.slot_to_row[slot] == row &&
                        plan.row_to_token[row] == slot / plan.k;
    check(agrees, "plan.row_to_slot, row_to_token and slot_to_row must agree; they do not at row " +
                      std::to_string(row) + ".");
  }
  for (int64_t slot = 0; slot < plan.num_slots(); ++slot) {
    const int64_t row = plan.slot_to_row[slot];
    check(row >= -1 && row < plan.num_rows(),
          "plan.slot_to_row must be -1 or a row below " + std::to_string(plan.num_rows()) +
              "; got " + std::to_string(row) + " at " + std::to_string(slot) + ".");
  }
}

int64_t num_threads() { return std::max<int64_t>(torch::stable::get_num_threads(), 1); }

}  // namespace

void check_shape(const char* name, const Tensor& tensor, const std::vector<int64_t>& shape) {
  const std::vector<int64_t> sizes = sizes_of(tensor);
  check(sizes == shape,
        std::string(name) + " must have shape " + list(shape) + "; got " + list(sizes) + ".");
  check(tensor.is_cpu(), std::string(name) + " must be on the CPU.");
  check(tensor.is_contiguous(), std::string(name) + " must be contiguous.");
}

const int64_t* indices_of(const char* name, const Tensor& tensor, int64_t size) {
  check_shape(name, tensor, {size});
  check(tensor.scalar_type() == ScalarType::Long, std::string(name) + " must be int64.");
  return tensor.const_data_ptr<int64_t>();
}

const float* weights_of(const Tensor& top_k_weights, int64_t num_tokens) {
  check(top_k_weights.dim() == 2, "top_k_weights must be [T, K].");
  check_shape("top_k_weights", top_k_weights, {num_tokens, top_k_weights.size(1)});
  check(top_k_weights.scalar_type() == ScalarType::Float, "top_k_weights must be float32.");
  return top_k_weights.const_data_ptr<float>();
}

PlanView view_plan(const Tensor& top_k_weights, const Tensor& expert_offsets,
                   const Tensor& row_to_token, const Tensor& row_to_slot,
                   const Tensor& slot_to_row, int64_t num_tokens, int64_t num_experts) {
  const float* weights = weights_of(top_k_weights, num_tokens);
  check(num_experts >= 1, "there must be an expert.");
  const int64_t k = top_k_weights.size(1);
  const int64_t slots = num_tokens * k;
  const PlanView plan{indices_of("plan.expert_offsets", expert_offsets, num_experts + 1),
                      indices_of("plan.row_to_token", row_to_token, slots),
                      indices_of("plan.row_to_slot", row_to_slot, slots),
                      indices_of("plan.slot_to_row", slot_to_row, slots),
                      weights,
                      num_tokens,
                      k,
                      num_experts};
  check_values(plan);
  return plan;
}

Tensor new_output(const Tensor& like, const std::vector<int64_t>& sizes,
                  std::optional<ScalarType> dtype) {
  Tensor out = torch::stable::new_empty(like, sizes, dtype);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t{2} << 20;
  const auto data = reinterpret_cast<uintptr_t>(out.mutable_data_ptr());
  const uintptr_t begin = (data + page - 1) / page * page;
  const auto bytes = static_cast<uintptr_t>(out.numel()) * out.element_size();
  const uintptr_t end = (data + bytes) / page * page;
  // Advice: where it is refused, pages stay small.
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  return out;
}

Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    default: throw std::runtime_error("x must have dtype float32, bfloat16 or float16.");
  }
}

const void* data_of(const char* name, const Tensor& tensor, const Tensor& x,
                    std::vector<int64_t> shape) {
  check_shape(name, tensor, shape);
  check(tensor.scalar_type() == x.scalar_type(), std::string(name) + " must have the dtype of x.");
  return tensor.const_data_ptr();
}

const void* data_of(const char* name, const std::optional<Tensor>& tensor, const Tensor& x,
                    std::vector<int64_t> shape) {
  return tensor.has_value() ? data_of(name, *tensor, x, std::move(shape)) : nullptr;
}

Tasks cut_into_tasks(const PlanView& plan, const Cut& cut) {
  // Eight tasks per thread: the last one to finish costs an eighth at most, mostly far less.
  const int64_t threads = num_threads();
  const int64_t wanted = threads == 1 ? 1 : 8 * threads;
  const int64_t share = std::max<int64_t>((plan.num_rows() + wanted - 1) / wanted, 1);
  Tasks tasks;
  tasks.parts.assign(static_cast<size_t>(plan.num_experts), 0);
  int64_t busy = 0;
  for (int64_t e = 0; e < plan.num_experts; ++e) busy += plan.rows_of(e) > 0;
  for (int64_t e = 0; e < plan.num_experts; ++e) {
    const int64_t rows = plan.rows_of(e);
    if (rows == 0) continue;
    // Few rows are not cut: each block of rows reads the expert's weights again. An expert that is
    // a little larger than the others is not cut for that.
    int64_t block = rows;
    if (cut.max_rows > 0) {
      const int64_t usual = std::clamp(2 * share, 2 * kPanel, cut.max_rows);
      const int64_t least = (rows + cut.max_rows - 1) / cut.max_rows;
      const int64_t blocks = std::max((rows + usual / 2) / usual, least);
      block = round_up((rows + blocks - 1) / blocks, kPanel);
    }
    // The other dimension is cut where there are too few blocks: by the expert's share of the rows,
    // and, few rows meaning that reading the weights is the work, by the number of experts.
    const int64_t units = (cut.size + cut.unit - 1) / cut.unit;
    int64_t parts = 1;
    if (threads > 1 && (cut.max_rows == 0 || rows <= 2 * kPanel)) {
      parts = std::max((rows + share - 1) / share, (wanted + busy - 1) / busy);
      parts = std::clamp<int64_t>(parts, 1, std::min<int64_t>(units, 8));
    }
    tasks.parts[static_cast<size_t>(e)] = parts;
    tasks.max_parts = std::max(tasks.max_parts, parts);
    for (int64_t r = 0; r < rows; r += block) {
      for (int64_t p = 0; p < parts; ++p) {
        const int64_t begin = p * units / parts * cut.unit;
        const int64_t end = std::min((p + 1) * units / parts * cut.unit, cut.size);
        tasks.list.push_back({e, plan.offsets[e] + r, plan.offsets[e] + std::min(r + block, rows),
                              begin, end, p});
      }
    }
  }
  const auto cost = [](const Task& t) { return (t.last - t.first + kPanel) * (t.end - t.begin); };
  std::stable_sort(tasks.list.begin(), tasks.list.end(),
                   [&](const Task& a, const Task& b) { return cost(a) > cost(b); });
  return tasks;
}

void run_all(int64_t count, const std::function<void(int64_t)>& work) {
  std::atomic<int64_t> next{0};
  const auto drain = [&](int64_t, int64_t) {
    for (int64_t i = next++; i < count; i = next++) work(i);
  };
  const int64_t threads = std::min(num_threads(), count);
  if (threads <= 1) {
    drain(0, 1);
  } else {
    torch::stable::parallel_for(0, threads, 1, drain);
  }
}

void run_tasks(const std::vector<Task>& tasks, const std::function<void(const Task&)>& work) {
  run_all(static_cast<int64_t>(tasks.size()),
          [&](int64_t i) { work(tasks[static_cast<size_t>(i)]); });
}

void run_chunks(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& work) {
  if (n == 0) return;
  if (n <= grain || num_threads() == 1) {
    work(0, n);
  } else {
    torch::stable::parallel_for(0, n, grain, work);
  }
}

namespace {

int64_t parts_of(const PlanView& plan, const Tasks& tasks, int64_t row) {
  if (tasks.max_parts == 1) return 1;
  const int64_t* end = plan.offsets + plan.num_experts + 1;
  const int64_t expert = std::upper_bound(plan.offsets, end, row) - plan.offsets - 1;
  return tasks.parts[static_cast<size_t>(expert)];
}

constexpr int64_t kChunk = 1 << 15;  // elements that are worth a thread

}  // namespace

void combine(const PlanView& plan, const Tasks& tasks, const float* rows, int64_t dim,
             bool weighted, Dtype dtype, void* y) {
  run_chunks(plan.num_tokens, kChunk / std::max<int64_t>(dim * plan.k, 1) + 1,
             [&](int64_t begin, int64_t end) {
               thread_local Buffer buffer;
               float* sum = buffer.get<float>(dim);
               for (int64_t t = begin; t < end; ++t) {
                 std::memset(sum, 0, static_cast<size_t>(dim) * sizeof(float));
                 for (int64_t slot = t * plan.k; slot < (t + 1) * plan.k; ++slot) {
                   const int64_t row = plan.slot_to_row[slot];
                   if (row < 0) continue;
                   const float w = weighted ? plan.weights[slot] : 1.0f;
                   const int64_t parts = parts_of(plan, tasks, row);
                   for (int64_t p = 0; p < parts; ++p) {
                     vector().add_scaled(sum, rows + (p * plan.num_slots() + row) * dim, w, dim);
                   }
                 }
                 vector().store(sum, dtype, at(y, dtype, t * dim), dim);
               }
             });
}

void slot_sums(const PlanView& plan, const Tasks& tasks, const float* values, float* out) {
  for (int64_t slot = 0; slot < plan.num_slots(); ++slot) {
    const int64_t row = plan.slot_to_row[slot];
    out[slot] = 0.0f;
    if (row < 0) continue;
    const int64_t parts = parts_of(plan, tasks, row);
    for (int64_t p = 0; p < parts; ++p) out[slot] += values[p * plan.num_slots() + row];
  }
}

void zero_skipped_tokens(const PlanView& plan, int64_t dim, Dtype dtype, void* y) {
  for (int64_t t = 0; t < plan.num_tokens; ++t) {
    if (plan.slot_to_row[t] < 0) {
      std::memset(at(y, dtype, t * dim), 0, static_cast<size_t>(dim * bytes_of(dtype)));
    }
  }
}

}  // namespace moe_fast
