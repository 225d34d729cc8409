#include "../plan.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "launch.h"
#include "plan_kernels.cuh"

namespace moe_fast {
namespace {

using torch::headeronly::ScalarType;

Tensor empty(const Tensor& like, int64_t size) {
  return torch::stable::new_empty(like, {size}, ScalarType::Long);
}

template <typename Id>
void sort_by_expert(const Tensor& top_k_index, const PlanCut& cut, const PlanRows& out) {
  // These scratch tensors are freed to torch's allocator before the kernels have run. This is
  // correct, because the memory is reused on the same stream, also in a graph that is being
  // captured.
  const Tensor counts = empty(top_k_index, cut.num_buckets * cut.num_warps());
  const bool shared = cut.in_shared_memory();
  const Tensor counters =
      empty(top_k_index, shared ? 0 : cut.num_blocks * cut.counters_per_block());
  const PlanJob<Id> job{cut, static_cast<const Id*>(top_k_index.const_data_ptr()),
                        top_k_index.size(1), counts.mutable_data_ptr<int64_t>(),
                        shared ? nullptr : counters.mutable_data_ptr<int64_t>()};
  const auto blocks = static_cast<unsigned>(cut.num_blocks);
  const size_t bytes = shared ? cut.counters_per_block() * sizeof(int64_t) : 0;
  const cudaStream_t stream = current_stream(top_k_index.get_device_index());
  count_slots<<<blocks, 32 * PlanCut::kWarps, bytes, stream>>>(job);
  check_launch("plan, count_slots");
  place_slots<<<blocks, 32 * PlanCut::kWarps, bytes, stream>>>(job, out);
  check_launch("plan, place_slots");
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> plan_cuda(Tensor top_k_index, int64_t num_experts) {
  const auto dtype = top_k_index.scalar_type();
  STD_TORCH_CHECK(top_k_index.dim() == 2, "top_k_index must be [T, K]; got ", top_k_index.dim(),
                  " dimensions.");
  STD_TORCH_CHECK(dtype == ScalarType::Long || dtype == ScalarType::Int,
                  "top_k_index must be int64 or int32.");
  STD_TORCH_CHECK(num_experts >= 1, "num_experts must be at least 1; got ", num_experts, ".");
  check_tensor("top_k_index", top_k_index, top_k_index,
               {top_k_index.size(0), top_k_index.size(1)});
  const torch::stable::accelerator::DeviceGuard guard(top_k_index.get_device_index());
  const int64_t slots = top_k_index.numel();
  Tensor expert_offsets = empty(top_k_index, num_experts + 1);
  Tensor row_to_token = empty(top_k_index, slots);
  Tensor row_to_slot = empty(top_k_index, slots);
  Tensor slot_to_row = empty(top_k_index, slots);
  const PlanRows out{
      expert_offsets.mutable_data_ptr<int64_t>(), row_to_token.mutable_data_ptr<int64_t>(),
      row_to_slot.mutable_data_ptr<int64_t>(), slot_to_row.mutable_data_ptr<int64_t>()};
  const PlanCut cut = PlanCut::of(slots, num_experts);
  if (dtype == ScalarType::Int) {
    sort_by_expert<int32_t>(top_k_index, cut, out);
  } else {
    sort_by_expert<int64_t>(top_k_index, cut, out);
  }
  return {expert_offsets, row_to_token, row_to_slot, slot_to_row};
}

}  // namespace moe_fast
