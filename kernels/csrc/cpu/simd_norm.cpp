// The end of a block of a layer, for one row; compiled once per instruction set, like simd.cpp.
#include <cmath>
#include <cstdint>

#include "simd.h"

namespace moe_fast {
namespace MOE_ISA {

extern const SimdOps ops;

namespace {

// y += bias + residual; returns the sum of y.
float add(float* __restrict y, const float* __restrict bias, const float* __restrict residual,
          int64_t n) {
  float sum = 0.0f;
  if (bias == nullptr) {
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum += y[i] += residual[i];
  } else {
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum += y[i] += bias[i] + residual[i];
  }
  return sum;
}

// out = (y - mean) * factor * weight + shift; out may be y.
void scale(const float* y, float mean, float factor, const float* __restrict weight,
           const float* __restrict shift, float* out, int64_t n) {
  if (shift == nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = (y[i] - mean) * factor * weight[i];
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = (y[i] - mean) * factor * weight[i] + shift[i];
  }
}

}  // namespace

void norm_row(const NormedRow& row, int64_t n) {
  const float share = 1.0f / static_cast<float>(n);
  const float mean = add(row.y, row.bias, row.residual, n) * share;
  const float* __restrict y = row.y;
  float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < n; ++i) squares += (y[i] - mean) * (y[i] - mean);
  const float factor = 1.0f / std::sqrt(squares * share + row.eps);
  float* values = row.exact != nullptr ? row.exact : row.y;
  if (row.dtype == Dtype::f32) values = static_cast<float*>(row.out);
  scale(row.y, mean, factor, row.weight, row.shift, values, n);
  if (row.dtype != Dtype::f32) {
    ops.store(values, row.dtype, row.out, n);
  } else if (row.exact != nullptr) {
    ops.store(values, Dtype::f32, row.exact, n);
  }
}

// Rotates each of `heads` rows of 2 * half elements, see attention_block in layer.h.
void rotate(float* __restrict x, const float* __restrict cos, const float* __restrict sin,
            int64_t heads, int64_t half) {
  for (int64_t h = 0; h < heads; ++h) {
    float* lower = x + h * 2 * half;
    float* upper = lower + half;
    for (int64_t i = 0; i < half; ++i) {
      const float a = lower[i], b = upper[i];
      lower[i] = a * cos[i] - b * sin[i];
      upper[i] = b * cos[half + i] + a * sin[half + i];
    }
  }
}

}  // namespace MOE_ISA
}  // namespace moe_fast
