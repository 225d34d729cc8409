// Divides the work on a plan's rows into tasks that keep every thread busy, and adds up the results
// of the tasks per token.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "plan_view.h"
#include "simd.h"

namespace moe_fast {

// Rows first .. last of an expert, and begin .. end of the dimension that is divided into parts if
// there would be fewer blocks of rows than tasks are needed; `part` is the number of this part.
struct Task {
  int64_t expert;
  int64_t first, last;
  int64_t begin, end;
  int64_t part;
};

// How an expert's work may be divided.
struct Cut {
  int64_t size;      // of the dimension that can be divided
  int64_t unit;      // parts are multiples of it
  int64_t max_rows;  // per block of rows; 0: rows are never divided
};

struct Tasks {
  std::vector<Task> list;      // the largest first
  std::vector<int64_t> parts;  // [E], 0 for experts without rows
  int64_t max_parts = 1;
};

// The tasks depend only on the plan's offsets and the number of threads: the same work is divided
// in the same way, and sums have the same order.
Tasks cut_into_tasks(const PlanView& plan, const Cut& cut);

// Calls work(i) for i < count, or work(task) for each task, on all threads; a free thread takes the
// next.
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

// Writes zeros to the rows [dim] of y of the tokens whose only slot is skipped (K = 1).
void zero_skipped_tokens(const PlanView& plan, int64_t dim, Dtype dtype, void* y);

}  // namespace moe_fast
