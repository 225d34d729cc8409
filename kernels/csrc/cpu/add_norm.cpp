// Each thread has rows of its own; a row is in the level 1 cache while it is added and normalised.
#include "../layer.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "norm_rows.h"
#include "tasks.h"

namespace moe_fast {

std::vector<float> floats_of(const char* name, const std::optional<Tensor>& tensor, int64_t size) {
  if (!tensor.has_value()) return {};
  std::vector<float> out(static_cast<size_t>(size));
  simd().load(data_of(name, *tensor, *tensor, {size}), dtype_of(*tensor), out.data(), size);
  return out;
}

NormRows view_norm(const Tensor& y, const Tensor& residual, const Tensor& weight,
                   const std::optional<Tensor>& bias, double eps, Tensor& out, Tensor& exact) {
  const int64_t tokens = y.size(0), dim = y.size(1);
  if (residual.scalar_type() != y.scalar_type() && dtype_of(residual) != Dtype::f32) {
    throw std::runtime_error("residual must have the dtype of the rows, or be float32.");
  }
  NormRows rows;
  rows.dim = dim;
  rows.residual = data_of("residual", residual, residual, {tokens, dim});
  rows.residual_dtype = dtype_of(residual);
  rows.weight = floats_of("norm_weight", weight, dim);
  rows.bias = floats_of("norm_bias", bias, dim);
  rows.eps = static_cast<float>(eps);
  rows.out = out.mutable_data_ptr();
  rows.dtype = dtype_of(y);
  rows.exact = exact.size(0) > 0 ? static_cast<float*>(exact.mutable_data_ptr()) : nullptr;
  return rows;
}

std::tuple<Tensor, Tensor> add_norm_cpu(Tensor y, Tensor residual, Tensor weight,
                                        std::optional<Tensor> bias, double eps, bool keep_exact) {
  if (y.dim() != 2) throw std::runtime_error("y must be [T, D].");
  const int64_t tokens = y.size(0), dim = y.size(1);
  const void* from = data_of("y", y, y, {tokens, dim});
  const Dtype dtype = dtype_of(y);
  Tensor out = new_output(y, {tokens, dim});
  Tensor exact =
      new_output(y, {keep_exact ? tokens : 0, dim}, torch::headeronly::ScalarType::Float);
  if (dim == 0) return {out, exact};
  const NormRows rows = view_norm(y, residual, weight, bias, eps, out, exact);
  run_chunks(tokens, (1 << 14) / dim + 1, [&](int64_t begin, int64_t end) {
    thread_local Buffer sums, converted;
    float* sum = sums.get<float>(dim);
    for (int64_t t = begin; t < end; ++t) {
      simd().load(at(from, dtype, t * dim), dtype, sum, dim);
      rows.finish(sum, nullptr, t, converted);
    }
  });
  return {out, exact};
}

}  // namespace moe_fast
