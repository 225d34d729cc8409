// Products of matrix blocks on the calling thread, by libraries that torch ships: oneDNN's block
// kernel (brgemm), which reads our blocks in place, or the BLAS.
#pragma once

#include <cstdint>
#include <string>

namespace moe_fast {

using Bf16 = uint16_t;  // the bits of a bfloat16

// C [M, N] (+)= A [M, K] B [K, N], row-major with leading dimensions; with `add` the product is
// added to C. A bf16 B is stored in pairs of its rows, [K / 2, N, 2]; ldb counts pairs, and K is
// even.
struct Gemm {
  using F32 = void (*)(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda,
                       const float* b, int64_t ldb, float* c, int64_t ldc, bool add);
  using BF16 = void (*)(int64_t m, int64_t n, int64_t k, const Bf16* a, int64_t lda, const Bf16* b,
                        int64_t ldb, float* c, int64_t ldc, bool add);
  // As amx_bf16() in amx.h, which says what sizes it takes.
  using Tiles = void (*)(int64_t m, int64_t n, int64_t k, const Bf16* a, int64_t lda, const Bf16* b,
                         float* c, int64_t ldc, bool add);
  using RoundedTiles = void (*)(int64_t m, int64_t n, int64_t k, const Bf16* a, int64_t lda,
                                const Bf16* b, Bf16* c, int64_t ldc);
  F32 f32;         // never null in the result of gemm()
  BF16 bf16;       // null: bf16 is computed in float32
  Tiles tiles;     // null: all bf16 products are by `bf16`
  RoundedTiles rounded_tiles;  // null as `tiles` is
  void (*finish)();  // each thread calls it after its last product
  const char* name;

  // Whether tiles multiply a left factor of m rows by a right one of k rows.
  bool fits_tiles(int64_t m, int64_t k) const {
    return tiles != nullptr && m % 16 == 0 && k % 32 == 0;
  }
};

// The products that work here and now (torch.backends.mkldnn.enabled may be switched off). Throws
// std::runtime_error if torch has neither library.
const Gemm& gemm();

// The most rows of an expert that dot products serve, by the table of this instruction set.
int64_t most_rows_of_dots(bool fits_tiles);

// Why products cannot be computed; null if they can.
const char* why_no_gemm();

}  // namespace moe_fast
