// Every native operation's schema and the devices that implement it. Python loads this library with
// torch.ops.load_library; the operations then stand in torch.ops.moe_fast_cpp.
#include <torch/csrc/stable/library.h>

#include "plan.h"

STABLE_TORCH_LIBRARY(moe_fast_cpp, m) {
  m.def(
      "plan(Tensor top_k_index, int num_experts) -> "
      "(Tensor expert_offsets, Tensor row_to_token, Tensor row_to_slot, Tensor slot_to_row)");
}

STABLE_TORCH_LIBRARY_IMPL(moe_fast_cpp, CPU, m) {
  m.impl("plan", TORCH_BOX(&moe_fast::plan_cpu));
}
