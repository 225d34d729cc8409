#include "tasks.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "packing.h"

namespace moe_fast {
namespace {

int64_t num_threads() { return std::max<int64_t>(torch::stable::get_num_threads(), 1); }

}  // namespace

Tasks cut_into_tasks(const PlanView& plan, const Cut& cut) {
  // Eight tasks per thread: waiting for the last one costs an eighth at most, usually far less.
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
    // Few rows are not divided, because each block of rows reads the expert's weights again. An
    // expert that is only a little larger than the others is not divided either.
    int64_t block = rows;
    if (cut.max_rows > 0) {
      const int64_t usual = std::clamp(2 * share, 2 * kPanel, cut.max_rows);
      const int64_t least = (rows + cut.max_rows - 1) / cut.max_rows;
      const int64_t blocks = std::max((rows + usual / 2) / usual, least);
      block = round_up((rows + blocks - 1) / blocks, kPanel);
    }
    // If there are too few blocks, the other dimension is divided: by the expert's share of the
    // rows, and by the number of experts, because with few rows reading the weights takes the time.
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

constexpr int64_t kChunk = 1 << 15;  // the least number of elements that is worth a thread

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
                     simd().add_scaled(sum, rows + (p * plan.num_slots() + row) * dim, w, dim);
                   }
                 }
                 simd().store(sum, dtype, at(y, dtype, t * dim), dim);
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
