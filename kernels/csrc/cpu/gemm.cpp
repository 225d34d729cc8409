// torch exports its block kernel as a C++ function, at::native::cpublas::brgemm, outside the stable
// ABI, and its BLAS as Fortran symbols. Both are looked up by name in the libraries that torch has
// loaded, so that a torch without them causes no link error. A name guarantees nothing about what
// the function computes; therefore the block kernel is used only after it has computed a small
// product correctly.
#include "gemm.h"

#include <dlfcn.h>

#include <cstring>
#include <stdexcept>

#include "instruction_set.h"

namespace moe_fast {
namespace {

void* find(const char* name) {
#if defined(__APPLE__)
  static void* library = dlopen("libtorch_cpu.dylib", RTLD_NOLOAD | RTLD_LAZY);
#else
  static void* library = dlopen("libtorch_cpu.so", RTLD_NOLOAD | RTLD_LAZY);
#endif
  return library == nullptr ? nullptr : dlsym(library, name);
}

using BrgemmF32 = void (*)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool,
                           const float*, const float*, float*, bool);
using BrgemmBf16 = void (*)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool,
                            const Bf16*, const Bf16*, float*, bool);
using BrgemmRelease = void (*)(bool);
using Sgemm = void (*)(const char*, const char*, const int*, const int*, const int*, const float*,
                       const float*, const int*, const float*, const int*, const float*, float*,
                       const int*);

const auto brgemm_f32 = reinterpret_cast<BrgemmF32>(
    find("_ZN2at6native7cpublas6brgemmEllllllbPKfS3_Pfb"));
const auto brgemm_bf16 = reinterpret_cast<BrgemmBf16>(
    find("_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb"));
const auto brgemm_release =
    reinterpret_cast<BrgemmRelease>(find("_ZN2at6native7cpublas14brgemm_releaseEb"));
const auto sgemm = reinterpret_cast<Sgemm>(find("sgemm_"));

void block_f32(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b,
               int64_t ldb, float* c, int64_t ldc, bool add) {
  brgemm_f32(m, n, k, lda, ldb, ldc, add, a, b, c, false);
}

void block_bf16(int64_t m, int64_t n, int64_t k, const Bf16* a, int64_t lda, const Bf16* b,
                int64_t ldb, float* c, int64_t ldc, bool add) {
  brgemm_bf16(m, n, k, lda, ldb, ldc, add, a, b, c, true);
}

void release_f32() { brgemm_release(false); }
void release_all() { brgemm_release(true); }

// The BLAS is column-major: a row-major C = A B is its C^T = B^T A^T.
void blas_f32(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b,
              int64_t ldb, float* c, int64_t ldc, bool add) {
  const int dims[] = {static_cast<int>(m),   static_cast<int>(n),   static_cast<int>(k),
                      static_cast<int>(lda), static_cast<int>(ldb), static_cast<int>(ldc)};
  const float one = 1.0f;
  const float keep = add ? 1.0f : 0.0f;
  sgemm("N", "N", &dims[1], &dims[0], &dims[2], &one, b, &dims[4], a, &dims[3], &keep, c,
        &dims[5]);
}

constexpr int kM = 3, kN = 16, kK = 4;

// Whether a product of small integers, which are exact in every dtype, is correct. The rows of A
// and C have padding between them.
template <typename T, typename Product, typename Convert>
bool computes(Product product, Convert convert, bool pairs) {
  T a[kM * (kK + 2)] = {}, b[kK * kN];
  float c[kM * (kN + 1)];
  const auto a_at = [](int i, int k) { return static_cast<float>(i * 2 - k + 1); };
  const auto b_at = [](int k, int j) { return static_cast<float>(k * 3 - j); };
  for (int i = 0; i < kM; ++i) {
    for (int k = 0; k < kK; ++k) a[i * (kK + 2) + k] = convert(a_at(i, k));
  }
  for (int k = 0; k < kK; ++k) {
    for (int j = 0; j < kN; ++j) {
      b[pairs ? (k / 2 * kN + j) * 2 + k % 2 : k * kN + j] = convert(b_at(k, j));
    }
  }
  for (float& v : c) v = 5.0f;
  try {
    product(kM, kN, kK, a, kK + 2, b, kN, c, kN + 1, false);
    product(kM, kN, kK, a, kK + 2, b, kN, c, kN + 1, true);
  } catch (...) {  // "not supported here", an error of torch's own
    return false;
  }
  for (int i = 0; i < kM; ++i) {
    for (int j = 0; j <= kN; ++j) {
      float expected = j == kN ? 5.0f : 0.0f;
      for (int k = 0; j < kN && k < kK; ++k) expected += 2.0f * a_at(i, k) * b_at(k, j);
      if (i * (kN + 1) + j < kM * (kN + 1) && c[i * (kN + 1) + j] != expected) return false;
    }
  }
  return true;
}

bool block_f32_works() {
  return brgemm_f32 != nullptr && brgemm_release != nullptr &&
         computes<float>(block_f32, [](float v) { return v; }, false);
}

bool block_bf16_works() {
  const auto bits = [](float v) {
    uint32_t u;
    std::memcpy(&u, &v, sizeof u);
    return static_cast<Bf16>(u >> 16);
  };
  return brgemm_bf16 != nullptr && brgemm_release != nullptr &&
         computes<Bf16>(block_bf16, bits, true);
}

}  // namespace

const char* why_no_gemm() {
  static const bool blocks = block_f32_works();
  return blocks || sgemm != nullptr ? nullptr
                                    : "this torch exports neither oneDNN's block kernel nor a BLAS";
}

const Gemm& gemm() {
  static const Gemm bf16{block_f32, block_bf16, release_all, "oneDNN float32 and bfloat16"};
  static const Gemm f32{block_f32, nullptr, release_f32, "oneDNN float32"};
  static const Gemm blas{blas_f32, nullptr, [] {}, "BLAS float32"};
  static const bool only_blas = instruction_set() == InstructionSet::portable;
  // Checked in every call: oneDNN can be switched off in torch, and then its kernel throws.
  if (!only_blas && block_f32_works()) return block_bf16_works() ? bf16 : f32;
  if (sgemm == nullptr) throw std::runtime_error(why_no_gemm());
  return blas;
}

}  // namespace moe_fast
