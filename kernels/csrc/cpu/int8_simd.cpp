// This file is compiled once per instruction set; MOE_ISA is the name of each copy. The products are
// written with intrinsics; the other functions are loops that the compiler vectorises.
#include "int8_simd.h"

#include <cmath>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define MOE_STRING2(name) #name
#define MOE_STRING(name) MOE_STRING2(name)

namespace moe_fast {
namespace MOE_ISA {
namespace {

#if defined(__AMX_INT8__)

// A tile holds 16 rows of 64 bytes: 16 rows of A, 64 values deep, or 16 groups of four rows of B by 16
// columns, or 16 x 16 sums.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

void begin() {
  static const TileConfig config = [] {
    TileConfig c;
    for (int i = 0; i < 8; ++i) {
      c.bytes[i] = 64;
      c.rows[i] = 16;
    }
    return c;
  }();
  _tile_loadconfig(&config);
}

void finish() { _tile_release(); }

constexpr int64_t kRowBytes = kInt8Columns * 4;  // of sums

// 32 rows by 32 columns in four tiles.
void multiply_2x2(const uint8_t* a, int64_t lda, const int8_t* b, int64_t depth, int32_t* out) {
  const uint8_t* lower = a + 16 * lda;
  const int8_t* right = b + 16 * depth;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < depth; k += 64) {
    _tile_loadd(4, a + k, lda);
    _tile_loadd(6, b + k * 16, 64);
    _tile_dpbusd(0, 4, 6);
    _tile_loadd(7, right + k * 16, 64);
    _tile_dpbusd(1, 4, 7);
    _tile_loadd(5, lower + k, lda);
    _tile_dpbusd(2, 5, 6);
    _tile_dpbusd(3, 5, 7);
  }
  _tile_stored(0, out, kRowBytes);
  _tile_stored(1, out + 16, kRowBytes);
  _tile_stored(2, out + 16 * kInt8Columns, kRowBytes);
  _tile_stored(3, out + 16 * kInt8Columns + 16, kRowBytes);
}

// 16 rows by 64 columns.
void multiply_1x4(const uint8_t* a, int64_t lda, const int8_t* b, int64_t depth, int32_t* out) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < depth; k += 64) {
    const int8_t* from = b + k * 16;
    _tile_loadd(4, a + k, lda);
    _tile_loadd(5, from, 64);
    _tile_dpbusd(0, 4, 5);
    _tile_loadd(6, from + 16 * depth, 64);
    _tile_dpbusd(1, 4, 6);
    _tile_loadd(7, from + 32 * depth, 64);
    _tile_dpbusd(2, 4, 7);
    _tile_loadd(5, from + 48 * depth, 64);
    _tile_dpbusd(3, 4, 5);
  }
  _tile_stored(0, out, kRowBytes);
  _tile_stored(1, out + 16, kRowBytes);
  _tile_stored(2, out + 32, kRowBytes);
  _tile_stored(3, out + 48, kRowBytes);
}

// 16 rows by 16 columns.
void multiply_1x1(const uint8_t* a, int64_t lda, const int8_t* b, int64_t depth, int32_t* out) {
  _tile_zero(0);
  for (int64_t k = 0; k < depth; k += 64) {
    _tile_loadd(4, a + k, lda);
    _tile_loadd(5, b + k * 16, 64);
    _tile_dpbusd(0, 4, 5);
  }
  _tile_stored(0, out, kRowBytes);
}

void multiply(const uint8_t* a, int64_t lda, int64_t rows, const int8_t* b, int64_t depth,
              int64_t panels, int32_t* out) {
  const bool few = rows <= 16;
  int64_t p = 0;
  if (few && panels == 4) {
    multiply_1x4(a, lda, b, depth, out);
    return;
  }
  for (; !few && p + 2 <= panels; p += 2) {
    multiply_2x2(a, lda, b + p * 16 * depth, depth, out + p * 16);
  }
  for (; p < panels; ++p) {
    multiply_1x1(a, lda, b + p * 16 * depth, depth, out + p * 16);
    if (!few) {
      multiply_1x1(a + 16 * lda, lda, b + p * 16 * depth, depth,
                   out + 16 * kInt8Columns + p * 16);
    }
  }
}

