// This file is compiled once per instruction set; MOE_ISA is the name of each copy. Most functions
// are plain loops that the compiler vectorises; intrinsics are used only where it cannot (16-bit
// floats, transposes).
#include "simd.h"

#include <cmath>
#include <cstring>

#include "exponential.h"
#include "logit_rows.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

#define MOE_STRING2(name) #name
#define MOE_STRING(name) MOE_STRING2(name)

namespace moe_fast {
namespace MOE_ISA {

// Those of simd_norm.cpp.
void norm_row(const NormedRow& row, int64_t n);
void rotate(float* x, const float* cos, const float* sin, int64_t heads, int64_t half);

namespace {

// The bf16 nearest to a float, ties to even, in the lower half; NaN stays NaN.
uint32_t to_bf16(float value) {
  const uint32_t bits = to_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded;
}

#if !defined(__F16C__)
float from_f16(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16;
  const uint32_t magnitude = half & 0x7fffu;
  if (magnitude >= 0x7c00u) return from_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  if (magnitude >= 0x0400u) return from_bits(sign | ((magnitude << 13) + (112u << 23)));
  const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
  return from_bits(sign | to_bits(subnormal));
}

uint16_t to_f16(float value) {
  const uint32_t bits = to_bits(value);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and more
  if (magnitude < 0x38800000u) {  // below 2^-14: adding 1/2 rounds to multiples of 2^-24
    const float sum = from_bits(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (to_bits(sum) - 0x3f000000u));
  }
  const uint32_t rounded = magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u);
  return static_cast<uint16_t>(sign | rounded >> 13);
}
#endif

void load_f16(const uint16_t* source, float* out, int64_t n) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i));
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(half));
  }
  for (; i < n; ++i) out[i] = _cvtsh_ss(source[i]);
#else
  for (; i < n; ++i) out[i] = from_f16(source[i]);
#endif
}

void store_f16(const float* source, uint16_t* out, int64_t n) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8) {
    const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(source + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), half);
  }
  for (; i < n; ++i) out[i] = _cvtss_sh(source[i], _MM_FROUND_TO_NEAREST_INT);
#else
  for (; i < n; ++i) out[i] = to_f16(source[i]);
#endif
}

#if defined(__AVX512BF16__)
// Two vectors of floats as bf16, the first in the lower half. Subnormal results are 0.
inline __m512i rounded_32(const float* lower, const float* upper) {
  return (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(upper), _mm512_loadu_ps(lower));
}
#endif

void load(const void* source, Dtype dtype, float* out, int64_t n) {
  if (dtype == Dtype::f32) {
    std::memcpy(out, source, static_cast<size_t>(n) * sizeof(float));
  } else if (dtype == Dtype::bf16) {
    const auto* bits = static_cast<const uint16_t*>(source);
    for (int64_t i = 0; i < n; ++i) out[i] = from_bits(static_cast<uint32_t>(bits[i]) << 16);
  } else {
    load_f16(static_cast<const uint16_t*>(source), out, n);
  }
}

void store(const float* source, Dtype dtype, void* out, int64_t n) {
  if (dtype == Dtype::f32) {
    std::memcpy(out, source, static_cast<size_t>(n) * sizeof(float));
  } else if (dtype == Dtype::bf16) {
    auto* bits = static_cast<uint16_t*>(out);
    int64_t i = 0;
#if defined(__AVX512BF16__)
    for (; i + 32 <= n; i += 32) _mm512_storeu_si512(bits + i, rounded_32(source + i, source + i + 16));
#endif
    for (; i < n; ++i) bits[i] = static_cast<uint16_t>(to_bf16(source[i]));
  } else {
    store_f16(source, static_cast<uint16_t*>(out), n);
  }
}

void store_sum(const float* x, const float* bias, Dtype dtype, void* out, int64_t n) {
  constexpr int64_t kStep = 64;  // of both, so that the sum does not leave the level 1 cache
  if (bias == nullptr) return store(x, dtype, out, n);
  const int64_t bytes = dtype == Dtype::f32 ? 4 : 2;
  float sum[kStep];
  for (int64_t i = 0; i < n; i += kStep) {
    const int64_t here = n - i < kStep ? n - i : kStep;
    if (here == kStep) {
      for (int64_t j = 0; j < kStep; ++j) sum[j] = x[i + j] + bias[i + j];
    } else {
      for (int64_t j = 0; j < here; ++j) sum[j] = x[i + j] + bias[i + j];
    }
    store(sum, dtype, static_cast<char*>(out) + i * bytes, here);
  }
}

