// Products of 8-bit integers, and the passes around them. One source, int8_simd.cpp, is compiled once
// per instruction set; int8_ops() returns the best that this processor supports. As in simd.h, no
// header of torch may be included.
//
// A left factor holds rows of unsigned bytes, a right one signed bytes in panels of 16 columns. A
// panel is [depth / 4, 16, 4]: the four values that AVX-512 VNNI and AMX multiply at once are
// neighbours. The depth is a multiple of 64, the depth of an AMX tile. All sums are exact.
#pragma once

#include <cstdint>

namespace moe_fast {

constexpr int64_t kInt8Panel = 16;  // columns
constexpr int64_t kInt8Depth = 64;  // depths are multiples of it
constexpr int64_t kInt8Rows = 32;   // rows per call of multiply; factors are padded to it
constexpr int64_t kInt8Columns = 64;  // columns per call of multiply, at most

// How a row of floats became bytes: x is about scale (q - zero).
struct RowScale {
  float scale;
  int32_t zero;
};

// What belongs to some columns of the sums; a null bias is 0.
struct Columns {
  const float* scale;
  const int32_t* weight_sums;
  const float* bias;
};

// Ranges of values, and NaN for those that are not finite.
struct Lanes {
  float low[16], high[16], poison[16];
};

struct Int8Ops {
  const char* name;

  // Each thread calls them before its first product and after its last one.
  void (*begin)();
  void (*finish)();

  // out [rows, 16 panels] = A B, rows of out kInt8Columns apart. a has lda bytes per row; the rows up
  // to the next multiple of 16 are read, and those of out are written, but mean nothing.
  void (*multiply)(const uint8_t* a, int64_t lda, int64_t rows, const int8_t* b, int64_t depth,
                   int64_t panels, int32_t* out);

  // Lowers low to the least value of x and raises high to the greatest. Returns 0, or NaN if a value is
  // not finite.
  float (*range)(const float* x, int64_t n, float* low, float* high);
  // out = x / scale, rounded to nearest even, + zero, limited to 0 .. 255; inverse is 1 / scale.
  // Returns as range does.
  float (*quantize)(const float* x, int64_t n, float inverse, int32_t zero, uint8_t* out);
  // out = row.scale * scale[i] * (sums[i] - row.zero * weight_sums[i]) + bias[i], for rows of sums that
  // are kInt8Columns apart.
  void (*dequantize)(const int32_t* sums, int64_t rows, int64_t n, const RowScale* row,
                     const Columns& columns, float* out, int64_t ld);
  // The same, then GELU, within 2e-5. The range of row r extends the 16 ranges ranges[r]: lane i has
  // columns i, i + 16, ...
  void (*dequantize_gelu)(const int32_t* sums, int64_t rows, int64_t n, const RowScale* row,
                          const Columns& columns, float* out, int64_t ld, Lanes* ranges);
  // x = x + residual, then LayerNorm; a null residual is 0.
  void (*normalize)(float* x, const float* residual, int64_t n, const float* weight,
                    const float* bias, float eps);
};

// That of instruction_set().
const Int8Ops& int8_ops();

}  // namespace moe_fast
