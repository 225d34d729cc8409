// Launches on torch's current stream without linking torch's CUDA library.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

namespace moe_fast {

using torch::stable::Tensor;

// torch's current stream on this device. It is looked up in every call, so that a stream that is
// being captured is found too.
cudaStream_t current_stream(int32_t device_index);

// Throws std::runtime_error if the last launch failed.
void check_launch(const char* kernel);

// Throws std::runtime_error unless the tensor is contiguous, on the GPU of `like` and of this
// shape.
void check_tensor(const char* name, const Tensor& tensor, const Tensor& like,
                  const std::vector<int64_t>& shape);

// The values of an int64 index tensor; throws like check_tensor.
const int64_t* indices(const char* name, const Tensor& tensor, const Tensor& like, int64_t size);

}  // namespace moe_fast
