#include "launch.h"

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <string>

namespace moe_fast {
namespace {

using StreamFunction = AOTITorchError (*)(int32_t, void**);

// The function is looked up by name in the library that a CUDA torch has loaded. If this library
// were linked to that one, it could not be loaded under a CPU-only torch.
StreamFunction find_stream_function() {
  void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
  return library == nullptr ? nullptr
                            : reinterpret_cast<StreamFunction>(
                                  dlsym(library, "aoti_torch_get_current_cuda_stream"));
}

std::string list(const std::vector<int64_t>& sizes) {
  std::string text = "[";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}

}  // namespace

cudaStream_t current_stream(int32_t device_index) {
  static const StreamFunction function = find_stream_function();
  STD_TORCH_CHECK(function != nullptr, "this torch has no CUDA.");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(function(device_index, &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, kernel, ": ", cudaGetErrorString(error));
}

void check_tensor(const char* name, const Tensor& tensor, const Tensor& like,
                  const std::vector<int64_t>& shape) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < tensor.dim(); ++d) sizes.push_back(tensor.size(d));
  STD_TORCH_CHECK(sizes == shape, name, " must have shape ", list(shape), "; got ", list(sizes),
                  ".");
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == like.get_device_index(), name,
                  " must be on the GPU of the other tensors.");
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous.");
}

const int64_t* indices(const char* name, const Tensor& tensor, const Tensor& like, int64_t size) {
  check_tensor(name, tensor, like, {size});
  STD_TORCH_CHECK(tensor.scalar_type() == torch::headeronly::ScalarType::Long, name,
                  " must be int64.");
  return tensor.const_data_ptr<int64_t>();
}

}  // namespace moe_fast
