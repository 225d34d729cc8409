// This file is compiled once per instruction set, like simd.cpp.
#include "logit_rows.h"

#include <cmath>

#include "exponential.h"

namespace moe_fast {
namespace MOE_ISA {
namespace {

float squares(const float* x, int64_t n, float bound, bool* bounded) {
  float sum = 0.0f;
  int32_t outside = 0;
#pragma omp simd reduction(+ : sum, outside)
  for (int64_t i = 0; i < n; ++i) {
    sum += x[i] * x[i];
    outside += std::fabs(x[i]) <= bound ? 0 : 1;
  }
  *bounded = *bounded && outside == 0;
  return sum;
}

void mask_equal(const int64_t* __restrict ids, int64_t id, float* __restrict s, int64_t n) {
  for (int64_t j = 0; j < n; ++j) s[j] = ids[j] == id ? kMasked : s[j];
}

float largest(const float* s, int64_t n) {
  float top = s[0];
#pragma omp simd reduction(max : top)
  for (int64_t j = 0; j < n; ++j) top = s[j] > top ? s[j] : top;
  return top;
}

float sum_exp2(const float* s, float shift, int64_t n) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += exp2_below(s[j] - shift);
  return sum;
}

int64_t count_not_below(const float* s, float own, int64_t n) {
  int32_t count = 0;
#pragma omp simd reduction(+ : count)
  for (int64_t j = 0; j < n; ++j) count += s[j] < own ? 0 : 1;  // a NaN counts, like a tie
  return count;
}

int64_t count_and_sum(const float* s, int64_t n, float* sum) {
  int32_t count = 0;
  float total = 0.0f;
#pragma omp simd reduction(+ : count, total)
  for (int64_t j = 0; j < n; ++j) {
    count += s[j] == kMasked ? 0 : 1;
    total += s[j] == kMasked ? 0.0f : s[j];
  }
  *sum = total;
  return count;
}

void softmax_gradient(const float* __restrict s, float shift, float weight, float every,
                      float* __restrict out, int64_t n) {
  for (int64_t j = 0; j < n; ++j) {
    out[j] = weight * exp2_below(s[j] - shift) - (s[j] == kMasked ? 0.0f : every);
  }
}

}  // namespace

extern const LogitOps logit_ops;
const LogitOps logit_ops = {squares,         mask_equal,    largest,         sum_exp2,
                            count_not_below, count_and_sum, softmax_gradient};

}  // namespace MOE_ISA
}  // namespace moe_fast
