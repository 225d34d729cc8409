// Each thread has eight tiles of 16 rows x 64 bytes. A block of C is 2 x 2 of them; a step adds the
// products of two tiles of A (16 rows x 32 of k) and two of B (16 pairs of k x 16 columns), which is
// as many products as loads. The weights are the left factor, so that they are read in place, once,
// and the few rows of x beside them are what is packed.
#include "amx.h"

#include <immintrin.h>

#include <cstddef>

#include "panels.h"

namespace moe_fast {
namespace {

constexpr int64_t kTile = 16;      // rows of a tile, and columns of floats
constexpr int64_t kStep = 32;      // of k in a tile
constexpr int64_t kColumns = 384;  // of B at a time, with
constexpr int64_t kDepth = 512;    // of k: .4 MB stay in the level 2 cache, 32 KB of A in level 1
constexpr int64_t kFewColumns = 32;  // up to here A is read once, and waiting for it takes the time

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
constexpr TileConfig kConfig;

// A tile in memory: where it begins, and the bytes between its rows.
struct Place {
  char* data;
  int64_t ld;
};

// Reads the 32 rows after a step's early. An address that is not ours does no harm here.
inline void prefetch_rows(const char* data, int64_t ld) {
  for (int64_t r = 0; r < 2 * kTile; ++r) _mm_prefetch(data + r * ld, _MM_HINT_T1);
}

// One block of C: Rows x Columns tiles. c[i][j] and b[j] are tiles; the second row of tiles of A is
// 16 rows below the first.
template <int Rows, int Columns, bool Ahead>
void block(const char* a, int64_t lda, const Place* b, const Place (*c)[2], int64_t steps,
           bool add) {
  if (add) {
    _tile_loadd(0, c[0][0].data, c[0][0].ld);
    if (Columns == 2) _tile_loadd(1, c[0][1].data, c[0][1].ld);
    if (Rows == 2) _tile_loadd(2, c[1][0].data, c[1][0].ld);
    if (Rows == 2 && Columns == 2) _tile_loadd(3, c[1][1].data, c[1][1].ld);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  const char* below = a + kTile * lda;
  const char* after = a + 2 * kTile * lda;
  for (int64_t s = 0; s < steps; ++s) {
    _tile_loadd(4, a + s * 64, lda);
    _tile_loadd(6, b[0].data + s * kTile * b[0].ld, b[0].ld);
    _tile_dpbf16ps(0, 4, 6);
    if (Columns == 2) {
      _tile_loadd(7, b[1].data + s * kTile * b[1].ld, b[1].ld);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (Rows == 2) {
      _tile_loadd(5, below + s * 64, lda);
      _tile_dpbf16ps(2, 5, 6);
      if (Columns == 2) _tile_dpbf16ps(3, 5, 7);
    }
    if (Ahead) prefetch_rows(after + s * 64, lda);
  }
  _tile_stored(0, c[0][0].data, c[0][0].ld);
  if (Columns == 2) _tile_stored(1, c[0][1].data, c[0][1].ld);
  if (Rows == 2) _tile_stored(2, c[1][0].data, c[1][0].ld);
  if (Rows == 2 && Columns == 2) _tile_stored(3, c[1][1].data, c[1][1].ld);
}

// The whole product's operands, to find tiles in them.
struct Product {
  int64_t m, n, k;
  const uint16_t* b;
  float* c;
  int64_t ldc;

  Place b_tile(int64_t column, int64_t k0) const {
    const int64_t panel = panel_of(n, column), w = panel_width(n, panel);
    const uint16_t* at = b + panel * k + k0 * w + 2 * (column - panel);
    return {reinterpret_cast<char*>(const_cast<uint16_t*>(at)), w * 4};
  }
  Place c_tile(int64_t row, int64_t column) const {
    const int64_t panel = panel_of(n, column), w = panel_width(n, panel);
    float* at = c + row * ldc + column;
    if (ldc == 0) at = c + panel * m + row * w + (column - panel);
    return {reinterpret_cast<char*>(at), (ldc == 0 ? w : ldc) * 4};
  }
};

// Multiplies rows of A from `row` on, k0 .. k0 + depth of them, by columns first .. last of B.
template <int Rows, bool Ahead>
void row_of_blocks(const Product& p, int64_t row, const uint16_t* a, int64_t lda, int64_t first,
                   int64_t last, int64_t k0, int64_t depth, bool add) {
  const char* rows = reinterpret_cast<const char*>(a + row * lda + k0);
  for (int64_t column = first; column < last; column += 2 * kTile) {
    const bool two = column + kTile < last;
    const int64_t next = two ? column + kTile : column;
    const int64_t below = Rows == 2 ? row + kTile : row;
    const Place b[2] = {p.b_tile(column, k0), p.b_tile(next, k0)};
    const Place c[2][2] = {{p.c_tile(row, column), p.c_tile(row, next)},
                           {p.c_tile(below, column), p.c_tile(below, next)}};
    if (two) {
      block<Rows, 2, Ahead>(rows, lda * 2, b, c, depth / kStep, add);
    } else {
      block<Rows, 1, Ahead>(rows, lda * 2, b, c, depth / kStep, add);
    }
  }
}

// The same for all of k; the results are rounded to `out`, ldo apart, while they are in the level 1
// cache.
template <int Rows>
void rounded_blocks(const Product& p, int64_t row, const uint16_t* a, int64_t lda, int64_t first,
                    int64_t last, uint16_t* out, int64_t ldo) {
  alignas(64) float sums[2 * kTile][2 * kTile];
  const auto place = [&](int64_t i, int64_t j) {
    return Place{reinterpret_cast<char*>(&sums[i][j]), sizeof sums[0]};
  };
  const Place c[2][2] = {{place(0, 0), place(0, kTile)}, {place(kTile, 0), place(kTile, kTile)}};
  const char* rows = reinterpret_cast<const char*>(a + row * lda);
  for (int64_t column = first; column < last; column += 2 * kTile) {
    const bool two = column + kTile < last;
    const Place b[2] = {p.b_tile(column, 0), p.b_tile(two ? column + kTile : column, 0)};
    if (two) {
      block<Rows, 2, false>(rows, lda * 2, b, c, p.k / kStep, false);
    } else {
      block<Rows, 1, false>(rows, lda * 2, b, c, p.k / kStep, false);
    }
    for (int64_t i = 0; i < Rows * kTile; ++i) {
      uint16_t* to = out + (row + i) * ldo + column;
      const __m512 lower = _mm512_load_ps(sums[i]);
      if (two) {
        const __m512 upper = _mm512_load_ps(sums[i] + kTile);
        _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(upper, lower));
      } else {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(lower));
      }
    }
  }
}

}  // namespace

void amx_bf16(int64_t m, int64_t n, int64_t k, const uint16_t* a, int64_t lda, const uint16_t* b,
              float* c, int64_t ldc, bool add) {
  const Product p{m, n, k, b, c, ldc};
  _tile_loadconfig(&kConfig);
  for (int64_t k0 = 0; k0 < k; k0 += kDepth) {
    const int64_t depth = k - k0 < kDepth ? k - k0 : kDepth;
    for (int64_t first = 0; first < n; first += kColumns) {
      const int64_t last = n - first < kColumns ? n : first + kColumns;
      int64_t row = 0;
      for (; row + 2 * kTile <= m; row += 2 * kTile) {
        const auto step = n <= kFewColumns ? row_of_blocks<2, true> : row_of_blocks<2, false>;
        step(p, row, a, lda, first, last, k0, depth, add || k0 > 0);
      }
      if (row < m) row_of_blocks<1, false>(p, row, a, lda, first, last, k0, depth, add || k0 > 0);
    }
  }
  _tile_release();
}

void amx_bf16_rounded(int64_t m, int64_t n, int64_t k, const uint16_t* a, int64_t lda,
                      const uint16_t* b, uint16_t* c, int64_t ldc) {
  const Product p{m, n, k, b, nullptr, 0};
  _tile_loadconfig(&kConfig);
  for (int64_t first = 0; first < n; first += kColumns) {
    const int64_t last = n - first < kColumns ? n : first + kColumns;
    int64_t row = 0;
    for (; row + 2 * kTile <= m; row += 2 * kTile) {
      rounded_blocks<2>(p, row, a, lda, first, last, c, ldc);
    }
    if (row < m) rounded_blocks<1>(p, row, a, lda, first, last, c, ldc);
  }
  _tile_release();
}

}  // namespace moe_fast
