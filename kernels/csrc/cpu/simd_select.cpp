#include <cstdlib>
#include <cstring>

#include "simd.h"

namespace moe_fast {

namespace portable {
extern const SimdOps ops;
}
#if defined(__x86_64__)
namespace avx2 {
extern const SimdOps ops;
}
namespace avx512 {
extern const SimdOps ops;
}
namespace avx512bf16 {
extern const SimdOps ops;
}
#endif

namespace {

const SimdOps& select() {
#if defined(__x86_64__)
  const char* asked = std::getenv("MOE_FAST_CPU");
  const auto allowed = [&](const char* name) {
    return asked == nullptr || std::strcmp(asked, "auto") == 0 || std::strcmp(asked, name) == 0;
  };
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (allowed("avx512bf16") && has_avx512 && __builtin_cpu_supports("avx512bf16")) {
    return avx512bf16::ops;
  }
  if (allowed("avx512") && has_avx512) return avx512::ops;
  if (allowed("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    return avx2::ops;
  }
#endif
  return portable::ops;
}

}  // namespace

const SimdOps& simd() {
  static const SimdOps& chosen = select();
  return chosen;
}

}  // namespace moe_fast