void load_rows(const void* source, Dtype dtype, int64_t ld, int64_t rows, int64_t n, float* out,
               int64_t out_ld) {
  if (dtype != Dtype::bf16) {
    const int64_t bytes = dtype == Dtype::f32 ? 4 : 2;
    const char* row = static_cast<const char*>(source);
    for (int64_t r = 0; r < rows; ++r) load(row + r * ld * bytes, dtype, out + r * out_ld, n);
    return;
  }
  for (int64_t r = 0; r < rows; ++r) {
    const uint16_t* from = static_cast<const uint16_t*>(source) + r * ld;
    float* to = out + r * out_ld;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {  // rows are short: whole vectors, without a prologue
      for (int64_t j = 0; j < 16; ++j) to[i + j] = from_bits(uint32_t{from[i + j]} << 16);
    }
    for (; i < n; ++i) to[i] = from_bits(uint32_t{from[i]} << 16);
  }
}

#if defined(__AVX512F__)
// 16 rows of 16 elements: four rounds, each exchanging blocks twice as large.
void transpose_16x16(const uint32_t* const* rows, int64_t num_rows, int64_t c, uint32_t* out,
                     int64_t ld) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; ++i) {
    a[i] = i < num_rows ? _mm512_loadu_si512(rows[i] + c) : _mm512_setzero_si512();
  }
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
    b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
    b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
    b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    a[i] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88);
    a[i + 8] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd);
    a[i + 4] = _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0x88);
    a[i + 12] = _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0xdd);
  }
  for (int i = 0; i < 16; ++i) _mm512_storeu_si512(out + (c + i) * ld, a[i]);
}
#endif

void transpose(const uint32_t* const* rows, int64_t num_rows, int64_t n, uint32_t* out,
               int64_t ld) {
  int64_t c = 0;
#if defined(__AVX512F__)
  for (; c + 16 <= n; c += 16) transpose_16x16(rows, num_rows, c, out, ld);
#endif
  for (; c < n; ++c) {
    uint32_t* column = out + c * ld;
    for (int64_t r = 0; r < num_rows; ++r) column[r] = rows[r][c];
    for (int64_t r = num_rows; r < 16; ++r) column[r] = 0;
  }
}

void interleave(const uint16_t* a, const uint16_t* b, uint32_t* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    out[i] = static_cast<uint32_t>(a[i]) | static_cast<uint32_t>(b[i]) << 16;
  }
}

void round_pairs(const float* a, const float* b, uint32_t* out, int64_t n) {
  int64_t i = 0;
#if defined(__AVX512BF16__)
  // Element 16 + j of the two vectors goes beside element j.
  alignas(64) static constexpr uint16_t kOrder[32] = {
      0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
      8,  24, 9,  25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i order = _mm512_load_si512(kOrder);
  for (; i + 16 <= n; i += 16) {
    _mm512_storeu_si512(out + i, _mm512_permutexvar_epi16(order, rounded_32(a + i, b + i)));
  }
#endif
  for (; i < n; ++i) out[i] = to_bf16(a[i]) | to_bf16(b[i]) << 16;
}

// Two weights from 0 to 1 as bf16. Ties are rounded away from 0, which saves three instructions.
// NaN may be lost here, but the sum of its column is NaN.
inline uint32_t pair_of_weights(float a, float b) {
  return (to_bits(a) + 0x8000u) >> 16 | ((to_bits(b) + 0x8000u) & 0xffff0000u);
}

constexpr int kLanes = 16;

void softmax_16(float* __restrict x, float scale, int64_t rows, int64_t n, float* __restrict max,
                float* __restrict sum, float* __restrict factor, uint32_t* __restrict pairs) {
  float top[kLanes], total[kLanes];
#pragma omp simd
  for (int i = 0; i < kLanes; ++i) top[i] = max[i];
  for (int64_t r = 0; r < rows; ++r) {
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) {
      const float v = scale * x[r * n + i];
      top[i] = v > top[i] ? v : top[i];
    }
  }
#pragma omp simd
  for (int i = 0; i < kLanes; ++i) {
    const float base = top[i] == -INFINITY ? 0.0f : top[i];
    factor[i] = exp2_below(max[i] - base);
    total[i] = sum[i] * factor[i];
    max[i] = top[i];
    top[i] = base;
  }
  for (int64_t r = 0; r < rows; r += 2) {
    float* a = x + r * n;
    float* b = a + n;
    if (pairs == nullptr) {
#pragma omp simd
      for (int i = 0; i < kLanes; ++i) {
        a[i] = exp2_below(scale * a[i] - top[i]);
        b[i] = exp2_below(scale * b[i] - top[i]);
        total[i] += a[i] + b[i];
      }
    } else {
#pragma omp simd
      for (int i = 0; i < kLanes; ++i) {
        const float p = exp2_below(scale * a[i] - top[i]);
        const float q = exp2_below(scale * b[i] - top[i]);
        pairs[r / 2 * n + i] = pair_of_weights(p, q);
        total[i] += p + q;
      }
    }
  }
#pragma omp simd
  for (int i = 0; i < kLanes; ++i) sum[i] = total[i];
}