#elif defined(__AVX2__)

void begin() {}
void finish() {}

#if defined(__AVX512BW__)
using Vector = __m512i;
constexpr int kVectors = 1;  // per panel
inline Vector load(const int8_t* from) { return _mm512_loadu_si512(from); }
inline Vector zero() { return _mm512_setzero_si512(); }
inline void save(int32_t* to, Vector v) { _mm512_storeu_si512(to, v); }
inline Vector spread(int32_t four) { return _mm512_set1_epi32(four); }
#else
using Vector = __m256i;
constexpr int kVectors = 2;
inline Vector load(const int8_t* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}
inline Vector zero() { return _mm256_setzero_si256(); }
inline void save(int32_t* to, Vector v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), v);
}
inline Vector spread(int32_t four) { return _mm256_set1_epi32(four); }
#endif

#if defined(__AVX512VNNI__)
struct Right {
  Vector v;
  explicit Right(const int8_t* from) : v(load(from)) {}
};
inline Vector add_product(Vector sum, Vector a, const Right& b) {
  return _mm512_dpbusd_epi32(sum, a, b.v);
}
constexpr int kTileRows = 6, kTilePanels = 4;
#else
// maddubs would saturate: values of even and of odd places are multiplied as 16-bit integers.
#if defined(__AVX512BW__)
struct Right {
  Vector even, odd;
  explicit Right(const int8_t* from) {
    const Vector v = load(from);
    even = _mm512_srai_epi16(_mm512_slli_epi16(v, 8), 8);
    odd = _mm512_srai_epi16(v, 8);
  }
};
inline Vector add_product(Vector sum, Vector a, const Right& b) {
  const Vector even = _mm512_and_si512(a, _mm512_set1_epi16(0xff));
  const Vector odd = _mm512_srli_epi16(a, 8);
  sum = _mm512_add_epi32(sum, _mm512_madd_epi16(even, b.even));
  return _mm512_add_epi32(sum, _mm512_madd_epi16(odd, b.odd));
}
constexpr int kTileRows = 6, kTilePanels = 2;
#else
struct Right {
  Vector even, odd;
  explicit Right(const int8_t* from) {
    const Vector v = load(from);
    even = _mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8);
    odd = _mm256_srai_epi16(v, 8);
  }
};
inline Vector add_product(Vector sum, Vector a, const Right& b) {
  const Vector even = _mm256_and_si256(a, _mm256_set1_epi16(0xff));
  const Vector odd = _mm256_srli_epi16(a, 8);
  sum = _mm256_add_epi32(sum, _mm256_madd_epi16(even, b.even));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(odd, b.odd));
}
constexpr int kTileRows = 4, kTilePanels = 1;
#endif
#endif

// R rows by P panels.
template <int R, int P>
void multiply_tile(const uint8_t* a, int64_t lda, const int8_t* b, int64_t depth, int32_t* out) {
  Vector sums[R][P * kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < P * kVectors; ++v) sums[r][v] = zero();
  }
  for (int64_t k = 0; k < depth; k += 4) {
#pragma GCC unroll 8
    for (int v = 0; v < P * kVectors; ++v) {
      const int64_t panel = v / kVectors, half = v % kVectors;
      const Right right(b + panel * 16 * depth + k * 16 + half * 32);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        int32_t four;
        std::memcpy(&four, a + r * lda + k, sizeof four);
        sums[r][v] = add_product(sums[r][v], spread(four), right);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < P * kVectors; ++v) {
      save(out + r * kInt8Columns + v * (16 / kVectors), sums[r][v]);
    }
  }
}

template <int P>
void multiply_panels(const uint8_t* a, int64_t lda, int64_t rows, const int8_t* b, int64_t depth,
                     int32_t* out) {
  int64_t r = 0;
  for (; r + kTileRows <= rows; r += kTileRows) {
    multiply_tile<kTileRows, P>(a + r * lda, lda, b, depth, out + r * kInt8Columns);
  }
  for (; r + 2 <= rows; r += 2) {
    multiply_tile<2, P>(a + r * lda, lda, b, depth, out + r * kInt8Columns);
  }
  for (; r < rows; ++r) multiply_tile<1, P>(a + r * lda, lda, b, depth, out + r * kInt8Columns);
}

