// Products of bf16 blocks by AMX tiles. No headers of torch here, see simd.h.
#pragma once

#include <cstdint>

namespace moe_fast {

// C (+)= A B for A [m, k], lda apart, which is read in place, and a packed right factor B of n
// columns (packing.h). C is row-major, ldc apart; ldc = 0 stands for one contiguous tile [m, width]
// per panel of B. m is a multiple of 16 and k of 32; so is n of 16 if ldc is not 0. The sums are
// float32. Subnormal numbers count as 0, as AMX has it.
void amx_bf16(int64_t m, int64_t n, int64_t k, const uint16_t* a, int64_t lda, const uint16_t* b,
              float* c, int64_t ldc, bool add);

// C = A B, rounded to bf16; n is a multiple of 16.
void amx_bf16_rounded(int64_t m, int64_t n, int64_t k, const uint16_t* a, int64_t lda,
                      const uint16_t* b, uint16_t* c, int64_t ldc);

}  // namespace moe_fast
