#include "../rows.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <initializer_list>

#include "launch.h"
#include "rows_kernels.cuh"

namespace moe_fast {
namespace {

using torch::headeronly::ScalarType;

constexpr unsigned kThreads = 256;

// The number of blocks that gives each of `warps` pieces of work a warp, up to a number that fills
// any GPU.
unsigned num_blocks(int64_t warps) {
  constexpr int64_t kWarps = kThreads / 32, kMost = 1 << 15;
  return static_cast<unsigned>(std::clamp<int64_t>((warps + kWarps - 1) / kWarps, 1, kMost));
}

// Whether rows of `bytes` bytes at these addresses can be copied in words of `size` bytes.
bool moves_in(int64_t size, int64_t bytes, std::initializer_list<const void*> addresses) {
  return bytes % size == 0 && std::all_of(addresses.begin(), addresses.end(), [&](const void* a) {
           return reinterpret_cast<uintptr_t>(a) % size == 0;
         });
}

int64_t bytes_of(const Tensor& x) { return x.scalar_type() == ScalarType::Float ? 4 : 2; }

void check_rows(const char* name, const Tensor& rows) {
  const auto dtype = rows.scalar_type();
  STD_TORCH_CHECK(rows.dim() == 2, name, " must have 2 dimensions; got ", rows.dim(), ".");
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 ||
                      dtype == ScalarType::Half,
                  name, " must have dtype float32, bfloat16 or float16.");
  check_tensor(name, rows, rows, {rows.size(0), rows.size(1)});
}

const float* weights_of(const Tensor& top_k_weights, const Tensor& rows) {
  STD_TORCH_CHECK(top_k_weights.dim() == 2, "top_k_weights must be [T, K].");
  STD_TORCH_CHECK(top_k_weights.scalar_type() == ScalarType::Float,
                  "top_k_weights must be float32.");
  check_tensor("top_k_weights", top_k_weights, rows,
               {top_k_weights.size(0), top_k_weights.size(1)});
  check_tensor("rows", rows, rows, {top_k_weights.numel(), rows.size(1)});
  return top_k_weights.const_data_ptr<float>();
}

// The last of the offsets, which is the number of valid rows; it is on the GPU.
const int64_t* num_valid(const Tensor& expert_offsets, const Tensor& like) {
  STD_TORCH_CHECK(expert_offsets.numel() >= 2, "plan.expert_offsets must be [E + 1], E >= 1.");
  return indices("plan.expert_offsets", expert_offsets, like, expert_offsets.numel()) +
         expert_offsets.numel() - 1;
}

// Calls work(T{}, integral_constant<Size>{}): T is the dtype, and Size the number of elements in 16
// bytes, or 1 if the rows are not aligned to 16 bytes.
template <typename Work>
void dispatch(const Tensor& rows, std::initializer_list<const void*> addresses, const Work& work) {
  const bool wide = moves_in(16, rows.size(1) * bytes_of(rows), addresses);
  const auto of = [&](auto element) {
    constexpr int kSize = 16 / sizeof(element);
    wide ? work(element, std::integral_constant<int, kSize>{})
         : work(element, std::integral_constant<int, 1>{});
  };
  switch (rows.scalar_type()) {
    case ScalarType::Float: return of(float{});
    case ScalarType::BFloat16: return of(__nv_bfloat16{});
    default: return of(__half{});
  }
}

}  // namespace