void multiply(const uint8_t* a, int64_t lda, int64_t rows, const int8_t* b, int64_t depth,
              int64_t panels, int32_t* out) {
  int64_t p = 0;
  for (; p + kTilePanels <= panels; p += kTilePanels) {
    multiply_panels<kTilePanels>(a, lda, rows, b + p * 16 * depth, depth, out + p * 16);
  }
  for (; p < panels; ++p) {
    multiply_panels<1>(a, lda, rows, b + p * 16 * depth, depth, out + p * 16);
  }
}

#else

void begin() {}
void finish() {}

void multiply(const uint8_t* a, int64_t lda, int64_t rows, const int8_t* b, int64_t depth,
              int64_t panels, int32_t* out) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t p = 0; p < panels; ++p) {
      int32_t* sums = out + r * kInt8Columns + p * 16;
      std::memset(sums, 0, 16 * sizeof(int32_t));
      for (int64_t k = 0; k < depth; k += 4) {
        const int8_t* group = b + p * 16 * depth + k * 16;
        for (int64_t c = 0; c < 16; ++c) {
          for (int64_t i = 0; i < 4; ++i) sums[c] += a[r * lda + k + i] * group[c * 4 + i];
        }
      }
    }
  }
}

#endif

float range(const float* x, int64_t n, float* low, float* high) {
  float least = *low, most = *high, poison = 0.0f;
#pragma omp simd reduction(min : least) reduction(max : most) reduction(+ : poison)
  for (int64_t i = 0; i < n; ++i) {
    least = x[i] < least ? x[i] : least;
    most = x[i] > most ? x[i] : most;
    poison += x[i] * 0.0f;
  }
  *low = least;
  *high = most;
  return poison;
}

float quantize(const float* x, int64_t n, float inverse, int32_t zero, uint8_t* out) {
  float poison = 0.0f;
  int64_t i = 0;
#if defined(__AVX512BW__)
  const __m512i shift = _mm512_set1_epi32(zero);
  const __m512 factor = _mm512_set1_ps(inverse);
  __m512 poisons = _mm512_setzero_ps();
  for (; i + 16 <= n; i += 16) {
    const __m512 v = _mm512_loadu_ps(x + i);
    poisons = _mm512_fmadd_ps(v, _mm512_setzero_ps(), poisons);
    __m512i q = _mm512_add_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(v, factor)), shift);
    q = _mm512_max_epi32(q, _mm512_setzero_si512());
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm512_cvtusepi32_epi8(q));
  }
  poison = _mm512_reduce_add_ps(poisons);
#endif
  for (; i < n; ++i) {
    poison += x[i] * 0.0f;
    // Limited before the conversion, which is undefined out of range; NaN becomes 0.
    float v = x[i] * inverse;
    v = v > -512.0f ? v : -512.0f;
    v = v < 512.0f ? v : 512.0f;
    const int32_t q = static_cast<int32_t>(std::nearbyint(v)) + zero;
    out[i] = static_cast<uint8_t>(q < 0 ? 0 : q > 255 ? 255 : q);
  }
  return poison;
}

template <bool has_bias>
void dequantize_row(const int32_t* __restrict sums, int64_t n, RowScale row,
                    const float* __restrict scale, const int32_t* __restrict weight_sums,
                    const float* __restrict bias, float* __restrict out) {
  for (int64_t i = 0; i < n; ++i) {
    const auto v = static_cast<float>(sums[i] - row.zero * weight_sums[i]);
    out[i] = v * (row.scale * scale[i]) + (has_bias ? bias[i] : 0.0f);
  }
}

void dequantize(const int32_t* sums, int64_t rows, int64_t n, const RowScale* row,
                const Columns& columns, float* out, int64_t ld) {
  const auto one = columns.bias == nullptr ? dequantize_row<false> : dequantize_row<true>;
  for (int64_t r = 0; r < rows; ++r) {
    one(sums + r * kInt8Columns, n, row[r], columns.scale, columns.weight_sums, columns.bias,
        out + r * ld);
  }
}

