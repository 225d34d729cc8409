// torch exports its block kernel as a C++ function, at::native::cpublas::brgemm, outside the stable
// ABI, and its BLAS as Fortran symbols. Both are looked up by name in the libraries that torch has
// loaded, so that a torch without them causes no link error. A name guarantees nothing about what
// the function computes; therefore the block kernel is used only after it has computed a small
// product correctly.
#include "gemm.h"

#include <dlfcn.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <vector>

#include "amx.h"
#include "instruction_set.h"
#include "product_table.h"

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

// oneDNN leaves tiles configured for its last kernel until it is told that no more will follow.
thread_local bool onednn_has_tiles = false;

void block_bf16(int64_t m, int64_t n, int64_t k, const Bf16* a, int64_t lda, const Bf16* b,
                int64_t ldb, float* c, int64_t ldc, bool add) {
  onednn_has_tiles = true;
  brgemm_bf16(m, n, k, lda, ldb, ldc, add, a, b, c, true);
}

void release_f32() { brgemm_release(false); }
void release_all() {
  brgemm_release(true);
  onednn_has_tiles = false;
}

#if defined(MOE_AMX)
void tiles_bf16(int64_t m, int64_t n, int64_t k, const Bf16* a, int64_t lda, const Bf16* b,
                float* c, int64_t ldc, bool add) {
  if (onednn_has_tiles) release_all();
  amx_bf16(m, n, k, a, lda, b, c, ldc, add);
}

void rounded_tiles_bf16(int64_t m, int64_t n, int64_t k, const Bf16* a, int64_t lda, const Bf16* b,
                        Bf16* c, int64_t ldc) {
  if (onednn_has_tiles) release_all();
  amx_bf16_rounded(m, n, k, a, lda, b, c, ldc);
}
#endif

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

Bf16 bf16_of(float v) {  // exact for small integers
  uint32_t u;
  std::memcpy(&u, &v, sizeof u);
  return static_cast<Bf16>(u >> 16);
}

bool block_bf16_works() {
  if (brgemm_bf16 == nullptr || brgemm_release == nullptr) return false;
  const bool works = computes<Bf16>(block_bf16, bf16_of, true);
  release_all();
  return works;
}

#if defined(MOE_AMX)
float float_of(Bf16 v) {
  const uint32_t u = static_cast<uint32_t>(v) << 16;
  float f;
  std::memcpy(&f, &u, sizeof f);
  return f;
}

// Whether AMX multiplies small integers correctly, as one block of each kind that has several tiles.
bool tiles_work() {
  constexpr int m = 48, n = 48, k = 64;
  const auto a_at = [](int i, int p) { return static_cast<float>((i * 3 + p * 5) % 7 - 3); };
  const auto b_at = [](int p, int j) { return static_cast<float>((p * 2 + j * 3) % 5 - 2); };
  std::vector<Bf16> a(m * k), b(k * n);
  std::vector<float> c(m * n, 5.0f);
  for (int i = 0; i < m; ++i) {
    for (int p = 0; p < k; ++p) a[i * k + p] = bf16_of(a_at(i, p));
  }
  for (int p = 0; p < k; ++p) {
    for (int j = 0; j < n; ++j) b[(p / 2 * n + j) * 2 + p % 2] = bf16_of(b_at(p, j));
  }
  tiles_bf16(m, n, k, a.data(), k, b.data(), c.data(), n, true);
  std::vector<Bf16> rounded(m * n);
  rounded_tiles_bf16(m, n, k, a.data(), k, b.data(), rounded.data(), n);
  for (int i = 0; i < m; ++i) {
    for (int j = 0; j < n; ++j) {
      float expected = 0.0f;  // at most 6 k: a bf16 near to it is within 1
      for (int p = 0; p < k; ++p) expected += a_at(i, p) * b_at(p, j);
      if (c[i * n + j] != 5.0f + expected) return false;
      if (std::fabs(float_of(rounded[i * n + j]) - expected) > 1.0f) return false;
    }
  }
  return true;
}
#endif

// The product that MOE_FAST_PRODUCT in the environment asks for, for measurements and tests.
Bf16Product forced() {
  const char* asked = std::getenv("MOE_FAST_PRODUCT");
  if (asked == nullptr || *asked == '\0') return Bf16Product::automatic;
  for (int i = 0; i < 4; ++i) {
    if (std::strcmp(asked, kBf16Products[i]) == 0) return static_cast<Bf16Product>(i);
  }
  throw std::runtime_error(
      std::string("MOE_FAST_PRODUCT must be auto, dots, blocks or tiles; got '") + asked + "'.");
}

// Adds the products by tiles, if this process uses them.
Gemm with_tiles(Gemm products) {
  const Bf16Product only = forced();
  const bool dots = instruction_set() >= InstructionSet::avx512bf16;
  const bool tiles = instruction_set() == InstructionSet::amx;
  if ((only == Bf16Product::dots && !dots) || (only == Bf16Product::tiles && !tiles)) {
    throw std::runtime_error(std::string("MOE_FAST_PRODUCT asks for ") +
                             kBf16Products[static_cast<int>(only)] + ", which " +
                             name_of(instruction_set()) + " does not have.");
  }
#if defined(MOE_AMX)
  const bool wanted = only == Bf16Product::automatic || only == Bf16Product::tiles;
  if (wanted && tiles && tiles_work()) {
    products.tiles = tiles_bf16;
    products.rounded_tiles = rounded_tiles_bf16;
    products.name = "oneDNN float32 and bfloat16, AMX tiles";
  }
#endif
  return products;
}

}  // namespace

const char* why_no_gemm() {
  static const bool blocks = block_f32_works();
  return blocks || sgemm != nullptr ? nullptr
                                    : "this torch exports neither oneDNN's block kernel nor a BLAS";
}

const Gemm& gemm() {
  static const Gemm bf16 = with_tiles({block_f32, block_bf16, nullptr, nullptr, release_all,
                                       "oneDNN float32 and bfloat16"});
  static const Gemm f32{block_f32, nullptr, nullptr, nullptr, release_f32, "oneDNN float32"};
  static const Gemm blas{blas_f32, nullptr, nullptr, nullptr, [] {}, "BLAS float32"};
  static const bool only_blas = instruction_set() == InstructionSet::portable;
  // Checked in every call: oneDNN can be switched off in torch, and then its kernel throws.
  if (!only_blas && block_f32_works()) return block_bf16_works() ? bf16 : f32;
  if (sgemm == nullptr) throw std::runtime_error(why_no_gemm());
  return blas;
}

int64_t most_rows_of_dots(bool fits_tiles) {
  static const Bf16Product only = forced();
  if (only != Bf16Product::automatic) {
    return only == Bf16Product::dots ? std::numeric_limits<int64_t>::max() : 0;
  }
  for (const MostRowsOfDots& entry : kMostRowsOfDots) {
    if (entry.set == instruction_set()) return fits_tiles ? entry.beside_tiles : entry.beside_blocks;
  }
  return 0;
}

}  // namespace moe_fast
