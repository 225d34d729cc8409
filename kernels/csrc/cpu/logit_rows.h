// The elementwise operations on rows of contrastive logits; like simd.h, compiled once per instruction
// set, and simd().logits holds those that were chosen.
#pragma once

#include <cstdint>

namespace moe_fast {

// The logit of pairs that are left out of a softmax: finite, so that no NaN arises, and so low that
// its exponential is 0 compared with any other.
constexpr float kMasked = -1e30f;

struct LogitOps {
  // The sum of squares of x [n]. `bounded` becomes false if an entry is NaN or larger than `bound`
  // in magnitude.
  float (*squares)(const float* x, int64_t n, float bound, bool* bounded);
  // s[j] = kMasked where ids[j] == id.
  void (*mask_equal)(const int64_t* ids, int64_t id, float* s, int64_t n);
  // The largest of s [n], n >= 1, and the sum of 2^(s - shift).
  float (*largest)(const float* s, int64_t n);
  float (*sum_exp2)(const float* s, float shift, int64_t n);
  // How many of s are not below `own`; the number and the sum of those that are not masked.
  int64_t (*count_not_below)(const float* s, float own, int64_t n);
  int64_t (*count_and_sum)(const float* s, int64_t n, float* sum);
  // out = weight 2^(s - shift), minus `every` where s is not masked.
  void (*softmax_gradient)(const float* s, float shift, float weight, float every, float* out,
                           int64_t n);
};

}  // namespace moe_fast
