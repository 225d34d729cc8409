// The GPU kernels of the operations that ../bindings.cpp defines. They are a library of their own,
// which is loaded after that one: if it cannot be loaded, the CPU library still works.
#include <torch/csrc/stable/library.h>

#include "../plan.h"
#include "../rows.h"

STABLE_TORCH_LIBRARY_IMPL(moe_fast_cpp, CUDA, m) {
  m.impl("plan", TORCH_BOX(&moe_fast::plan_cuda));
  m.impl("gather_rows", TORCH_BOX(&moe_fast::gather_rows_cuda));
  m.impl("combine_rows", TORCH_BOX(&moe_fast::combine_rows_cuda));
  m.impl("combine_rows_backward", TORCH_BOX(&moe_fast::combine_rows_backward_cuda));
}
