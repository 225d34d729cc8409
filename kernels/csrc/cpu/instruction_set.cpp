#include "instruction_set.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(MOE_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace moe_fast {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "vnni", "avx512bf16", "amx"};

#if defined(MOE_AMX)
// Whether the processor has tiles with products of bf16 and of 8-bit integers, and Linux gives them
// to this process: their 8 KB are saved for a thread only after the process has asked for it.
bool has_amx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
  if ((d & kBf16) == 0 || (d & kTile) == 0 || (d & kInt8) == 0) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#else
bool has_amx() { return false; }
#endif

InstructionSet best() {
#if defined(__x86_64__)
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") ||
      !__builtin_cpu_supports("f16c")) {
    return InstructionSet::portable;
  }
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
    return InstructionSet::avx2;
  }
  if (!__builtin_cpu_supports("avx512vnni")) return InstructionSet::avx512;
  if (!__builtin_cpu_supports("avx512bf16")) return InstructionSet::vnni;
  return has_amx() ? InstructionSet::amx : InstructionSet::avx512bf16;
#else
  return InstructionSet::portable;
#endif
}

std::string names_up_to(InstructionSet last) {
  std::string names = kNames[0];
  for (int i = 1; i <= static_cast<int>(last); ++i) names += std::string(", ") + kNames[i];
  return names;
}

InstructionSet select() {
  const InstructionSet most = best();
  const char* variable = std::getenv("MOE_FAST_CPU");
  const std::string asked = variable == nullptr ? "" : variable;
  if (asked.empty() || asked == "auto") return most;
  for (int i = 0; i <= static_cast<int>(InstructionSet::amx); ++i) {
    if (asked != kNames[i]) continue;
    if (i <= static_cast<int>(most)) return static_cast<InstructionSet>(i);
    throw std::runtime_error("MOE_FAST_CPU asks for " + asked +
                             ", which this processor, or its system, does not have. It has " +
                             names_up_to(most) + ".");
  }
  throw std::runtime_error("MOE_FAST_CPU must be auto, " + names_up_to(InstructionSet::amx) +
                           "; got '" + asked + "'.");
}

}  // namespace

const char* name_of(InstructionSet set) { return kNames[static_cast<int>(set)]; }

InstructionSet instruction_set() {
  static const InstructionSet chosen = select();
  return chosen;
}

}  // namespace moe_fast
