#include "up_projection.h"

#include <stdexcept>

namespace moe_fast {
namespace {

constexpr int64_t kFewRows = kPanel;

Act act_of(const std::string& name) {
  for (const NamedAct& known : kActs) {
    if (name == known.name) return known.act;
  }
  throw std::runtime_error("act is unknown: " + name + ".");
}

}  // namespace

Mlp view_mlp(const Tensor& x, const Tensor& up_proj, const Tensor& down_proj,
             const std::optional<Tensor>& up_proj_bias,
             const std::optional<Tensor>& down_proj_bias, const Tensor& top_k_weights,
             const Tensor& expert_offsets, const Tensor& row_to_token, const Tensor& row_to_slot,
             const Tensor& slot_to_row, const std::string& act, bool gated) {
  if (x.dim() != 2 || up_proj.dim() != 3 || down_proj.dim() != 3) {
    throw std::runtime_error("x must be [T, D], up_proj [E, H, D] and down_proj [E, D, H].");
  }
  Mlp mlp;
  mlp.dtype = dtype_of(x);
  mlp.act = act_of(act);
  mlp.gated = gated;
  mlp.dim = x.size(1);
  mlp.hidden = down_proj.size(2);
  mlp.up_rows = gated ? 2 * mlp.hidden : mlp.hidden;
  const int64_t experts = up_proj.size(0);
  mlp.plan = view_plan(top_k_weights, expert_offsets, row_to_token, row_to_slot, slot_to_row,
                       x.size(0), experts);
  mlp.x = data_of("x", x, x, {x.size(0), mlp.dim});
  mlp.up = data_of("up_proj", up_proj, x, {experts, mlp.up_rows, mlp.dim});
  mlp.down = data_of("down_proj", down_proj, x, {experts, mlp.dim, mlp.hidden});
  mlp.up_bias = data_of("up_proj_bias", up_proj_bias, x, {experts, mlp.up_rows});
  mlp.down_bias = data_of("down_proj_bias", down_proj_bias, x, {experts, mlp.dim});
  if (mlp.dim == 0 || mlp.hidden == 0) throw std::runtime_error("D and H must not be 0.");
  return mlp;
}

bool in_bf16(const Mlp& mlp, const Gemm& gemm) {
  return mlp.dtype == Dtype::bf16 && gemm.bf16 != nullptr && mlp.dim % 2 == 0 &&
         mlp.hidden % 2 == 0;
}

void store_rows(const float* tile, int64_t units, int64_t width, int64_t count, Dtype dtype,
                void* out, int64_t ld, Buffer& buffer) {
  if (dtype == Dtype::f32 && units % 16 == 0) {
    transpose_floats(tile, width, units, count, static_cast<float*>(out), ld);
    return;
  }
  const int64_t padded = round_up(units, 16);
  float* rows = buffer.get<float>(width * padded);
  transpose_floats(tile, width, units, width, rows, padded);
  for (int64_t j = 0; j < count; ++j) {
    simd().store(rows + j * padded, dtype, at(out, dtype, j * ld), units);
  }
}

bool has_few_rows(const Mlp& mlp, int64_t expert) {
  return mlp.dtype == Dtype::bf16 && simd().dots_bf16 != nullptr &&
         mlp.plan.rows_of(expert) <= kFewRows;
}

const Bf16* gather_few(const Mlp& mlp, int64_t first, int64_t count, Buffer& buffer) {
  const RowSource source = mlp.rows_of(mlp.x);
  Bf16* x = buffer.get<Bf16>(count * mlp.dim);
  for (int64_t j = 0; j < count; ++j) {
    std::memcpy(x + j * mlp.dim, source.row(first + j),
                static_cast<size_t>(mlp.dim) * sizeof(Bf16));
  }
  return x;
}

void project_few(const Mlp& mlp, int64_t expert, int64_t unit, int64_t units, const Bf16* x,
                 int64_t count, float* z, UpBuffers& buffers) {
  const auto* weights =
      reinterpret_cast<const Bf16*>(at(mlp.up, mlp.dtype, mlp.up_at(expert, unit)));
  simd().dots_bf16(weights, mlp.dim, units, x, mlp.dim, count, mlp.dim, z, units);
  const float* bias =
      load_floats(mlp.up_bias, mlp.dtype, expert * mlp.up_rows + unit, units, buffers.bias);
  Bf16* rounded = buffers.weights.get<Bf16>(units);
  for (int64_t j = 0; j < count; ++j) {
    float* row = z + j * units;
    simd().scale_add(row, 1.0f, bias, row, units);
    simd().store(row, mlp.dtype, rounded, units);
    simd().load(rounded, mlp.dtype, row, units);
  }
}

}  // namespace moe_fast