void softmax(float* x, float scale, int64_t rows, int64_t n, float* max, float* sum, float* factor,
             uint32_t* pairs) {
  for (int64_t c = 0; c < n; c += kLanes) {
    softmax_16(x + c, scale, rows, n, max + c, sum + c, factor + c,
               pairs == nullptr ? nullptr : pairs + c);
  }
}

void scale_columns(float* __restrict x, const float* __restrict by, int64_t rows, int64_t n) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < n; ++i) x[r * n + i] *= by[i];
  }
}

// The processor takes a hundred cycles longer for a product of subnormal floats. So activations
// store 0 in place of them, and their exponentials end where they cannot make one on the way.
constexpr float kLargestExponent = 80.0f;

inline float without_subnormal(float x) { return std::fabs(x) < 0x1p-126f ? 0.0f : x; }

// exp within 2 units in the last place: 2^k times a polynomial on [-ln(2) / 2, ln(2) / 2] (Cephes).
// It is 0 below exp(-80) = 2e-35, and infinite above exp(80).
inline float fast_exp(float exponent) {
  float x = exponent < -kLargestExponent ? -kLargestExponent : exponent;
  x = x > kLargestExponent ? kLargestExponent : x;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float k = (x * 1.44269504f + kRound) - kRound;
  const float r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const float value = p * from_bits(static_cast<uint32_t>(static_cast<int32_t>(k) + 127) << 23);
  const float high = exponent > kLargestExponent ? INFINITY : value;
  return exponent < -kLargestExponent ? 0.0f : high;
}

constexpr float kLimit = 7.0f;  // of clamped_swiglu

struct ValueAndSlope {
  float value;
  float slope;
};

// The activation and its derivative. If only one is used, the compiler drops the other.
template <Act act>
inline ValueAndSlope evaluate(float z) {
  if constexpr (act == Act::gelu) {
    // erfc(|z| / sqrt(2)) = poly(t) exp(-z^2 / 2), Abramowitz and Stegun 7.1.26: one exponential
    // serves the value and the derivative. The tail is computed from erfc, so it keeps its sign.
    const float a = std::fabs(z) * 0.70710678f;
    const float t = 1.0f / (1.0f + 0.3275911f * a);
    const float e = fast_exp(-a * a);
    float p = 1.061405429f;
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    const float tail = 0.5f * p * t * e;
    const float cdf = z < 0.0f ? tail : 1.0f - tail;
    return {z * cdf, cdf + z * 0.39894228f * e};
  } else if constexpr (act == Act::gelu_tanh) {
    // (1 + tanh(u)) / 2 = 1 / (1 + exp(-2u))
    const float u2 = 1.59576912f * (z + 0.044715f * z * z * z);
    const float s = 1.0f / (1.0f + fast_exp(-u2));
    return {z * s, s + z * s * (1.0f - s) * 1.59576912f * (1.0f + 0.134145f * z * z)};
  } else if constexpr (act == Act::relu) {
    return {z <= 0.0f ? 0.0f : z, z <= 0.0f ? 0.0f : 1.0f};
  } else if constexpr (act == Act::clamped_swiglu) {
    const float g = z > kLimit ? kLimit : z;
    const float s = 1.0f / (1.0f + fast_exp(-1.702f * g));
    return {g * s, z > kLimit ? 0.0f : s + 1.702f * g * s * (1.0f - s)};
  } else {
    const float s = 1.0f / (1.0f + fast_exp(-z));
    return {z * s, s + z * s * (1.0f - s)};
  }
}

void add_bias(float* z, const float* bias, Dtype dtype, int64_t rows, int64_t n) {
  for (int64_t r = 0; r < rows; ++r, z += n) {
    const float b = bias == nullptr ? 0.0f : bias[r];
    if (dtype == Dtype::bf16) {
      int64_t i = 0;
#if defined(__AVX512BF16__)
      for (; i + 16 <= n; i += 16) {
        const __m512 sum = _mm512_add_ps(_mm512_loadu_ps(z + i), _mm512_set1_ps(b));
        const __m512i bits = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(sum));
        _mm512_storeu_si512(z + i, _mm512_slli_epi32(bits, 16));
      }
#endif
      for (; i < n; ++i) z[i] = from_bits(to_bf16(z[i] + b) << 16);
    } else {
      for (int64_t i = 0; i < n; ++i) z[i] += b;
    }
    for (int64_t i = 0; dtype == Dtype::f16 && i < n; i += 64) {
      uint16_t rounded[64];
      const int64_t m = n - i < 64 ? n - i : 64;
      store_f16(z + i, rounded, m);
      load_f16(rounded, z + i, m);
    }
  }
}