Tensor gather_rows_cuda(Tensor x, Tensor expert_offsets, Tensor row_to_token) {
  check_rows("x", x);
  const int64_t num_rows = row_to_token.numel();
  const int64_t* tokens = indices("plan.row_to_token", row_to_token, x, num_rows);
  const int64_t* valid = num_valid(expert_offsets, x);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor rows = torch::stable::new_empty(x, {num_rows, x.size(1)});
  const void* from = x.const_data_ptr();
  void* to = rows.mutable_data_ptr();
  const cudaStream_t stream = current_stream(x.get_device_index());
  const auto launch = [&](auto word) {
    using Word = decltype(word);
    const int64_t width = x.size(1) * bytes_of(x) / static_cast<int64_t>(sizeof(Word));
    gather_rows<<<num_blocks(num_rows), kThreads, 0, stream>>>(
        static_cast<const Word*>(from), valid, tokens, x.size(0), num_rows, width,
        static_cast<Word*>(to));
  };
  const int64_t bytes = x.size(1) * bytes_of(x);
  if (moves_in(16, bytes, {from, to})) {
    launch(uint4{});
  } else if (moves_in(4, bytes, {from, to})) {
    launch(uint32_t{});
  } else {
    launch(uint16_t{});
  }
  check_launch("gather_rows");
  return rows;
}

Tensor combine_rows_cuda(Tensor rows, Tensor top_k_weights, Tensor slot_to_row) {
  check_rows("rows", rows);
  const float* weights = weights_of(top_k_weights, rows);
  const int64_t* places = indices("plan.slot_to_row", slot_to_row, rows, rows.size(0));
  const torch::stable::accelerator::DeviceGuard guard(rows.get_device_index());
  const int64_t num_tokens = top_k_weights.size(0), k = top_k_weights.size(1);
  Tensor y = torch::stable::new_empty(rows, {num_tokens, rows.size(1)});
  const void* from = rows.const_data_ptr();
  void* to = y.mutable_data_ptr();
  const cudaStream_t stream = current_stream(rows.get_device_index());
  dispatch(rows, {from, to}, [&](auto element, auto size) {
    using Row = Pack<decltype(element), decltype(size)::value>;
    combine_rows<<<num_blocks(num_tokens), kThreads, 0, stream>>>(
        static_cast<const Row*>(from), weights, places, num_tokens, k,
        rows.size(1) / size.value, static_cast<Row*>(to));
  });
  check_launch("combine_rows");
  return y;
}

std::tuple<Tensor, Tensor> combine_rows_backward_cuda(Tensor grad_y, Tensor rows,
                                                      Tensor top_k_weights, Tensor expert_offsets,
                                                      Tensor slot_to_row) {
  check_rows("rows", rows);
  const float* weights = weights_of(top_k_weights, rows);
  const int64_t num_slots = rows.size(0), k = top_k_weights.size(1);
  check_tensor("grad_y", grad_y, rows, {top_k_weights.size(0), rows.size(1)});
  STD_TORCH_CHECK(grad_y.scalar_type() == rows.scalar_type(),
                  "grad_y must have the dtype of rows.");
  const int64_t* places = indices("plan.slot_to_row", slot_to_row, rows, num_slots);
  const int64_t* valid = num_valid(expert_offsets, rows);
  const torch::stable::accelerator::DeviceGuard guard(rows.get_device_index());
  Tensor grad_rows = torch::stable::new_empty(rows, {num_slots, rows.size(1)});
  Tensor grad_weights = torch::stable::new_empty(top_k_weights, {top_k_weights.size(0), k});
  const void *upstream = grad_y.const_data_ptr(), *from = rows.const_data_ptr();
  void* to = grad_rows.mutable_data_ptr();
  const cudaStream_t stream = current_stream(rows.get_device_index());
  dispatch(rows, {upstream, from, to}, [&](auto element, auto size) {
    using Row = Pack<decltype(element), decltype(size)::value>;
    combine_rows_backward<<<num_blocks(num_slots), kThreads, 0, stream>>>(
        static_cast<const Row*>(upstream), static_cast<const Row*>(from), weights, valid, places,
        num_slots, k, rows.size(1) / size.value, static_cast<Row*>(to),
        grad_weights.mutable_data_ptr<float>());
  });
  check_launch("combine_rows_backward");
  return {grad_rows, grad_weights};
}

}  // namespace moe_fast
