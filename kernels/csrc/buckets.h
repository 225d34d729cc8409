// The arithmetic of plan that the CPU and the GPU share.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define MOE_HOST_DEVICE __host__ __device__
#else
#define MOE_HOST_DEVICE
#endif

namespace moe_fast {

// Where a slot's id sends it: 0 .. E - 1, or E for "skipped". One unsigned comparison sends ids >= E
// to E and negative ones, huge when read as unsigned, too: no id leads out of bounds.
MOE_HOST_DEVICE inline int64_t bucket_of(int64_t id, int64_t num_experts) {
  return static_cast<uint64_t>(id) < static_cast<uint64_t>(num_experts) ? id : num_experts;
}

// How the slots are cut for the GPU. A warp owns `slots_per_warp` neighbouring slots and a counter
// per bucket; there are num_blocks * kWarps warps, the last ones perhaps without slots.
struct PlanCut {
  static constexpr int kWarps = 4;               // per block
  static constexpr int64_t kMaxWarps = 1024;     // about: every block reads the counters of all
  static constexpr int64_t kMinSlots = 256;      // per warp
  static constexpr int64_t kSharedBytes = 48 << 10;  // what every GPU gives a block unasked

  int64_t num_slots, num_buckets;  // E + 1
  int64_t slots_per_warp, num_blocks;

  MOE_HOST_DEVICE int64_t num_warps() const { return num_blocks * kWarps; }
  MOE_HOST_DEVICE int64_t counters_per_block() const { return kWarps * num_buckets; }
  // Whether a block's counters fit into its shared memory, or live in global memory.
  MOE_HOST_DEVICE bool in_shared_memory() const {
    return counters_per_block() * static_cast<int64_t>(sizeof(int64_t)) <= kSharedBytes;
  }

  static PlanCut of(int64_t num_slots, int64_t num_experts) {
    const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
    // With many experts the counters would outnumber the slots: a warp has at least as many slots.
    int64_t slots = num_experts > kMinSlots ? num_experts : kMinSlots;
    const int64_t fair = ceil_div(num_slots, kMaxWarps);
    slots = ceil_div(fair > slots ? fair : slots, 32) * 32;
    const int64_t blocks = ceil_div(num_slots, slots * kWarps);
    return {num_slots, num_experts + 1, slots, blocks > 0 ? blocks : 1};
  }
};

}  // namespace moe_fast