// Returns what gated experts multiply the activation by, and its derivative.
template <Act act>
inline ValueAndSlope gate(float z2) {
  if constexpr (act == Act::clamped_swiglu) {
    const float high = z2 > kLimit ? kLimit : z2;
    const float clamped = high < -kLimit ? -kLimit : high;
    return {clamped + 1.0f, std::fabs(z2) > kLimit ? 0.0f : 1.0f};
  } else {
    return {z2, 1.0f};
  }
}

template <Act act>
void activate_as(const float* __restrict z, const float* __restrict z2, float* __restrict h,
                 int64_t n) {
  if (z2 == nullptr) {
    for (int64_t i = 0; i < n; ++i) h[i] = without_subnormal(evaluate<act>(z[i]).value);
  } else {
    for (int64_t i = 0; i < n; ++i) {
      h[i] = without_subnormal(evaluate<act>(z[i]).value * gate<act>(z2[i]).value);
    }
  }
}

template <Act act>
float activate_backward_as(const float* __restrict dh, const float* __restrict z,
                           const float* __restrict z2, float w, float* __restrict h,
                           float* __restrict dz, float* __restrict dz2, int64_t n) {
  float sum = 0.0f;
  if (z2 == nullptr) {
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) {
      const ValueAndSlope f = evaluate<act>(z[i]);
      h[i] = without_subnormal(f.value);
      dz[i] = without_subnormal(w * dh[i] * f.slope);
      sum += dh[i] * h[i];
    }
  } else {
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) {
      const ValueAndSlope f = evaluate<act>(z[i]);
      const ValueAndSlope g = gate<act>(z2[i]);
      h[i] = without_subnormal(f.value * g.value);
      dz[i] = without_subnormal(w * dh[i] * g.value * f.slope);
      dz2[i] = without_subnormal(w * dh[i] * f.value * g.slope);
      sum += dh[i] * h[i];
    }
  }
  return sum;
}

void activate(const float* z, const float* z2, Act act, float* h, int64_t n) {
  switch (act) {
    case Act::gelu: return activate_as<Act::gelu>(z, z2, h, n);
    case Act::gelu_tanh: return activate_as<Act::gelu_tanh>(z, z2, h, n);
    case Act::relu: return activate_as<Act::relu>(z, z2, h, n);
    case Act::silu: return activate_as<Act::silu>(z, z2, h, n);
    case Act::clamped_swiglu: return activate_as<Act::clamped_swiglu>(z, z2, h, n);
  }
}

float activate_backward(const float* dh, const float* z, const float* z2, float w, Act act,
                        float* h, float* dz, float* dz2, int64_t n) {
  switch (act) {
    case Act::gelu: return activate_backward_as<Act::gelu>(dh, z, z2, w, h, dz, dz2, n);
    case Act::gelu_tanh: return activate_backward_as<Act::gelu_tanh>(dh, z, z2, w, h, dz, dz2, n);
    case Act::relu: return activate_backward_as<Act::relu>(dh, z, z2, w, h, dz, dz2, n);
    case Act::silu: return activate_backward_as<Act::silu>(dh, z, z2, w, h, dz, dz2, n);
    case Act::clamped_swiglu:
      return activate_backward_as<Act::clamped_swiglu>(dh, z, z2, w, h, dz, dz2, n);
  }
  return 0.0f;
}

void add_scaled(float* __restrict acc, const float* __restrict x, float w, int64_t n) {
  for (int64_t i = 0; i < n; ++i) acc[i] += w * x[i];
}

void scale_add(const float* x, float w, const float* bias, float* out, int64_t n) {
  if (bias == nullptr) {
    for (int64_t i = 0; i < n; ++i) out[i] = w * x[i];
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = w * (x[i] + bias[i]);
  }
}

float dot(const float* a, const float* b, int64_t n) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