// x Phi(x) within 1.6e-5. Phi(u) - 1/2 is u times a polynomial in s = 2 (u / 4.5)^2 - 1, fitted for the
// least greatest error of the product; beyond 4.5, Phi counts as 0 or 1.
inline float gelu(float x) {
  constexpr float kEnd = 4.5f;
  const float u = x > kEnd ? kEnd : x < -kEnd ? -kEnd : x;
  const float s = u * u * (2.0f / (kEnd * kEnd)) - 1.0f;
  float p = -1.5656769e-3f;
  p = p * s + 4.6553197e-3f;
  p = p * s - 6.6828300e-3f;
  p = p * s + 1.0140462e-2f;
  p = p * s - 1.8159231e-2f;
  p = p * s + 2.8623967e-2f;
  p = p * s - 4.0295787e-2f;
  p = p * s + 5.4671850e-2f;
  p = p * s - 7.7183370e-2f;
  p = p * s + 1.5690530e-1f;
  const float y = x * (u * p + 0.5f);
  return x > kEnd ? x : x < -kEnd ? 0.0f : y;  // NaN is y
}

constexpr int kLanes = 16;

void gelu_16(const int32_t* __restrict sums, RowScale row, const float* __restrict scale,
             const int32_t* __restrict weight_sums, const float* __restrict bias,
             float* __restrict out, Lanes* __restrict range) {
#pragma omp simd
  for (int i = 0; i < kLanes; ++i) {
    const auto v = static_cast<float>(sums[i] - row.zero * weight_sums[i]);
    const float z = v * (row.scale * scale[i]) + bias[i];
    const float h = gelu(z);
    out[i] = h;
    range->low[i] = h < range->low[i] ? h : range->low[i];
    range->high[i] = h > range->high[i] ? h : range->high[i];
    range->poison[i] += z * 0.0f;
  }
}

void dequantize_gelu(const int32_t* sums, int64_t rows, int64_t n, const RowScale* row,
                     const Columns& columns, float* out, int64_t ld, Lanes* ranges) {
  // The last columns, with zeros behind them, and the bias.
  alignas(64) float scale[kInt8Columns] = {}, bias[kInt8Columns] = {}, rest[kLanes];
  alignas(64) int32_t weight_sums[kInt8Columns] = {};
  const auto bytes = static_cast<size_t>(n) * 4;
  std::memcpy(scale, columns.scale, bytes);
  std::memcpy(weight_sums, columns.weight_sums, bytes);
  if (columns.bias != nullptr) std::memcpy(bias, columns.bias, bytes);
  for (int64_t r = 0; r < rows; ++r) {
    const int32_t* from = sums + r * kInt8Columns;
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      gelu_16(from + i, row[r], scale + i, weight_sums + i, bias + i, out + r * ld + i, ranges + r);
    }
    if (i < n) {
      gelu_16(from + i, row[r], scale + i, weight_sums + i, bias + i, rest, ranges + r);
      std::memcpy(out + r * ld + i, rest, static_cast<size_t>(n - i) * sizeof(float));
    }
  }
}

void normalize(float* __restrict x, const float* __restrict residual, int64_t n,
               const float* __restrict weight, const float* __restrict bias, float eps) {
  float sum = 0.0f;
  if (residual != nullptr) {
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) {
      x[i] += residual[i];
      sum += x[i];
    }
  } else {
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum += x[i];
  }
  const float mean = sum / static_cast<float>(n);
  float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < n; ++i) squares += (x[i] - mean) * (x[i] - mean);
  const float factor = 1.0f / std::sqrt(squares / static_cast<float>(n) + eps);
  for (int64_t i = 0; i < n; ++i) x[i] = (x[i] - mean) * factor * weight[i] + bias[i];
}

}  // namespace

extern const Int8Ops int8_ops;
const Int8Ops int8_ops = {MOE_STRING(MOE_ISA), begin,      finish,          multiply, range,
                          quantize,            dequantize, dequantize_gelu, normalize};

}  // namespace MOE_ISA
}  // namespace moe_fast
