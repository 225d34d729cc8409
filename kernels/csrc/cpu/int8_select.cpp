#include "instruction_set.h"
#include "int8_simd.h"

namespace moe_fast {

namespace portable {
extern const Int8Ops int8_ops;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Int8Ops int8_ops;
}
namespace avx512 {
extern const Int8Ops int8_ops;
}
namespace vnni {
extern const Int8Ops int8_ops;
}
#if defined(MOE_AMX)
namespace amx {
extern const Int8Ops int8_ops;
}
#endif
#endif

namespace {

const Int8Ops& select() {
#if defined(__x86_64__)
  switch (instruction_set()) {
    case InstructionSet::portable: return portable::int8_ops;
    case InstructionSet::avx2: return avx2::int8_ops;
    case InstructionSet::avx512: return avx512::int8_ops;
    case InstructionSet::amx:
#if defined(MOE_AMX)
      return amx::int8_ops;
#endif
    case InstructionSet::avx512bf16:
    case InstructionSet::vnni: return vnni::int8_ops;
  }
#endif
  return portable::int8_ops;
}

}  // namespace

const Int8Ops& int8_ops() {
  static const Int8Ops& chosen = select();
  return chosen;
}

}  // namespace moe_fast
