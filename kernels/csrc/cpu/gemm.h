// Products of matrix blocks, on the calling thread, by the libraries that torch ships: oneDNN's
// block kernel (brgemm), which works on our blocks in place, or the BLAS.
#pragma once

#include <cstdint>
#include <string>

namespace moe_fast {

using Bf16 = uint16_t;  // its bits

// C [M, N] (+)= A [M, K] B [K, N], row-major with leading dimensions; `add` keeps what C holds.
// B of bf16 is stored in pairs of its rows: [K / 2, N, 2], ldb counting pairs; K is even.
struct Gemm {
  using F32 = void (*)(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda,
                       const float* b, int64_t ldb, float* c, int64_t ldc, bool add);
  using BF16 = void (*)(int64_t m, int64_t n, int64_t k, const Bf16* a, int64_t lda, const Bf16* b,
                        int64_t ldb, float* c, int64_t ldc, bool add);
  F32 f32;         // never null in what gemm() returns
  BF16 bf16;       // null: bf16 is computed in float32
  void (*finish)();  // each thread calls it after its last product
  const char* name;
};

// What works here now (torch.backends.mkldnn.enabled may be switched off). Throws
// std::runtime_error where torch has neither library.
const Gemm& gemm();

// Null, or why there is nothing to compute products with.
const char* why_no_gemm();

}  // namespace moe_fast
