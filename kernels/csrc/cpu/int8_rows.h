// What the operations on 8-bit integers share: weights, quantised rows, and the end of a row.
#pragma once

#include <cmath>
#include <limits>
#include <optional>
#include <string>

#include "gemm.h"
#include "int8_simd.h"
#include "packing.h"
#include "plan_view.h"
#include "simd.h"

namespace moe_fast {

// A weight [N, K], or E of them one after the other.
struct Int8Weight {
  const int8_t* values;
  const float* scale;
  const int32_t* sums;
  const float* bias;  // or null
  int64_t n, k, depth;

  int64_t panels() const { return (n + kInt8Panel - 1) / kInt8Panel; }
  Int8Weight of(int64_t expert) const {
    return {values + expert * panels() * kInt8Panel * depth, scale + expert * n, sums + expert * n,
            bias == nullptr ? nullptr : bias + expert * n, n, k, depth};
  }
  Columns from(int64_t column) const {
    return {scale + column, sums + column, bias == nullptr ? nullptr : bias + column};
  }
};

// `num_experts` < 0: a single weight without the dimension E. Throws std::runtime_error for wrong
// shapes and dtypes.
Int8Weight view_weight(const char* name, const Tensor& values, const Tensor& scale,
                       const Tensor& sums, const std::optional<Tensor>& bias, int64_t num_experts,
                       int64_t k);

// Scale, its inverse and zero point of the values from low to high; 0 is represented exactly.
struct Quantizer {
  RowScale row;
  float inverse;
};
inline Quantizer quantizer(float low, float high, float poison) {
  const float span = high - low + poison;
  // Values that are not finite make the row NaN, and those that are nearly 0 count as 0.
  if (!(span < std::numeric_limits<float>::infinity())) {
    return {{std::numeric_limits<float>::quiet_NaN(), 0}, 0.0f};
  }
  if (span < 1e-30f) return {{0.0f, 0}, 0.0f};
  const float scale = span / 255.0f, inverse = 1.0f / scale;
  return {{scale, static_cast<int32_t>(std::nearbyint(-low * inverse))}, inverse};
}

// A fixed quantizer, or none: each row has its own. Throws std::runtime_error.
std::optional<Quantizer> view_range(const char* name, const std::optional<Tensor>& range);

// Rows of bytes [rows, depth], padded to multiples of kInt8Rows rows, with a scale each.
struct Int8Rows {
  Buffer bytes, scales;
  uint8_t* data = nullptr;
  RowScale* scale = nullptr;
  int64_t count = 0, depth = 0;

  void resize(int64_t count_, int64_t depth_) {
    count = count_;
    depth = depth_;
    data = bytes.get<uint8_t>(round_up(count, kInt8Rows) * depth);
    scale = scales.get<RowScale>(count);
    std::memset(data + count * depth, 0,
                static_cast<size_t>((round_up(count, kInt8Rows) - count) * depth));
  }
  // Row i of n floats.
  void put(int64_t i, const float* x, int64_t n, const std::optional<Quantizer>& fixed) {
    if (fixed.has_value()) {
      put(i, x, n, *fixed);
      return;
    }
    float low = 0.0f, high = 0.0f;
    const float poison = int8_ops().range(x, n, &low, &high);
    put(i, x, n, quantizer(low, high, poison));
  }
  void put(int64_t i, const float* x, int64_t n, const Quantizer& by) {
    uint8_t* row = data + i * depth;
    scale[i] = by.row;
    scale[i].scale += int8_ops().quantize(x, n, by.inverse, by.row.zero, row);
    std::memset(row + n, 0, static_cast<size_t>(depth - n));
  }
};

// Multiplies the rows by W's rows `begin` to `end`, both multiples of kInt8Columns or the last. Calls
// use(row, rows, column, columns, sums) for each block of at most kInt8Rows x kInt8Columns sums.
template <typename Use>
void multiply_rows(const Int8Rows& rows, const Int8Weight& weight, int64_t begin, int64_t end,
                   Use use) {
  alignas(64) int32_t sums[kInt8Rows * kInt8Columns];
  const Int8Ops& ops = int8_ops();
  for (int64_t column = begin; column < end; column += kInt8Columns) {
    const int64_t columns = std::min(kInt8Columns, end - column);
    const int64_t panels = (columns + kInt8Panel - 1) / kInt8Panel;
    for (int64_t r = 0; r < rows.count; r += kInt8Rows) {
      const int64_t here = std::min(kInt8Rows, rows.count - r);
      ops.multiply(rows.data + r * rows.depth, rows.depth, here,
                   weight.values + column * weight.depth, weight.depth, panels, sums);
      use(r, here, column, columns, sums);
    }
  }
}

// LayerNorm(y + residual), or nothing.
struct Int8Norm {
  const void* residual = nullptr;  // [T, n] in the dtype of the result; null: there is no norm
  const float *weight = nullptr, *bias = nullptr;
  float eps = 0.0f;
};

Int8Norm view_norm(const std::optional<Tensor>& residual, const std::optional<Tensor>& weight,
                   const std::optional<Tensor>& bias, double eps, const Tensor& y);

// Finishes the row of a token, which it may change, and stores it.
inline void finish_row(float* row, int64_t n, int64_t token, const Int8Norm& norm, Dtype dtype,
                       void* y, Buffer& buffer) {
  if (norm.residual != nullptr) {
    const auto* residual = static_cast<const float*>(norm.residual) + token * n;
    if (dtype != Dtype::f32) {
      float* loaded = buffer.get<float>(n);
      simd().load(at(norm.residual, dtype, token * n), dtype, loaded, n);
      residual = loaded;
    }
    int8_ops().normalize(row, residual, n, norm.weight, norm.bias, norm.eps);
  }
  simd().store(row, dtype, at(y, dtype, token * n), n);
}

// Prepares the calling thread for products, until it is destroyed. oneDNN keeps the tiles of its last
// product configured, and would not notice that they were taken from it.
class Int8Products {
 public:
  Int8Products() {
    static void (*const release)() = why_no_gemm() == nullptr ? gemm().finish : [] {};
    release();
    int8_ops().begin();
  }
  ~Int8Products() { int8_ops().finish(); }
  Int8Products(const Int8Products&) = delete;
  Int8Products& operator=(const Int8Products&) = delete;
};

}  // namespace moe_fast
