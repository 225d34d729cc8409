#include "plan_view.h"

#include <torch/headeronly/util/Exception.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <stdexcept>

namespace moe_fast {
namespace {

using torch::headeronly::ScalarType;

std::string list(const std::vector<int64_t>& sizes) {
  std::string text = "[";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}

std::vector<int64_t> sizes_of(const Tensor& tensor) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < tensor.dim(); ++d) sizes.push_back(tensor.size(d));
  return sizes;
}

void check(bool holds, const std::string& message) {
  if (!holds) throw std::runtime_error(message);
}

int32_t code_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return aoti_torch_dtype_float32();
    case ScalarType::BFloat16: return aoti_torch_dtype_bfloat16();
    case ScalarType::Half: return aoti_torch_dtype_float16();
    case ScalarType::Long: return aoti_torch_dtype_int64();
    default: throw std::runtime_error("no operation returns tensors of this dtype.");
  }
}

void check_values(const PlanView& plan) {
  int64_t previous = 0;
  for (int64_t e = 0; e <= plan.num_experts; ++e) {
    const bool ascending = plan.offsets[e] >= previous && plan.offsets[e] <= plan.num_slots();
    check(ascending && (e > 0 || plan.offsets[0] == 0),
          "plan.expert_offsets must ascend from 0 to at most T * K = " +
              std::to_string(plan.num_slots()) + "; got " + std::to_string(plan.offsets[e]) +
              " at " + std::to_string(e) + ".");
    previous = plan.offsets[e];
  }
  for (int64_t row = 0; row < plan.num_rows(); ++row) {
    const int64_t slot = plan.row_to_slot[row];
    const bool agrees = slot >= 0 && slot < plan.num_slots() && plan.slot_to_row[slot] == row &&
                        plan.row_to_token[row] == slot / plan.k;
    check(agrees, "plan.row_to_slot, row_to_token and slot_to_row must agree; they do not at row " +
                      std::to_string(row) + ".");
  }
  for (int64_t slot = 0; slot < plan.num_slots(); ++slot) {
    const int64_t row = plan.slot_to_row[slot];
    check(row >= -1 && row < plan.num_rows(),
          "plan.slot_to_row must be -1 or a row below " + std::to_string(plan.num_rows()) +
              "; got " + std::to_string(row) + " at " + std::to_string(slot) + ".");
  }
}

}  // namespace

void check_shape(const char* name, const Tensor& tensor, const std::vector<int64_t>& shape,
                 bool contiguous) {
  const std::vector<int64_t> sizes = sizes_of(tensor);
  check(sizes == shape,
        std::string(name) + " must have shape " + list(shape) + "; got " + list(sizes) + ".");
  check(tensor.is_cpu(), std::string(name) + " must be on the CPU.");
  check(!contiguous || tensor.is_contiguous(), std::string(name) + " must be contiguous.");
}

const int64_t* indices_of(const char* name, const Tensor& tensor, int64_t size) {
  check_shape(name, tensor, {size});
  check(tensor.scalar_type() == ScalarType::Long, std::string(name) + " must be int64.");
  return tensor.const_data_ptr<int64_t>();
}

const float* weights_of(const Tensor& top_k_weights, int64_t num_tokens) {
  check(top_k_weights.dim() == 2, "top_k_weights must be [T, K].");
  check_shape("top_k_weights", top_k_weights, {num_tokens, top_k_weights.size(1)});
  check(top_k_weights.scalar_type() == ScalarType::Float, "top_k_weights must be float32.");
  return top_k_weights.const_data_ptr<float>();
}

PlanView view_plan(const Tensor& top_k_weights, const Tensor& expert_offsets,
                   const Tensor& row_to_token, const Tensor& row_to_slot,
                   const Tensor& slot_to_row, int64_t num_tokens, int64_t num_experts) {
  const float* weights = weights_of(top_k_weights, num_tokens);
  check(num_experts >= 1, "there must be an expert.");
  const int64_t k = top_k_weights.size(1);
  const int64_t slots = num_tokens * k;
  const PlanView plan{indices_of("plan.expert_offsets", expert_offsets, num_experts + 1),
                      indices_of("plan.row_to_token", row_to_token, slots),
                      indices_of("plan.row_to_slot", row_to_slot, slots),
                      indices_of("plan.slot_to_row", slot_to_row, slots),
                      weights,
                      num_tokens,
                      k,
                      num_experts};
  check_values(plan);
  return plan;
}

Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& sizes,
                  std::optional<ScalarType> dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0; stride *= std::max<int64_t>(sizes[d], 1)) {
    strides[d] = stride;
  }
  AtenTensorHandle out;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
      code_of(dtype.value_or(like.scalar_type())), aoti_torch_device_type_cpu(), 0, &out));
  return Tensor(out);
}

Tensor new_output(const Tensor& like, const std::vector<int64_t>& sizes,
                  std::optional<ScalarType> dtype) {
  Tensor out = new_tensor(like, sizes, dtype);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t{2} << 20;
  const auto data = reinterpret_cast<uintptr_t>(out.mutable_data_ptr());
  const uintptr_t begin = (data + page - 1) / page * page;
  const auto bytes = static_cast<uintptr_t>(out.numel()) * out.element_size();
  const uintptr_t end = (data + bytes) / page * page;
  // This is only advice: if it is refused, pages stay small.
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  return out;
}

Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    default: throw std::runtime_error("x must have dtype float32, bfloat16 or float16.");
  }
}

const void* data_of(const char* name, const Tensor& tensor, const Tensor& x,
                    std::vector<int64_t> shape, bool contiguous) {
  check_shape(name, tensor, shape, contiguous);
  check(tensor.scalar_type() == x.scalar_type(), std::string(name) + " must have the dtype of x.");
  return tensor.const_data_ptr();
}

const void* data_of(const char* name, const std::optional<Tensor>& tensor, const Tensor& x,
                    std::vector<int64_t> shape) {
  return tensor.has_value() ? data_of(name, *tensor, x, std::move(shape)) : nullptr;
}

}  // namespace moe_fast
