#include "up_projection.h"

#include <stdexcept>

namespace moe_fast {
namespace {

Act act_of(const std::string& name) {
  for (const NamedAct& known : kActs) {
    if (name == known.name) return known.act;
  }
  throw std::runtime_error("act is unknown: " + name + ".");
}

// Whether element (i, j, ...) lies at i * strides[0] + j * strides[1] ...
bool lies_as(const Tensor& tensor, const std::vector<int64_t>& strides) {
  for (size_t i = 0; i < strides.size(); ++i) {
    const auto dim = static_cast<int64_t>(i);
    if (tensor.size(dim) != 1 && tensor.stride(dim) != strides[i]) return false;
  }
  return true;
}

Layout layout_of(const Tensor& up, const Tensor& down, int64_t up_rows) {
  const int64_t dim = down.size(1), hidden = down.size(2), size = up_rows * dim;
  if (up.is_contiguous() && down.is_contiguous()) return Layout::rows;
  if (!lies_as(down, {dim * hidden, 1, dim})) return Layout::rows;
  if (up.dim() == 3) {
    return lies_as(up, {size, 1, up_rows}) ? Layout::columns : Layout::rows;
  }
  if (lies_as(up, {size, hidden, 1, up_rows})) return Layout::columns;
  return lies_as(up, {size, 1, 2, up_rows}) ? Layout::pairs : Layout::rows;
}

}  // namespace

Mlp view_mlp(const Tensor& x, const Tensor& up_proj, const Tensor& down_proj,
             const std::optional<Tensor>& up_proj_bias,
             const std::optional<Tensor>& down_proj_bias, const Tensor& top_k_weights,
             const Tensor& expert_offsets, const Tensor& row_to_token, const Tensor& row_to_slot,
             const Tensor& slot_to_row, const std::string& act, bool gated) {
  const bool apart = gated && up_proj.dim() == 4;
  if (x.dim() != 2 || (up_proj.dim() != 3 && !apart) || down_proj.dim() != 3) {
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
  // Weights of 16 bits may stand beside an x of float32.
  const Tensor& like = mlp.dtype == Dtype::f32 && bytes_of(dtype_of(down_proj)) == 2 ? down_proj : x;
  mlp.stored = dtype_of(like);
  mlp.layout = layout_of(up_proj, down_proj, mlp.up_rows);
  const bool in_rows = mlp.layout == Layout::rows;
  const std::vector<int64_t> up_shape =
      apart ? std::vector<int64_t>{experts, 2, mlp.hidden, mlp.dim}
            : std::vector<int64_t>{experts, mlp.up_rows, mlp.dim};
  mlp.up = data_of("up_proj", up_proj, like, up_shape, in_rows);
  mlp.down = data_of("down_proj", down_proj, like, {experts, mlp.dim, mlp.hidden}, in_rows);
  mlp.up_bias = data_of("up_proj_bias", up_proj_bias, like, {experts, mlp.up_rows});
  mlp.down_bias = data_of("down_proj_bias", down_proj_bias, like, {experts, mlp.dim});
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

void finish_rows(const Mlp& mlp, int64_t expert, int64_t unit, int64_t units, int64_t count,
                 float* z, UpBuffers& buffers) {
  const float* bias =
      load_floats(mlp.up_bias, mlp.stored, expert * mlp.up_rows + unit, units, buffers.bias);
  uint16_t* rounded = buffers.weights.get<uint16_t>(units);
  for (int64_t j = 0; j < count; ++j) {
    float* row = z + j * units;
    simd().scale_add(row, 1.0f, bias, row, units);
    if (mlp.dtype == Dtype::f32) continue;
    simd().store(row, mlp.dtype, rounded, units);
    simd().load(rounded, mlp.dtype, row, units);
  }
}

bool has_few_rows(const Mlp& mlp, const Gemm& gemm, int64_t expert) {
  if (mlp.dtype != Dtype::bf16 || simd().dots_bf16 == nullptr) return false;
  const bool tiles = gemm.fits_tiles(mlp.up_rows, mlp.dim) && gemm.fits_tiles(mlp.dim, mlp.hidden);
  return mlp.plan.rows_of(expert) <= most_rows_of_dots(tiles);
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
  finish_rows(mlp, expert, unit, units, count, z, buffers);
}

}  // namespace moe_fast
