#include "instruction_set.h"
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
  switch (instruction_set()) {
    case InstructionSet::portable: return portable::ops;
    case InstructionSet::avx2: return avx2::ops;
    case InstructionSet::avx512:
    case InstructionSet::vnni: return avx512::ops;
    case InstructionSet::avx512bf16:
    case InstructionSet::amx: return avx512bf16::ops;
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
