// plan on a GPU: a stable counting sort in two launches.
//
//   1. count_slots:  every warp counts its slots per bucket (E experts, then the skipped ones).
//   2. place_slots:  every block reads all counts and computes its warps' first row per bucket: the
//      number of rows in lower buckets, and in the same bucket of earlier warps. Then each warp
//      processes its slots in order, 32 at a time; lanes of the same bucket are ranked by lane.
//
// A warp has neighbouring slots, so the order (bucket, warp, round, lane) is stable for any number
// of warps. Each counter is an integer that one warp updates, without atomics; blocks are
// synchronised only between the launches.
#pragma once

#include "../buckets.h"
#include "device.cuh"

namespace moe_fast {

template <typename Id>
struct PlanJob {
  PlanCut cut;
  const Id* ids;      // [num_slots]
  int64_t k;
  int64_t* counts;    // [num_buckets, num_warps]
  int64_t* counters;  // [num_blocks, kWarps, num_buckets], or null if they are in shared memory
};

struct PlanRows {
  int64_t* expert_offsets;  // [num_buckets]
  int64_t* row_to_token;    // [num_slots], like the next two
  int64_t* row_to_slot;
  int64_t* slot_to_row;
};

// The counters [kWarps, num_buckets] of this block.
template <typename Id>
__device__ int64_t* block_counters(const PlanJob<Id>& job) {
  return job.counters == nullptr ? shared_memory<int64_t>()
                                 : job.counters + blockIdx.x * job.cut.counters_per_block();
}

// One slot per lane: its bucket, and the lanes with the same bucket.
struct Lane {
  int64_t slot;
  bool active;  // there is such a slot
  int64_t bucket;
  unsigned peers;

  __device__ int rank() const { return __popc(peers & ((1u << lane_id()) - 1)); }
  __device__ int count() const { return __popc(peers); }
};

// Calls work(lane) in rounds over the slots of this warp. All lanes participate in all rounds.
template <typename Id, typename Work>
__device__ void for_each_round(const PlanJob<Id>& job, const Work& work) {
  const int64_t begin = warp_in_grid() * job.cut.slots_per_warp;
  const int64_t end = begin + job.cut.slots_per_warp < job.cut.num_slots
                          ? begin + job.cut.slots_per_warp
                          : job.cut.num_slots;
  for (int64_t first = begin; first < end; first += 32) {
    Lane lane;
    lane.slot = first + lane_id();
    lane.active = lane.slot < end;
    // Lanes without a slot are peers of each other, in a bucket that has no counter.
    lane.bucket = lane.active ? bucket_of(job.ids[lane.slot], job.cut.num_buckets - 1)
                              : job.cut.num_buckets;
    lane.peers = __match_any_sync(kAllLanes, static_cast<unsigned long long>(lane.bucket));
    work(lane);
  }
}

template <typename Id>
__global__ void count_slots(PlanJob<Id> job) {
  const int64_t buckets = job.cut.num_buckets;
  int64_t* mine = block_counters(job) + warp_in_block() * buckets;
  for (int64_t b = lane_id(); b < buckets; b += 32) mine[b] = 0;
  __syncwarp();
  for_each_round(job, [&](const Lane& lane) {
    if (lane.active && lane.rank() == 0) mine[lane.bucket] += lane.count();
    __syncwarp();
  });
  for (int64_t b = lane_id(); b < buckets; b += 32) {
    job.counts[b * job.cut.num_warps() + warp_in_grid()] = mine[b];
  }
}

// values[i] = sum of values[j] over j < i. For one warp.
__device__ inline void exclusive_sums(int64_t* values, int64_t n) {
  int64_t before = 0;
  for (int64_t first = 0; first < n; first += 32) {
    const int64_t i = first + lane_id();
    const int64_t own = i < n ? values[i] : 0;
    int64_t sum = own;
    for (int step = 1; step < 32; step *= 2) {
      const int64_t below = __shfl_up_sync(kAllLanes, sum, step);
      if (lane_id() >= step) sum += below;
    }
    if (i < n) values[i] = before + sum - own;
    before += __shfl_sync(kAllLanes, sum, 31);
  }
}

// Fills this block's counters [kWarps, num_buckets] with the first row of each warp and bucket, and
// the first block writes expert_offsets.
template <typename Id>
__device__ void find_first_rows(const PlanJob<Id>& job, int64_t* rows, int64_t* expert_offsets) {
  const int64_t buckets = job.cut.num_buckets, warps = job.cut.num_warps();
  const int64_t first_warp = static_cast<int64_t>(blockIdx.x) * PlanCut::kWarps;
  for (int64_t b = warp_in_block(); b < buckets; b += PlanCut::kWarps) {
    int64_t all = 0, before = 0;
    for (int64_t w = lane_id(); w < warps; w += 32) {
      const int64_t count = job.counts[b * warps + w];
      all += count;
      if (w < first_warp) before += count;
    }
    all = warp_sum(all);
    before = warp_sum(before);
    if (lane_id() == 0) {
      rows[b] = all;
      rows[buckets + b] = before;
    }
  }
  __syncthreads();
  if (warp_in_block() == 0) exclusive_sums(rows, buckets);
  __syncthreads();
  // From here on each thread processes whole buckets, for all warps of the block.
  for (int64_t b = threadIdx.x; b < buckets; b += blockDim.x) {
    int64_t row = rows[b];
    if (blockIdx.x == 0) expert_offsets[b] = row;
    row += rows[buckets + b];
    for (int w = 0; w < PlanCut::kWarps; ++w) {
      rows[w * buckets + b] = row;
      row += job.counts[b * warps + first_warp + w];
    }
  }
  __syncthreads();
}

template <typename Id>
__global__ void place_slots(PlanJob<Id> job, PlanRows out) {
  int64_t* next = block_counters(job);
  find_first_rows(job, next, out.expert_offsets);
  next += warp_in_block() * job.cut.num_buckets;
  for_each_round(job, [&](const Lane& lane) {
    const int64_t row = lane.active ? next[lane.bucket] + lane.rank() : 0;
    __syncwarp();  // all lanes have read their counter
    if (lane.active && lane.rank() == 0) next[lane.bucket] += lane.count();
    __syncwarp();  // the next round reads the new counters
    if (!lane.active) return;
    out.row_to_token[row] = lane.slot / job.k;
    out.row_to_slot[row] = lane.slot;
    out.slot_to_row[lane.slot] = lane.bucket < job.cut.num_buckets - 1 ? row : -1;
  });
}

}  // namespace moe_fast
