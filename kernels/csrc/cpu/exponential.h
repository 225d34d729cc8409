// The exponential of base 2 that the files compiled per instruction set share. It has internal linkage:
// the linker must not replace one copy by that of another instruction set.
#pragma once

#include <cstdint>
#include <cstring>

namespace moe_fast {
namespace MOE_ISA {
namespace {

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// 2^x for x <= 0 (or slightly above), within 1.1e-7: 2^k times a polynomial on [-1/2, 1/2], minimax
// within 3e-9. It is 0 below about -127, where k = -127 makes the bits of the exponent 0; NaN for
// NaN.
inline float exp2_below(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves an integer in the low bits
  x = -127.0f > x ? -127.0f : x;
  const float shifted = x + kRound;
  const float r = x - (shifted - kRound);
  float p = 1.5594678e-4f;
  p = p * r + 1.3406643e-3f;
  p = p * r + 9.617693e-3f;
  p = p * r + 5.5503104e-2f;
  p = p * r + 2.4022652e-1f;
  p = p * r + 6.9314724e-1f;
  p = p * r + 1.0f;
  return p * from_bits((to_bits(shifted) << 23) + 0x3f800000u);
}

}  // namespace
}  // namespace MOE_ISA
}  // namespace moe_fast
