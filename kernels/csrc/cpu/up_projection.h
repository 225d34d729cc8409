// Shared by both directions of the expert MLP: its tensors, and the first projection, which the
// backward may compute again.
#pragma once

#include <optional>
#include <string>

#include "gemm.h"
#include "packing.h"
#include "plan_view.h"
#include "simd.h"
#include "tasks.h"

namespace moe_fast {

constexpr int64_t kUnits = 128;  // units of H per block; the parts of H are multiples of it

// How the weights are stored: row after row (up_proj [E, U, D], down_proj [E, D, H]), or column after
// column ([E, D, U] and [E, H, D], as x @ W reads them). In columns, the halves of U are either one
// after the other, or each unit's pair is together.
enum class Layout { rows, columns, pairs };

struct Mlp {
  PlanView plan;
  Dtype dtype;   // of x, z and y: what is computed in
  Dtype stored;  // of weights and biases: dtype, or 16 bits that are widened as they are read
  Layout layout;
  Act act;
  bool gated;
  int64_t dim, hidden, up_rows;  // D, H, U
  const void *x, *up, *down, *up_bias, *down_bias;

  // Where a row begins in a weight that is stored in rows; row 0 is where an expert begins in any.
  int64_t up_at(int64_t expert, int64_t row) const { return (expert * up_rows + row) * dim; }
  int64_t down_at(int64_t expert, int64_t row) const { return (expert * dim + row) * hidden; }
  RowSource rows_of(const void* data) const { return {data, dtype, dim, plan.row_to_token}; }
};

// Throws std::runtime_error if the arguments break the rules of expert_mlp.h.
Mlp view_mlp(const Tensor& x, const Tensor& up_proj, const Tensor& down_proj,
             const std::optional<Tensor>& up_proj_bias,
             const std::optional<Tensor>& down_proj_bias, const Tensor& top_k_weights,
             const Tensor& expert_offsets, const Tensor& row_to_token, const Tensor& row_to_slot,
             const Tensor& slot_to_row, const std::string& act, bool gated);

// bf16 products need an even depth, since pairs of elements are multiplied at once.
bool in_bf16(const Mlp& mlp, const Gemm& gemm);

struct UpBuffers {
  Buffer columns, weights, bias, tiles, tiles2, converted;
};

// Computes z^T of the `count` rows packed in buffers.columns, for `units` units of H from
// `first_unit` on. The results are tiles [units, width] with bias, rounded to the dtype; the second
// half of a gated z is in tiles2.
template <typename G>
void project_up(const Mlp& mlp, const Gemm& gemm, int64_t expert, int64_t count,
                int64_t first_unit, int64_t units, UpBuffers& buffers) {
  const G* columns = buffers.columns.get<G>(round_up(count, 16) * mlp.dim);
  for (int64_t half = 0; half < (mlp.gated ? 2 : 1); ++half) {
    float* tiles = (half ? buffers.tiles2 : buffers.tiles).get<float>(units * round_up(count, 16));
    const int64_t row = half * mlp.hidden + first_unit;
    const auto weights = left_factor<G>(gemm, at(mlp.up, mlp.stored, mlp.up_at(expert, row)), mlp.stored,
                                        mlp.dim, units, mlp.dim, count, buffers.weights);
    multiply_tiles(gemm, weights, units, mlp.dim, columns, count, tiles);
    const float* bias =
        load_floats(mlp.up_bias, mlp.stored, expert * mlp.up_rows + row, units, buffers.bias);
    for (int64_t column = 0, width; column < count; column += width) {
      width = panel_width(count, column);
      simd().add_bias(tiles + column * units, bias, mlp.dtype, units, width);
    }
  }
}

// Adds the bias to z [count, units], from row `unit` of W1 on, and rounds it to the dtype.
void finish_rows(const Mlp& mlp, int64_t expert, int64_t unit, int64_t units, int64_t count,
                 float* z, UpBuffers& buffers);

// Computes z of rows x [rows, D] by weights that are stored in columns, with bias and rounded to the
// dtype: [rows, units] in buffers.tiles and, if gated, the second halves in tiles2.
template <typename G>
void project_columns(const Mlp& mlp, const Gemm& gemm, int64_t expert, const G* x, int64_t rows,
                     int64_t first_unit, int64_t units, UpBuffers& buffers) {
  float* z[2] = {buffers.tiles.get<float>(rows * units),
                 buffers.tiles2.get<float>(mlp.gated ? rows * units : 0)};
  // Multiplies by W1's columns first .. first + count, as they are stored, into out [rows, count].
  const auto product = [&](int64_t first, int64_t count, float* out) {
    G* factor = buffers.weights.get<G>(mlp.dim * round_up(count, 16));
    const void* columns = at(mlp.up, mlp.stored, expert * mlp.dim * mlp.up_rows + first);
    pack_matrix(columns, mlp.stored, mlp.up_rows, mlp.dim, count, factor);
    multiply<G>(gemm, {x, mlp.dim}, rows, mlp.dim, factor, count, out, count, false);
  };
  if (mlp.layout == Layout::pairs) {
    float* pairs = buffers.converted.get<float>(rows * 2 * units);
    product(2 * first_unit, 2 * units, pairs);
    for (int64_t i = 0; i < rows * units; ++i) {
      z[0][i] = pairs[2 * i];
      z[1][i] = pairs[2 * i + 1];
    }
  }
  for (int64_t half = 0; half < (mlp.gated ? 2 : 1); ++half) {
    const int64_t first = half * mlp.hidden + first_unit;
    if (mlp.layout == Layout::columns) product(first, units, z[half]);
    finish_rows(mlp, expert, first, units, rows, z[half], buffers);
  }
}

// Writes a tile [units, width] of z^T as rows of z: column j < count to out + j * ld.
void store_rows(const float* tile, int64_t units, int64_t width, int64_t count, Dtype dtype,
                void* out, int64_t ld, Buffer& buffer);

// Whether an expert has so few bf16 rows that dot products serve it (product_table.h). The answer depends on the rows of the expert, not on
// those of a block, so that the backward computes the same z as the forward.
bool has_few_rows(const Mlp& mlp, const Gemm& gemm, int64_t expert);

// Copies rows first .. first + count of x, one after the other.
const Bf16* gather_few(const Mlp& mlp, int64_t first, int64_t count, Buffer& buffer);

// Computes z [count, units] of rows x [count, D], from row `unit` of W1 on, with bias, rounded to
// bf16.
void project_few(const Mlp& mlp, int64_t expert, int64_t unit, int64_t units, const Bf16* x,
                 int64_t count, float* z, UpBuffers& buffers);

}  // namespace moe_fast
