// Which product multiplies the bf16 rows of an expert by its weights, as it was measured on each
// processor. `python -m bench.products` measures it again.
#pragma once

#include <cstdint>

#include "instruction_set.h"

namespace moe_fast {

// dots: dot products that read the weights in place (simd.h); blocks: oneDNN's block kernel, for
// which few rows' weights are copied; tiles: AMX with the weights in place (amx.h), if their sizes
// are multiples of 32.
enum class Bf16Product { automatic, dots, blocks, tiles };
inline constexpr const char* kBf16Products[] = {"auto", "dots", "blocks", "tiles"};

// Experts with at most so many rows are computed by dots; others by tiles where the set has them and
// the sizes fit, which have a limit of their own, and else by blocks.
struct MostRowsOfDots {
  InstructionSet set;
  int64_t beside_blocks;
  int64_t beside_tiles;
};

inline constexpr MostRowsOfDots kMostRowsOfDots[] = {
    // AMD EPYC (Zen 5), two cores, November 2026.
    {InstructionSet::avx512bf16, 32, 0},
    // Intel Xeon with AMX (family 6, model 167), two cores, November 2026.
    {InstructionSet::amx, 8, 2},
};

}  // namespace moe_fast
