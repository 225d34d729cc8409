// The instruction set that the kernels use: the best of this processor, or the one that
// MOE_FAST_CPU in the environment asks for. Headers of torch must not be included here, see simd.h.
#pragma once

namespace moe_fast {

// Each includes those before it.
//   portable:   what the compiler assumes; products by the BLAS
//   avx2:       AVX2, FMA, F16C
//   avx512:     AVX-512 F, BW, DQ, VL
//   vnni:       AVX-512 VNNI: products of 8-bit integers
//   avx512bf16: AVX-512 BF16: dot products of bfloat16
//   amx:        AMX tiles for bfloat16 and 8-bit integers; Linux has let this process use them
enum class InstructionSet { portable, avx2, avx512, vnni, avx512bf16, amx };

// The name that MOE_FAST_CPU gives it.
const char* name_of(InstructionSet set);

// The one to use, decided once. MOE_FAST_CPU=auto, "" or no such variable: the best one. Throws
// std::runtime_error if the variable is none of the names, or names one that this processor lacks.
InstructionSet instruction_set();

}  // namespace moe_fast
