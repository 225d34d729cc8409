// The end of a block of a layer: a row's sum with the residual is normalised, rounded and stored.
#pragma once

#include <optional>
#include <vector>

#include "packing.h"
#include "plan_view.h"
#include "simd.h"

namespace moe_fast {

// A vector [size] as floats, or empty (for zeros) if the tensor is absent.
std::vector<float> floats_of(const char* name, const std::optional<Tensor>& tensor, int64_t size);

// Where the sums of the rows come from and go to.
struct NormRows {
  int64_t dim;
  const void* residual;
  Dtype residual_dtype;
  std::vector<float> weight, bias;  // of the norm; an empty bias stands for zeros
  float eps;
  void* out;
  Dtype dtype;
  float* exact;  // null: not wanted

  // Completes row t: `y` [dim], which is overwritten, and the bias are added to the residual.
  void finish(float* y, const float* y_bias, int64_t t, Buffer& buffer) const {
    const float* from = residual_dtype == Dtype::f32
                            ? static_cast<const float*>(residual) + t * dim
                            : load_floats(residual, residual_dtype, t * dim, dim, buffer);
    simd().norm_row({y, y_bias, from, weight.data(), bias.empty() ? nullptr : bias.data(), eps,
                     exact == nullptr ? nullptr : exact + t * dim, at(out, dtype, t * dim), dtype},
                    dim);
  }
};

// Checks the tensors of an operation that ends so, for results of y's shape [T, D] and dtype.
NormRows view_norm(const Tensor& y, const Tensor& residual, const Tensor& weight,
                   const std::optional<Tensor>& bias, double eps, Tensor& out, Tensor& exact);

}  // namespace moe_fast
