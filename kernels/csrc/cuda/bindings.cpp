// The GPU's kernels for the operations that ../bindings.cpp defines. A library of its own, loaded
// after that one: where it does not load, the CPU's half still works.
#include <torch/csrc/stable/library.h>

#include "../plan.h"
#include "../rows.h"

STABLE_TORCH_LIBRARY_IMPL(moe_fast_cpp, CUDA, m) {
  m.impl("plan", TORCH_BOX(&moe_fast::plan_cuda));
  m.impl("gather_rows", TORCH_BOX(&moe_fast::gather_rows_cuda));
  m.impl("combine_rows", TORCH_BOX(&moe_fast::combine_rows_cuda));
  m.impl("combine_rows_backward", TORCH_BOX(&moe_fast::combine_rows_backward_cuda));
}
