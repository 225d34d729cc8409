#include "int8_rows.h"

#include <stdexcept>

namespace moe_fast {
namespace {

using torch::headeronly::ScalarType;

void check(bool holds, const std::string& message) {
  if (!holds) throw std::runtime_error(message);
}

const float* floats_of(const std::string& name, const Tensor& tensor,
                       const std::vector<int64_t>& shape) {
  check_shape(name.c_str(), tensor, shape);
  check(tensor.scalar_type() == ScalarType::Float, name + " must be float32.");
  return tensor.const_data_ptr<float>();
}

}  // namespace

Int8Weight view_weight(const char* name, const Tensor& values, const Tensor& scale,
                       const Tensor& sums, const std::optional<Tensor>& bias, int64_t num_experts,
                       int64_t k) {
  const std::string prefix(name);
  check(scale.dim() >= 1 && k >= 1 && k <= 65536,
        prefix + " must have 1 to 65536 columns: sums of more overflow 32 bits.");
  Int8Weight w{};
  w.n = scale.size(scale.dim() - 1);
  w.k = k;
  w.depth = round_up(k, kInt8Depth);
  check(w.n >= 1, prefix + " must have a row.");
  std::vector<int64_t> rows{w.n};
  std::vector<int64_t> blocks{w.panels(), w.depth / 4, kInt8Panel, 4};
  if (num_experts >= 0) {
    rows.insert(rows.begin(), num_experts);
    blocks.insert(blocks.begin(), num_experts);
  }
  check_shape((prefix + ".values").c_str(), values, blocks);
  check(values.scalar_type() == ScalarType::Char, prefix + ".values must be int8.");
  w.values = values.const_data_ptr<int8_t>();
  w.scale = floats_of(prefix + ".scale", scale, rows);
  check_shape((prefix + ".sums").c_str(), sums, rows);
  check(sums.scalar_type() == ScalarType::Int, prefix + ".sums must be int32.");
  w.sums = sums.const_data_ptr<int32_t>();
  w.bias = bias.has_value() ? floats_of(prefix + "_bias", *bias, rows) : nullptr;
  return w;
}

std::optional<Quantizer> view_range(const char* name, const std::optional<Tensor>& range) {
  if (!range.has_value()) return std::nullopt;
  const float* ends = floats_of(name, *range, {2});
  check(ends[0] <= 0.0f && ends[1] >= 0.0f && std::isfinite(ends[1] - ends[0]),
        std::string(name) + " must be finite and contain 0.");
  return quantizer(ends[0], ends[1], 0.0f);
}

Int8Norm view_norm(const std::optional<Tensor>& residual, const std::optional<Tensor>& weight,
                   const std::optional<Tensor>& bias, double eps, const Tensor& y) {
  if (!residual.has_value()) return {};
  check(weight.has_value() && bias.has_value(), "a residual needs norm_weight and norm_bias.");
  const int64_t n = y.size(1);
  Int8Norm norm;
  norm.residual = data_of("residual", *residual, y, {y.size(0), n});
  norm.weight = floats_of("norm_weight", *weight, {n});
  norm.bias = floats_of("norm_bias", *bias, {n});
  norm.eps = static_cast<float>(eps);
  return norm;
}

}  // namespace moe_fast
