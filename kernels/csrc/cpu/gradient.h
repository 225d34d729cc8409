// Gathers the upstream gradient of a block of rows into the factors of the backward products.
#pragma once

#include "packing.h"
#include "plan_view.h"
#include "tasks.h"

namespace moe_fast {

// For rows first .. first + count, whose dO are their tokens' rows of grad_y, padded with zeros to
// `padded` rows, a multiple of kGroup:
//   grad [padded, dim] = dO;  grad_t [dim, padded] = (w dO)^T;  db += column sums of w dO (or null);
//   row_weights[row] = <dO, bias>, 0 where bias is null.
template <typename G>
void pack_gradient(const RowSource& grad_y, const PlanView& plan, int64_t first, int64_t count,
                   const float* bias, G* grad, G* grad_t, float* db, float* row_weights,
                   Buffer& group_buffer, Buffer& pairs) {
  const int64_t dim = grad_y.dim;
  const int64_t padded = round_up(count, kGroup);
  float* group = group_buffer.get<float>(kGroup * dim);
  for (int64_t i = 0; i < padded; i += kGroup) {
    const int64_t here = std::min(kGroup, count - i);
    for (int64_t j = 0; j < here; ++j) {
      const int64_t row = first + i + j;
      float* values = group + j * dim;
      simd().load(grad_y.row(row), grad_y.dtype, values, dim);
      const void* exact = std::is_same_v<G, float> ? values : grad_y.row(row);
      std::memcpy(grad + (i + j) * dim, exact, static_cast<size_t>(dim) * sizeof(G));
      row_weights[row] = bias == nullptr ? 0.0f : simd().dot(values, bias, dim);
      simd().scale_add(values, plan.weight(row), nullptr, values, dim);
      if (db != nullptr) simd().add_scaled(db, values, 1.0f, dim);
    }
    std::memset(grad + (i + here) * dim, 0,
                static_cast<size_t>((kGroup - here) * dim) * sizeof(G));
    put_transposed(group, dim, here, dim, grad_t + i, padded, pairs);
  }
}

}  // namespace moe_fast
