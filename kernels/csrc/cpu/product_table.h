// Which product multiplies the bf16 rows of an expert by its weights, as it was measured on each
// processor. `python -m bench.products` measures it again, and prints the lines for this table.
#pragma once

#include <cstdint>

#include "instruction_set.h"

namespace moe_fast {

// Experts with at most `dots` rows: dot products with the weights in place (simd.h). With more rows:
// AMX tiles with the weights in place (amx.h) if the set has them and the weights' sizes are
// multiples of 32; there dots serve `dots_beside_tiles` rows. Otherwise oneDNN's block kernel, for
// which few rows' weights are copied.
struct Bf16Products {
  InstructionSet set;
  int64_t dots;
  int64_t dots_beside_tiles;
};

inline constexpr Bf16Products kBf16Products[] = {
    // AMD EPYC (Zen 5), two cores, November 2026.
    {InstructionSet::avx512bf16, 48, 0},
    // Intel Xeon with AMX (family 6, model 167), two cores, November 2026.
    {InstructionSet::amx, 48, 0},
};

}  // namespace moe_fast
