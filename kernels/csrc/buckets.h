// The arithmetic of plan (see plan.h) that the CPU and the GPU share.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define MOE_HOST_DEVICE __host__ __device__
#else
#define MOE_HOST_DEVICE
#endif

namespace moe_fast {

// The bucket of a slot by its id: 0 .. E - 1, or E for "skipped". Read as unsigned, negative ids
// are huge, so that one comparison maps both ids >= E and negative ids to E: no id is out of
// bounds.
MOE_HOST_DEVICE inline int64_t bucket_of(int64_t id, int64_t num_experts) {
  return static_cast<uint64_t>(id) < static_cast<uint64_t>(num_experts) ? id : num_experts;
}

// How the slots are divided among the warps of a GPU. Each warp has `slots_per_warp` neighbouring
// slots and one counter per bucket; there are num_blocks * kWarps warps, of which the last may have
// no slots.
struct PlanCut {
  static constexpr int kWarps = 4;               // per block
  static constexpr int64_t kMaxWarps = 1024;     // roughly: every block reads all warps' counters
  static constexpr int64_t kMinSlots = 256;      // per warp
  static constexpr int64_t kSharedBytes = 48 << 10;  // the default limit of a block on every GPU

  int64_t num_slots, num_buckets;  // E + 1
  int64_t slots_per_warp, num_blocks;

  MOE_HOST_DEVICE int64_t num_warps() const { return num_blocks * kWarps; }
  MOE_HOST_DEVICE int64_t counters_per_block() const { return kWarps * num_buckets; }
  // Whether a block's counters fit into its shared memory; otherwise they are in global memory.
  MOE_HOST_DEVICE bool in_shared_memory() const {
    return counters_per_block() * static_cast<int64_t>(sizeof(int64_t)) <= kSharedBytes;
  }

  static PlanCut of(int64_t num_slots, int64_t num_experts) {
    const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
    // A warp has at least E slots, so that there are not many more counters than slots.
    int64_t slots = num_experts > kMinSlots ? num_experts : kMinSlots;
    const int64_t fair = ceil_div(num_slots, kMaxWarps);
    slots = ceil_div(fair > slots ? fair : slots, 32) * 32;
    const int64_t blocks = ceil_div(num_slots, slots * kWarps);
    return {num_slots, num_experts + 1, slots, blocks > 0 ? blocks : 1};
  }
};

}  // namespace moe_fast
