// A stable counting sort in three passes over static chunks of tokens:
//   1. count:   each chunk counts its slots per bucket (E experts, then the skipped ones);
//   2. prefix:  a running sum in (bucket, chunk) order turns counts into first rows;
//   3. scatter: each chunk places its slots, in order, from its own first rows on.
// Chunks share no data in passes 1 and 3, and the order (bucket, chunk, slot) makes the sort stable
// for any number of chunks. A small input is one chunk and is sorted on the calling thread.
#include "../plan.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "../buckets.h"
#include "plan_view.h"

namespace moe_fast {
namespace {

using torch::headeronly::ScalarType;

// Below this many slots per chunk, waking a thread costs more than it saves.
constexpr int64_t kMinSlotsPerChunk = 16384;
constexpr int64_t kCacheLine = 64 / sizeof(int64_t);

template <typename Id>
struct Problem {
  const Id* top_k_index;  // [num_tokens, k]
  int64_t num_tokens;
  int64_t k;
  int64_t num_experts;

  int64_t num_slots() const { return num_tokens * k; }
  // Negative ids are found by validate() before anything is computed from the buckets.
  int64_t bucket(int64_t slot) const { return bucket_of(top_k_index[slot], num_experts); }
};

// One row of counters per chunk: E experts, the skipped slots, and whether there is a negative id.
// There is a cache line between rows, so that threads do not write to the same line.
class Histogram {
 public:
  Histogram(int64_t num_chunks, int64_t num_experts)
      : stride_((num_experts + 2 + kCacheLine - 1) / kCacheLine * kCacheLine + kCacheLine),
        counts_(static_cast<size_t>(num_chunks * stride_)) {}
  int64_t* chunk(int64_t c) { return counts_.data() + c * stride_; }

 private:
  int64_t stride_;
  std::vector<int64_t> counts_;
};

template <typename Id>
int64_t choose_num_chunks(const Problem<Id>& p) {
  const int64_t threads = torch::stable::get_num_threads();
  // With many experts the counters would take more time than the slots; larger chunks prevent that.
  const int64_t slots_per_chunk = std::max(kMinSlotsPerChunk, 4 * p.num_experts);
  return std::clamp<int64_t>(p.num_slots() / slots_per_chunk, 1, std::max<int64_t>(threads, 1));
}

// Calls work(chunk, first token, last token + 1) for every chunk, one thread per chunk at most.
template <typename Work>
void for_each_chunk(int64_t num_chunks, int64_t num_tokens, const Work& work) {
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      work(c, c * num_tokens / num_chunks, (c + 1) * num_tokens / num_chunks);
    }
  };
  if (num_chunks == 1) {
    run(0, 1);
  } else {
    torch::stable::parallel_for(0, num_chunks, 1, run);
  }
}

template <typename Id>
void count(const Problem<Id>& p, int64_t* counts, int64_t first_token, int64_t last_token) {
  bool negative = false;
  for (int64_t slot = first_token * p.k; slot < last_token * p.k; ++slot) {
    negative |= p.top_k_index[slot] < 0;
    ++counts[p.bucket(slot)];
  }
  counts[p.num_experts + 1] = negative;
}

// Errors are thrown here, on the calling thread, not inside a parallel region.
template <typename Id>
void validate(const Problem<Id>& p, Histogram& histogram, int64_t num_chunks) {
  for (int64_t c = 0; c < num_chunks; ++c) {
    if (histogram.chunk(c)[p.num_experts + 1] == 0) continue;
    const Id* end = p.top_k_index + p.num_slots();
    const Id* bad = std::find_if(p.top_k_index, end, [](Id id) { return id < 0; });
    const int64_t slot = bad - p.top_k_index;
    throw std::runtime_error("top_k_index must not be negative; got " + std::to_string(*bad) +
                             " at [" + std::to_string(slot / p.k) + ", " +
                             std::to_string(slot % p.k) + "].");
  }
}

