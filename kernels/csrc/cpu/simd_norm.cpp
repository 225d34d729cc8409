// LayerNorm of one row; compiled once per instruction set, like simd.cpp.
#include <cmath>
#include <cstdint>

namespace moe_fast {
namespace MOE_ISA {

void normalize(float* __restrict x, const float* __restrict weight, const float* __restrict bias,
               float eps, int64_t n) {
  const float share = 1.0f / static_cast<float>(n);
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += x[i];
  const float mean = sum * share;
  float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < n; ++i) squares += (x[i] - mean) * (x[i] - mean);
  const float factor = 1.0f / std::sqrt(squares * share + eps);
  if (bias == nullptr) {
    for (int64_t i = 0; i < n; ++i) x[i] = (x[i] - mean) * factor * weight[i];
  } else {
    for (int64_t i = 0; i < n; ++i) x[i] = (x[i] - mean) * factor * weight[i] + bias[i];
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