void dot4(const float* __restrict a, const float* const* rows, float* out, int64_t n) {
  const float *b = rows[0], *c = rows[1], *d = rows[2], *e = rows[3];
  float sb = 0.0f, sc = 0.0f, sd = 0.0f, se = 0.0f;
#pragma omp simd reduction(+ : sb, sc, sd, se)
  for (int64_t i = 0; i < n; ++i) {
    sb += a[i] * b[i];
    sc += a[i] * c[i];
    sd += a[i] * d[i];
    se += a[i] * e[i];
  }
  out[0] = sb;
  out[1] = sc;
  out[2] = sd;
  out[3] = se;
}

void add_scaled4(float* __restrict acc, const float* const* rows, const float* w, int64_t n) {
  const float *a = rows[0], *b = rows[1], *c = rows[2], *d = rows[3];
  const float wa = w[0], wb = w[1], wc = w[2], wd = w[3];
  for (int64_t i = 0; i < n; ++i) acc[i] += wa * a[i] + wb * b[i] + wc * c[i] + wd * d[i];
}

#if defined(__AVX512BF16__)
// Dot products of R rows of a with C rows of b. `next` [R, k], lda apart, will be read soon and is
// prefetched, because the processor does not prefetch rows this short.
template <int R, int C>
void dots_tile(const uint16_t* a, int64_t lda, const uint16_t* next, const uint16_t* b, int64_t ldb,
               int64_t k, bool add, float* out, int64_t ldo) {
  const auto load_bf16 = [](const uint16_t* from, __mmask32 mask) {
    return (__m512bh)_mm512_maskz_loadu_epi16(mask, from);
  };
  __m512 sums[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) sums[r][c] = _mm512_setzero_ps();
  }
  for (int64_t i = 0; i < k; i += 32) {
    const __mmask32 mask = k - i >= 32 ? 0xffffffffu : (1u << (k - i)) - 1u;
    __m512bh rows[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      rows[r] = load_bf16(a + r * lda + i, mask);
      _mm_prefetch(reinterpret_cast<const char*>(next + r * lda + i), _MM_HINT_T0);
    }
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      const __m512bh column = load_bf16(b + c * ldb + i, mask);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sums[r][c] = _mm512_dpbf16_ps(sums[r][c], rows[r], column);
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      float& to = out[c * ldo + r];
      to = (add ? to : 0.0f) + _mm512_reduce_add_ps(sums[r][c]);
    }
  }
}

template <int R>
void dots_rows(const uint16_t* a, int64_t lda, const uint16_t* next, const uint16_t* b, int64_t ldb,
               int64_t num_columns, int64_t k, bool add, float* out, int64_t ldo) {
  constexpr auto tile = [](int64_t columns) {
    switch (columns) {
      case 1: return dots_tile<R, 1>;
      case 2: return dots_tile<R, 2>;
      case 3: return dots_tile<R, 3>;
      case 4: return dots_tile<R, 4>;
      case 5: return dots_tile<R, 5>;
      default: return dots_tile<R, 6>;
    }
  };
  for (int64_t c = 0; c < num_columns; c += 6) {
    tile(num_columns - c)(a, lda, next, b + c * ldb, ldb, k, add, out + c * ldo, ldo);
  }
}

void dots_bf16(const uint16_t* a, int64_t lda, int64_t num_rows, const uint16_t* b, int64_t ldb,
               int64_t num_columns, int64_t k, float* out, int64_t ldo) {
  constexpr int64_t kDepth = 768;  // of k at a time, so that the columns stay in the level 1 cache
  for (int64_t i = 0; i < k; i += kDepth) {
    const int64_t depth = k - i < kDepth ? k - i : kDepth;
    int64_t r = 0;
    for (; r + 4 <= num_rows; r += 4) {
      const uint16_t* here = a + r * lda + i;
      dots_rows<4>(here, lda, r + 12 <= num_rows ? here + 8 * lda : here, b + i, ldb, num_columns,
                   depth, i > 0, out + r, ldo);
    }
    for (; r < num_rows; ++r) {
      const uint16_t* here = a + r * lda + i;
      dots_rows<1>(here, lda, here, b + i, ldb, num_columns, depth, i > 0, out + r, ldo);
    }
  }
}
#endif

}  // namespace

extern const LogitOps logit_ops;
extern const SimdOps ops;
const SimdOps ops = {
    MOE_STRING(MOE_ISA), load,     store,    load_rows,         transpose,  interleave, round_pairs,
    softmax,             scale_columns, norm_row, rotate,
    add_bias,            activate, activate_backward, add_scaled, scale_add,  dot,
    dot4,                add_scaled4,
#if defined(__AVX512BF16__)
    dots_bf16,
#else
    nullptr,
#endif
    &logit_ops,
    store_sum,
};

}  // namespace MOE_ISA
}  // namespace moe_fast