// Turns counts into each chunk's first row per bucket, and writes expert_offsets.
void prefix(Histogram& histogram, int64_t num_chunks, int64_t num_experts, int64_t* offsets) {
  int64_t row = 0;
  for (int64_t bucket = 0; bucket <= num_experts; ++bucket) {
    offsets[bucket] = row;
    for (int64_t c = 0; c < num_chunks; ++c) {
      int64_t& cell = histogram.chunk(c)[bucket];
      const int64_t here = cell;
      cell = row;
      row += here;
    }
  }
}

struct Rows {
  int64_t* row_to_token;
  int64_t* row_to_slot;
  int64_t* slot_to_row;
};

template <typename Id>
void scatter(const Problem<Id>& p, int64_t* next_row, const Rows& out, int64_t first_token,
             int64_t last_token) {
  for (int64_t token = first_token; token < last_token; ++token) {
    for (int64_t slot = token * p.k; slot < (token + 1) * p.k; ++slot) {
      const int64_t bucket = p.bucket(slot);
      const int64_t row = next_row[bucket]++;
      out.row_to_token[row] = token;
      out.row_to_slot[row] = slot;
      out.slot_to_row[slot] = bucket < p.num_experts ? row : -1;
    }
  }
}

template <typename Id>
void sort_by_expert(const Problem<Id>& p, int64_t* expert_offsets, const Rows& out) {
  const int64_t num_chunks = choose_num_chunks(p);
  Histogram histogram(num_chunks, p.num_experts);
  for_each_chunk(num_chunks, p.num_tokens, [&](int64_t c, int64_t first, int64_t last) {
    count(p, histogram.chunk(c), first, last);
  });
  validate(p, histogram, num_chunks);
  prefix(histogram, num_chunks, p.num_experts, expert_offsets);
  for_each_chunk(num_chunks, p.num_tokens, [&](int64_t c, int64_t first, int64_t last) {
    scatter(p, histogram.chunk(c), out, first, last);
  });
}

void check_arguments(const Tensor& top_k_index, int64_t num_experts) {
  const auto dtype = top_k_index.scalar_type();
  STD_TORCH_CHECK(top_k_index.dim() == 2, "top_k_index must be [T, K]; got ", top_k_index.dim(),
                  " dimensions.");
  STD_TORCH_CHECK(dtype == ScalarType::Long || dtype == ScalarType::Int,
                  "top_k_index must be int64 or int32.");
  STD_TORCH_CHECK(top_k_index.is_contiguous(), "top_k_index must be contiguous.");
  STD_TORCH_CHECK(num_experts >= 1, "num_experts must be at least 1; got ", num_experts, ".");
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> plan_cpu(Tensor top_k_index, int64_t num_experts) {
  check_arguments(top_k_index, num_experts);
  const int64_t num_tokens = top_k_index.size(0);
  const int64_t k = top_k_index.size(1);
  const auto empty = [&](int64_t size) {
    return new_tensor(top_k_index, {size}, ScalarType::Long);
  };
  Tensor expert_offsets = empty(num_experts + 1);
  Tensor row_to_token = empty(num_tokens * k);
  Tensor row_to_slot = empty(num_tokens * k);
  Tensor slot_to_row = empty(num_tokens * k);

  int64_t* offsets = expert_offsets.mutable_data_ptr<int64_t>();
  const Rows rows{row_to_token.mutable_data_ptr<int64_t>(),
                  row_to_slot.mutable_data_ptr<int64_t>(),
                  slot_to_row.mutable_data_ptr<int64_t>()};
  if (top_k_index.scalar_type() == ScalarType::Int) {
    const auto* ids = top_k_index.const_data_ptr<int32_t>();
    sort_by_expert(Problem<int32_t>{ids, num_tokens, k, num_experts}, offsets, rows);
  } else {
    const auto* ids = top_k_index.const_data_ptr<int64_t>();
    sort_by_expert(Problem<int64_t>{ids, num_tokens, k, num_experts}, offsets, rows);
  }
  return {expert_offsets, row_to_token, row_to_slot, slot_to_row};
}

}  // namespace moe_fast
