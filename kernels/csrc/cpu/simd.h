// The elementwise operations around the products. One source, simd.cpp, is compiled once per
// instruction set; simd() returns the best that this processor supports. Headers of torch must not
// be included here: the linker keeps one copy of an inline function, and it could be an AVX-512
// one.
#pragma once

#include <cstdint>

namespace moe_fast {

struct LogitOps;  // in logit_rows.h

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

// s = y + bias + residual, then v = weight (s - mean(s)) / sqrt(var(s) + eps) + shift; v is written
// to `exact`, and rounded to `out`.
struct NormedRow {
  float* y;  // is overwritten
  const float *bias, *residual;  // a null bias stands for zeros
  const float *weight, *shift;   // a null shift stands for zeros
  float eps;
  float* exact;  // null: not wanted
  void* out;
  Dtype dtype;
};

// Lengths are in elements. Rows of 16-bit elements are passed as void*.
struct SimdOps {
  const char* name;

  // Convert between rows of `dtype` and floats, rounding to nearest even.
  void (*load)(const void* source, Dtype dtype, float* out, int64_t n);
  void (*store)(const float* source, Dtype dtype, void* out, int64_t n);
  // The same of `rows` rows, ld and out_ld elements apart.
  void (*load_rows)(const void* source, Dtype dtype, int64_t ld, int64_t rows, int64_t n, float* out,
                    int64_t out_ld);

  // out[c * ld + r] = rows[r][c] for r < num_rows <= 16, and 0 for num_rows <= r < 16.
  void (*transpose)(const uint32_t* const* rows, int64_t num_rows, int64_t n, uint32_t* out,
                    int64_t ld);

  // out[i] = the bf16 pair (a[i], b[i]), a in the lower half; the first from bf16, the second from
  // floats, which it rounds.
  void (*interleave)(const uint16_t* a, const uint16_t* b, uint32_t* out, int64_t n);
  void (*round_pairs)(const float* a, const float* b, uint32_t* out, int64_t n);

  // One block of a softmax down the columns of x [rows, n]; rows is even and n a multiple of 16.
  // max and sum are those of the earlier blocks (-inf and 0 before the first). It computes
  // x = 2^(scale x - max) with the new max, sum = factor * sum + sums of x, and
  // factor = 2^(old max - new max). If pairs is not null, x is rounded to it instead of being
  // kept, as bf16 pairs of rows [rows / 2, n]. The sum of a column that contains NaN or inf is
  // NaN; it is 0 if all are -inf.
  void (*softmax)(float* x, float scale, int64_t rows, int64_t n, float* max, float* sum,
                  float* factor, uint32_t* pairs);
  // Multiplies column i of x [rows, n] by by[i].
  void (*scale_columns)(float* x, const float* by, int64_t rows, int64_t n);

  // The end of a block of a layer for one row, see NormedRow.
  void (*norm_row)(const NormedRow& row, int64_t n);
  // Rotates each of `heads` rows of 2 * half elements, see attention_block in layer.h.
  void (*rotate)(float* x, const float* cos, const float* sin, int64_t heads, int64_t half);

  // z [rows, n] += bias[row] (null stands for 0), then z is rounded to `dtype`.
  void (*add_bias)(float* z, const float* bias, Dtype dtype, int64_t rows, int64_t n);
  // h = act(z), gated h = act(z) * z2 (clamped_swiglu: of z2 clamped, plus 1); h overlaps neither.
  // Here and below h, dz and dz2 hold 0 in place of subnormal numbers.
  void (*activate)(const float* z, const float* z2, Act act, float* h, int64_t n);

  // dh is the gradient of h before the routing weight w. Computes h and dz = w dh act'(z) (gated:
  // dz and dz2 from z and z2; otherwise z2 and dz2 are null), and returns <dh, h>.
  float (*activate_backward)(const float* dh, const float* z, const float* z2, float w, Act act,
                             float* h, float* dz, float* dz2, int64_t n);

  // acc += w x;  out = w (x + bias), where a null bias stands for 0;  <a, b>.
  void (*add_scaled)(float* acc, const float* x, float w, int64_t n);
  void (*scale_add)(const float* x, float w, const float* bias, float* out, int64_t n);
  float (*dot)(const float* a, const float* b, int64_t n);
  // For four rows at once: out[j] = <a, rows[j]>, all summed in the same order;
  // acc += w[j] rows[j].
  void (*dot4)(const float* a, const float* const* rows, float* out, int64_t n);
  void (*add_scaled4)(float* acc, const float* const* rows, const float* w, int64_t n);

  // out[c * ldo + r] = <row r of a, row c of b> for bf16 rows of length k, lda and ldb apart. b has
  // few rows, so that a is read once, in place. Null if the processor does not multiply bf16.
  void (*dots_bf16)(const uint16_t* a, int64_t lda, int64_t num_rows, const uint16_t* b, int64_t ldb,
                    int64_t num_columns, int64_t k, float* out, int64_t ldo);

  const LogitOps* logits;

  // store of x + bias; a null bias stands for zeros.
  void (*store_sum)(const float* x, const float* bias, Dtype dtype, void* out, int64_t n);
};

// Those of instruction_set().
const SimdOps& simd();

}  // namespace moe_fast
