// The elementwise work around the products. One source, simd.cpp, is compiled once per
// instruction set; simd() gives the best one that this processor runs. Nothing of torch may be
// included here: the linker keeps one copy of an inline function, and it may be an AVX-512 one.
#pragma once

#include <cstdint>

namespace moe_fast {

enum class Dtype { f32, bf16, f16 };

// The activations, by the names that moe_fast/ops/activations.py gives them.
enum class Act { gelu, gelu_tanh, relu, silu, clamped_swiglu };
struct NamedAct {
  const char* name;
  Act act;
};
inline constexpr NamedAct kActs[] = {{"gelu", Act::gelu},
                                     {"gelu_tanh", Act::gelu_tanh},
                                     {"relu", Act::relu},
                                     {"silu", Act::silu},
                                     {"clamped_swiglu", Act::clamped_swiglu}};

// Lengths are in elements. Rows of 16-bit elements are passed as void*.
struct SimdOps {
  const char* name;

  // Between rows of `dtype` and floats, rounding to nearest even.
  void (*load)(const void* source, Dtype dtype, float* out, int64_t n);
  void (*store)(const float* source, Dtype dtype, void* out, int64_t n);
  // The same of `rows` rows, ld and out_ld elements apart.
  void (*load_rows)(const void* source, Dtype dtype, int64_t ld, int64_t rows, int64_t n, float* out,
                    int64_t out_ld);

  // out[c * ld + r] = rows[r][c] for r < num_rows <= 16, and 0 for num_rows <= r < 16.
  void (*transpose)(const uint32_t* const* rows, int64_t num_rows, int64_t n, uint32_t* out,
                    int64_t ld);

  // out[i] = the bf16 pair (a[i], b[i]), a in the lower half; from bf16, and rounding floats.
  void (*interleave)(const uint16_t* a, const uint16_t* b, uint32_t* out, int64_t n);
  void (*round_pairs)(const float* a, const float* b, uint32_t* out, int64_t n);

  // One block of a softmax down the columns of x [rows, n], rows even and n a multiple of 16, whose
  // earlier blocks left max and sum (-inf and 0 before the first): x = 2^(scale x - max) with the
  // new max, sum = factor * sum + sums of x, factor = 2^(old max - new max). Where pairs is not
  // null x is not kept, but rounded to it: bf16 pairs of rows [rows / 2, n]. A column that holds
  // NaN, or inf alone, has NaN for its sum, or 0 where all are -inf.
  void (*softmax)(float* x, float scale, int64_t rows, int64_t n, float* max, float* sum,
                  float* factor, uint32_t* pairs);
  // Column i of x [rows, n] *= by[i].
  void (*scale_columns)(float* x, const float* by, int64_t rows, int64_t n);

  // z [rows, n] += bias[row] (null for 0), then rounded to `dtype`.
  void (*add_bias)(float* z, const float* bias, Dtype dtype, int64_t rows, int64_t n);
  // h = act(z), gated h = act(z) * z2 (clamped_swiglu: of z2 clamped, plus 1); h overlaps neither.
  void (*activate)(const float* z, const float* z2, Act act, float* h, int64_t n);

  // With dh the gradient of h before the routing weight w: h, and dz = w dh act'(z) (gated: dz and
  // dz2 from z and z2; otherwise both are null). Returns <dh, h>.
  float (*activate_backward)(const float* dh, const float* z, const float* z2, float w, Act act,
                             float* h, float* dz, float* dz2, int64_t n);

  // acc += w x;  out = w (x + bias), bias null for 0;  <a, b>.
  void (*add_scaled)(float* acc, const float* x, float w, int64_t n);
  void (*scale_add)(const float* x, float w, const float* bias, float* out, int64_t n);
  float (*dot)(const float* a, const float* b, int64_t n);
  // Of four rows at once: out[j] = <a, rows[j]>, each summed in the same order;  acc += w[j] rows[j].
  void (*dot4)(const float* a, const float* const* rows, float* out, int64_t n);
  void (*add_scaled4)(float* acc, const float* const* rows, const float* w, int64_t n);

  // out[c * ldo + r] = <row r of a, row c of b>, bf16 rows lda and ldb apart, of length k: for few rows
  // c, so that a is read once, in place. Null where the processor does not multiply bf16.
  void (*dots_bf16)(const uint16_t* a, int64_t lda, int64_t num_rows, const uint16_t* b, int64_t ldb,
                    int64_t num_columns, int64_t k, float* out, int64_t ldo);
};

// MOE_FAST_CPU=portable, avx2 or avx512 in the environment holds it back (for tests).
const SimdOps& simd();

}  // namespace moe_fast
