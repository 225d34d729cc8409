// All CUDA functions that the kernels use, in one place. Tests define MOE_CUDA_ON_CPU and define
// these names themselves, to run the source of the kernels, thread by thread, without a GPU.
#pragma once

#include <cstdint>

#if !defined(MOE_CUDA_ON_CPU)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace moe_fast {

// The block's dynamic shared memory.
template <typename T>
__device__ T* shared_memory() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return reinterpret_cast<T*>(bytes);
}

}  // namespace moe_fast
#endif

namespace moe_fast {

constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline int lane_id() { return static_cast<int>(threadIdx.x % 32); }
__device__ inline int warp_in_block() { return static_cast<int>(threadIdx.x / 32); }
__device__ inline int64_t warp_in_grid() {
  return (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
}
__device__ inline int64_t warps_in_grid() {
  return static_cast<int64_t>(gridDim.x) * blockDim.x / 32;
}

// The sum over a warp's lanes in a fixed order; every lane gets it.
template <typename T>
__device__ T warp_sum(T value) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

// Rounds to nearest even.
template <typename T>
__device__ T from_float(float value);
template <>
__device__ inline float from_float<float>(float value) { return value; }
template <>
__device__ inline __half from_float<__half>(float value) { return __float2half_rn(value); }
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

}  // namespace moe_fast
