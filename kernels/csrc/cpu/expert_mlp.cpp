// Both directions work on blocks of an expert's sorted rows, which are gathered while they are
// packed for the products, and on blocks of H, so that z and h pass through the cache:
//
//   forward   z^T = W1 x^T, h = act(z), y^T = W2 h^T. The weights are the left factors, read in
//             place, and h^T comes out of the activation packed as the next right factor.
//   backward  dh = dO W2; h and dz from z; dW2 += (w dO)^T h; dW1 += dz^T x; dx += dz W1.
//
// Products accumulate in float32. Tasks that share rows (they own parts of H) sum into outputs of
// their own, which combine() adds in a fixed order.
#include "../expert_mlp.h"

#include <torch/csrc/stable/ops.h>

#include <stdexcept>

#include "blocks.h"
#include "gemm.h"
#include "gradient.h"
#include "problem.h"
#include "vector.h"

namespace moe_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::new_empty;

constexpr int64_t kUnits = 128;         // of H at a time in the forward; parts of H are multiples
constexpr int64_t kForwardRows = 384;   // per task: the weights are read once for so many
constexpr int64_t kBackwardRows = 512;  // per block in the backward, and
constexpr int64_t kBackwardUnits = 512; // of H: tiles that the level 2 and 3 caches hold

struct Mlp {
  PlanView plan;
  Dtype dtype;
  Act act;
  bool gated;
  int64_t dim, hidden, up_rows;  // D, H, U
  const void *x, *up, *down, *up_bias, *down_bias;

  int64_t up_at(int64_t expert, int64_t row) const { return (expert * up_rows + row) * dim; }
  int64_t down_at(int64_t expert, int64_t row) const { return (expert * dim + row) * hidden; }
  RowSource rows_of(const void* data) const { return {data, dtype, dim, plan.row_to_token}; }
};

Act act_of(const std::string& name) {
  if (name == "gelu") return Act::gelu;
  if (name == "gelu_tanh" || name == "gelu_new" || name == "gelu_pytorch_tanh") {
    return Act::gelu_tanh;
  }
  if (name == "relu") return Act::relu;
  if (name == "silu" || name == "swish") return Act::silu;
  throw std::runtime_error("act is unknown: " + name + ".");
}

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

// bf16 products need even depths, since pairs of them are multiplied at once.
bool in_bf16(const Mlp& mlp, const Gemm& gemm) {
  return mlp.dtype == Dtype::bf16 && gemm.bf16 != nullptr && mlp.dim % 2 == 0 &&
         mlp.hidden % 2 == 0;
}

// --- the first projection, which the backward may do again ---------------------------------------

struct UpBuffers {
  Buffer columns, weights, bias, tiles, tiles2, converted;
};

// z^T of `count` rows, packed in buffers.columns, for `units` of H from `first_unit` on: tiles
// [units, width], with bias, rounded to the dtype; the gated ones' second halves in tiles2.
template <typename G>
void project_up(const Mlp& mlp, const Gemm& gemm, int64_t expert, int64_t count,
                int64_t first_unit, int64_t units, UpBuffers& buffers) {
  const G* columns = buffers.columns.get<G>(round_up(count, 16) * mlp.dim);
  for (int64_t half = 0; half < (mlp.gated ? 2 : 1); ++half) {
    float* tiles = (half ? buffers.tiles2 : buffers.tiles).get<float>(units * round_up(count, 16));
    const int64_t row = half * mlp.hidden + first_unit;
    const auto weights = left_factor<G>(at(mlp.up, mlp.dtype, mlp.up_at(expert, row)), mlp.dtype,
                                        mlp.dim, units, mlp.dim, count, buffers.weights);
    multiply_tiles(gemm, weights, units, mlp.dim, columns, count, tiles);
    const float* bias =
        load_floats(mlp.up_bias, mlp.dtype, expert * mlp.up_rows + row, units, buffers.bias);
    for (int64_t column = 0; column < count; column += kPanel) {
      vector().add_bias(tiles + column * units, bias, mlp.dtype, units,
                        panel_width(count, column));
    }
  }
}

// --- few rows ------------------------------------------------------------------------------------

// So few that reading the weights is the work: their rows are dotted in place, as they stream by.
// A question of the expert's rows, not a block's: the backward's z are then the forward's.
constexpr int64_t kFewRows = kPanel;

bool has_few_rows(const Mlp& mlp, int64_t expert) {
  return mlp.dtype == Dtype::bf16 && vector().dots_bf16 != nullptr &&
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

// z [count, units] of rows x [count, D], from row `unit` of W1 on, with bias, rounded to bf16.
void project_few(const Mlp& mlp, int64_t expert, int64_t unit, int64_t units, const Bf16* x,
                 int64_t count, float* z, UpBuffers& buffers) {
  const auto* weights =
      reinterpret_cast<const Bf16*>(at(mlp.up, mlp.dtype, mlp.up_at(expert, unit)));
  vector().dots_bf16(weights, mlp.dim, units, x, mlp.dim, count, mlp.dim, z, units);
  const float* bias =
      load_floats(mlp.up_bias, mlp.dtype, expert * mlp.up_rows + unit, units, buffers.bias);
  Bf16* rounded = buffers.weights.get<Bf16>(units);
  for (int64_t j = 0; j < count; ++j) {
    float* row = z + j * units;
    vector().scale_add(row, 1.0f, bias, row, units);
    vector().store(row, mlp.dtype, rounded, units);
    vector().load(rounded, mlp.dtype, row, units);
  }
}

// A tile [units, width] of z^T into rows of z: out + j * ld for column j < count.
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
    vector().store(rows + j * padded, dtype, at(out, dtype, j * ld), units);
  }
}

// --- forward -------------------------------------------------------------------------------------

struct ForwardBuffers {
  UpBuffers up;
  Buffer activated, tile, weights, bias, rows, finished;
};

// Where results go: straight to y [T, D] where each token has one row and H is not cut, else to
// rows [parts, S, D].
struct ForwardOutput {
  void* y;      // or null
  float* rows;  // or null
  void* saved;  // [S, U], or null
};

// h^T of a panel, packed as a right factor's rows first_unit .. first_unit + units.
template <typename G>
void activate_panel(const Mlp& mlp, const float* z, const float* z2, int64_t units, int64_t width,
                    G* out, Buffer& buffer) {
  if constexpr (std::is_same_v<G, float>) {
    vector().activate(z, z2, mlp.act, out, units * width);
  } else {
    float* h = buffer.get<float>(units * width);
    vector().activate(z, z2, mlp.act, h, units * width);
    auto* pairs = reinterpret_cast<uint32_t*>(out);
    for (int64_t u = 0; u < units; u += 2) {
      vector().round_pairs(h + u * width, h + (u + 1) * width, pairs + u / 2 * width, width);
    }
  }
}

// Results [count, dims] of a task's rows first .. first + count, `ld` apart, to where they belong.
void finish_rows(const Mlp& mlp, const Task& task, const ForwardOutput& out, int64_t first_dim,
                 int64_t dims, const float* rows, int64_t ld, int64_t first, int64_t count,
                 ForwardBuffers& buffers) {
  float* finished = buffers.finished.get<float>(dims);
  const float* bias = nullptr;
  if (task.part == 0) {
    bias = load_floats(mlp.down_bias, mlp.dtype, task.expert * mlp.dim + first_dim, dims, buffers.bias);
  }
  for (int64_t j = 0; j < count; ++j) {
    const int64_t row = task.first + first + j;
    if (out.y == nullptr) {
      float* to = out.rows + (task.part * mlp.plan.num_slots() + row) * mlp.dim + first_dim;
      vector().scale_add(rows + j * ld, 1.0f, bias, to, dims);
    } else {
      const int64_t to = mlp.plan.row_to_token[row] * mlp.dim + first_dim;
      vector().scale_add(rows + j * ld, mlp.plan.weight(row), bias, finished, dims);
      vector().store(finished, mlp.dtype, at(out.y, mlp.dtype, to), dims);
    }
  }
}

// The same of tiles [dims, width].
void finish_tiles(const Mlp& mlp, const Task& task, const ForwardOutput& out, int64_t first_dim,
                  int64_t dims, const float* tiles, ForwardBuffers& buffers) {
  const int64_t count = task.last - task.first;
  const int64_t padded = round_up(dims, 16);
  float* rows = buffers.rows.get<float>(kPanel * padded);
  for (int64_t column = 0; column < count; column += kPanel) {
    const int64_t width = panel_width(count, column);
    transpose_floats(tiles + column * dims, width, dims, width, rows, padded);
    finish_rows(mlp, task, out, first_dim, dims, rows, padded, column,
                std::min(kPanel, count - column), buffers);
  }
}

template <typename G>
void forward_task(const Mlp& mlp, const Gemm& gemm, const Task& task, const ForwardOutput& out) {
  thread_local ForwardBuffers buffers;
  const int64_t count = task.last - task.first;
  const int64_t part = task.end - task.begin;
  G* columns = buffers.up.columns.get<G>(round_up(count, 16) * mlp.dim);
  pack_columns(mlp.rows_of(mlp.x), task.first, count, columns, buffers.up.converted);

  G* activated = buffers.activated.get<G>(round_up(count, 16) * part);
  for (int64_t unit = task.begin; unit < task.end; unit += kUnits) {
    const int64_t units = std::min(kUnits, task.end - unit);
    project_up<G>(mlp, gemm, task.expert, count, unit, units, buffers.up);
    const float* tiles = buffers.up.tiles.get<float>(0);
    const float* tiles2 = mlp.gated ? buffers.up.tiles2.get<float>(0) : nullptr;
    for (int64_t column = 0; column < count; column += kPanel) {
      const int64_t width = panel_width(count, column);
      const float* z = tiles + column * units;
      const float* z2 = mlp.gated ? tiles2 + column * units : nullptr;
      activate_panel(mlp, z, z2, units, width,
                     activated + column * part + (unit - task.begin) * width, buffers.tile);
      for (int64_t half = 0; out.saved != nullptr && half < (mlp.gated ? 2 : 1); ++half) {
        const int64_t to = (task.first + column) * mlp.up_rows + half * mlp.hidden + unit;
        store_rows(half ? z2 : z, units, width, std::min(kPanel, count - column), mlp.dtype,
                   at(out.saved, mlp.dtype, to), mlp.up_rows, buffers.rows);
      }
    }
  }

  const int64_t step = count <= kPanel ? kUnits / 4 : kUnits;  // rows of H are long: a copy must fit
  for (int64_t dim = 0; dim < mlp.dim; dim += step) {
    const int64_t dims = std::min(step, mlp.dim - dim);
    const int64_t from = mlp.down_at(task.expert, dim) + task.begin;
    const auto weights = left_factor<G>(at(mlp.down, mlp.dtype, from), mlp.dtype, mlp.hidden, dims,
                                        part, count, buffers.weights);
    float* tiles = buffers.tile.get<float>(dims * round_up(count, 16));
    multiply_tiles(gemm, weights, dims, part, activated, count, tiles);
    finish_tiles(mlp, task, out, dim, dims, tiles, buffers);
  }
}

// --- forward of few rows -------------------------------------------------------------------------

void forward_few(const Mlp& mlp, const Task& task, const ForwardOutput& out) {
  thread_local ForwardBuffers buffers;
  const int64_t count = task.last - task.first, part = task.end - task.begin, dim = mlp.dim;
  const Bf16* x = gather_few(mlp, task.first, count, buffers.up.columns);
  const float* z[2] = {nullptr, nullptr};
  for (int64_t half = 0; half < (mlp.gated ? 2 : 1); ++half) {
    const int64_t unit = half * mlp.hidden + task.begin;
    float* rows = (half ? buffers.up.tiles2 : buffers.up.tiles).get<float>(count * part);
    project_few(mlp, task.expert, unit, part, x, count, rows, buffers.up);
    if (out.saved != nullptr) {
      const int64_t to = task.first * mlp.up_rows + unit;
      store_matrix(rows, count, part, mlp.dtype, at(out.saved, mlp.dtype, to), mlp.up_rows);
    }
    z[half] = rows;
  }
  float* h = buffers.tile.get<float>(count * part);
  vector().activate(z[0], z[1], mlp.act, h, count * part);
  Bf16* activated = buffers.activated.get<Bf16>(count * part);
  vector().store(h, mlp.dtype, activated, count * part);
  float* rows = buffers.rows.get<float>(count * dim);
  const auto* weights = reinterpret_cast<const Bf16*>(
      at(mlp.down, mlp.dtype, mlp.down_at(task.expert, 0) + task.begin));
  vector().dots_bf16(weights, mlp.hidden, dim, activated, part, count, part, rows, dim);
  finish_rows(mlp, task, out, 0, dim, rows, dim, 0, count, buffers);
}

// --- backward ------------------------------------------------------------------------------------

// A task owns units begin .. end of H for all rows of its expert, hence those rows and columns of
// the weights' gradients, and sums dx and the routing weights' gradients of its part.
struct BackwardOutput {
  void *grad_up, *grad_down, *grad_up_bias, *grad_down_bias;
  float* rows;         // [parts, S, D]
  float* row_weights;  // [parts, S]
};

template <typename G>
struct BackwardBuffers {
  UpBuffers up;
  Buffer grad, grad_t, x, grad_h, z, z2, dz[2], dz_t[2], h, factor, group, pairs, rows;
  Buffer grad_up, grad_down, up_bias, down_bias, bias, rows_x;
};

// One block of rows of a task: its rows gathered into the factors of the products.
template <typename G>
struct RowBlock {
  int64_t first, count, padded;  // padded to a multiple of kGroup with zeros
  G* grad;                       // dO [padded, D]
  G* grad_t;                     // (w dO)^T [D, padded]
  G* x;                          // right factor [padded, D]
};

template <typename G>
RowBlock<G> gather_block(const Mlp& mlp, const RowSource& grad_y, const Task& task, int64_t first,
                         const float* down_bias, float* db2, float* row_weights,
                         BackwardBuffers<G>& buffers) {
  const int64_t dim = mlp.dim;
  RowBlock<G> block;
  block.first = first;
  block.count = std::min(kBackwardRows, task.last - first);
  block.padded = round_up(block.count, kGroup);
  block.grad = buffers.grad.template get<G>(block.padded * dim);
  block.grad_t = buffers.grad_t.template get<G>(block.padded * dim);
  block.x = buffers.x.template get<G>(block.padded * round_up(dim, 16));
  const auto x_row = [&](int64_t i) -> const void* {
    return i < block.count ? mlp.rows_of(mlp.x).row(first + i) : nullptr;
  };
  pack_rows(x_row, mlp.dtype, block.padded, dim, block.x);

  pack_gradient(grad_y, mlp.plan, first, block.count, down_bias, block.grad, block.grad_t, db2,
                row_weights, buffers.group, buffers.pairs);
  return block;
}

// The gradients of a block of units: from dh and z to h and dz, in the forms the products need.
template <typename G>
struct UnitBlock {
  int64_t first, units;
  G* h;        // right factor [padded, units]
  G* dz[2];    // left factors [padded, units]
  G* dz_t[2];  // left factors [units, padded]
};

// z of the block's rows and units as float rows [count, units], from what was saved or again.
template <typename G>
void load_z(const Mlp& mlp, const Gemm& gemm, const Task& task, const void* saved,
            const RowBlock<G>& block, const UnitBlock<G>& unit, BackwardBuffers<G>& buffers) {
  float* z[2] = {buffers.z.template get<float>(block.padded * unit.units),
                 buffers.z2.template get<float>(mlp.gated ? block.padded * unit.units : 0)};
  const int64_t halves = mlp.gated ? 2 : 1;
  if (saved != nullptr) {
    for (int64_t half = 0; half < halves; ++half) {
      for (int64_t j = 0; j < block.count; ++j) {
        const int64_t from = (block.first + j) * mlp.up_rows + half * mlp.hidden + unit.first;
        vector().load(at(saved, mlp.dtype, from), mlp.dtype, z[half] + j * unit.units, unit.units);
      }
    }
    return;
  }
  if (has_few_rows(mlp, task.expert)) {
    const Bf16* x = gather_few(mlp, block.first, block.count, buffers.up.columns);
    for (int64_t half = 0; half < halves; ++half) {
      project_few(mlp, task.expert, half * mlp.hidden + unit.first, unit.units, x, block.count,
                  z[half], buffers.up);
    }
    return;
  }
  G* columns = buffers.up.columns.template get<G>(round_up(block.count, 16) * mlp.dim);
  pack_columns(mlp.rows_of(mlp.x), block.first, block.count, columns, buffers.up.converted);
  for (int64_t u = 0; u < unit.units; u += kUnits) {
    const int64_t units = std::min(kUnits, unit.units - u);
    project_up<G>(mlp, gemm, task.expert, block.count, unit.first + u, units, buffers.up);
    for (int64_t half = 0; half < halves; ++half) {
      const float* tiles = (half ? buffers.up.tiles2 : buffers.up.tiles).template get<float>(0);
      for (int64_t column = 0; column < block.count; column += kPanel) {
        store_rows(tiles + column * units, units, panel_width(block.count, column),
                   std::min(kPanel, block.count - column), Dtype::f32,
                   z[half] + column * unit.units + u, unit.units, buffers.rows);
      }
    }
  }
}

template <typename G>
void activation_backward(const Mlp& mlp, const RowBlock<G>& block, const UnitBlock<G>& unit,
                         const float* grad_h, float* row_weights, float* db1,
                         BackwardBuffers<G>& buffers) {
  const int64_t n = unit.units;
  const int64_t halves = mlp.gated ? 2 : 1;
  const float* z[2] = {buffers.z.template get<float>(0), buffers.z2.template get<float>(0)};
  float* group = buffers.group.template get<float>(3 * kGroup * n);  // h, dz, dz2
  float* dz[2] = {group + kGroup * n, group + 2 * kGroup * n};
  constexpr Dtype stored = std::is_same_v<G, float> ? Dtype::f32 : Dtype::bf16;
  for (int64_t i = 0; i < block.padded; i += kGroup) {
    const int64_t here = std::clamp<int64_t>(block.count - i, 0, kGroup);
    for (int64_t j = 0; j < here; ++j) {
      const int64_t r = i + j;
      const float* second = mlp.gated ? z[1] + r * n : nullptr;
      float* dz2 = mlp.gated ? dz[1] + j * n : nullptr;
      row_weights[block.first + r] += vector().activate_backward(
          grad_h + r * n, z[0] + r * n, second, mlp.plan.weight(block.first + r), mlp.act,
          group + j * n, dz[0] + j * n, dz2, n);
    }
    for (int64_t half = 0; half < halves; ++half) {
      for (int64_t j = 0; j < here; ++j) {
        if (db1 != nullptr) {
          vector().add_scaled(db1 + half * mlp.hidden + unit.first, dz[half] + j * n, 1.0f, n);
        }
        vector().store(dz[half] + j * n, stored, unit.dz[half] + (i + j) * n, n);
      }
      std::memset(unit.dz[half] + (i + here) * n, 0,
                  static_cast<size_t>((kGroup - here) * n) * sizeof(G));
      put_transposed(dz[half], n, here, n, unit.dz_t[half] + i, block.padded, buffers.pairs);
    }
    const auto h_row = [&](int64_t j) { return j < here ? group + j * n : nullptr; };
    constexpr int64_t step = sizeof(float) / sizeof(G);
    for (int64_t j = 0; j < kGroup; j += step) {
      put_rows(h_row(j), step == 1 ? nullptr : h_row(j + 1), Dtype::f32, i + j, block.padded, n,
               unit.h);
    }
  }
}

// Sums in float32 for a gradient of another dtype; in place where it is float32 itself.
struct Accumulator {
  float* data;
  int64_t ld;
};

// The products of a block of rows with a block of units.
template <typename G>
void backward_block(const Mlp& mlp, const Gemm& gemm, const Task& task, const void* saved,
                    const RowBlock<G>& block, int64_t first_unit, const Accumulator (&grad_up)[2],
                    const Accumulator& grad_down, const BackwardOutput& out, float* db1,
                    BackwardBuffers<G>& buffers) {
  const int64_t dim = mlp.dim;
  const int64_t halves = mlp.gated ? 2 : 1;
  UnitBlock<G> unit;
  unit.first = first_unit;
  unit.units = std::min(kBackwardUnits, task.end - first_unit);
  const int64_t n = unit.units;
  unit.h = buffers.h.template get<G>(block.padded * round_up(n, 16));
  for (int64_t half = 0; half < halves; ++half) {
    unit.dz[half] = buffers.dz[half].template get<G>(block.padded * n);
    unit.dz_t[half] = buffers.dz_t[half].template get<G>(block.padded * n);
  }
  const int64_t factor_size = std::max(dim * round_up(n, 16), round_up(dim, 16) * n);
  G* factor = buffers.factor.template get<G>(factor_size);

  const auto down_row = [&](int64_t d) {
    return at(mlp.down, mlp.dtype, mlp.down_at(task.expert, d) + first_unit);
  };
  pack_rows(down_row, mlp.dtype, dim, n, factor);
  float* grad_h = buffers.grad_h.template get<float>(block.padded * n);
  multiply<G>(gemm, {block.grad, dim}, block.padded, dim, factor, n, grad_h, n, false);

  load_z(mlp, gemm, task, saved, block, unit, buffers);
  float* row_weights = out.row_weights + task.part * mlp.plan.num_slots();
  activation_backward(mlp, block, unit, grad_h, row_weights, db1, buffers);

  const bool later = block.first > task.first;
  multiply<G>(gemm, {block.grad_t, block.padded}, dim, block.padded, unit.h, n,
              grad_down.data + (first_unit - task.begin), grad_down.ld, later);
  float* rows = buffers.rows_x.template get<float>(block.padded * dim);
  for (int64_t half = 0; half < halves; ++half) {
    multiply<G>(gemm, {unit.dz_t[half], block.padded}, n, block.padded, block.x, dim,
                grad_up[half].data + (first_unit - task.begin) * dim, dim, later);
    const auto up_row = [&](int64_t u) {
      return at(mlp.up, mlp.dtype,
                mlp.up_at(task.expert, half * mlp.hidden + first_unit + u));
    };
    pack_rows(up_row, mlp.dtype, n, dim, factor);
    multiply<G>(gemm, {unit.dz[half], n}, block.padded, n, factor, dim, rows, dim,
                half > 0 || first_unit > task.begin);
  }
}

template <typename G>
void backward_task(const Mlp& mlp, const Gemm& gemm, const RowSource& grad_y, const void* saved,
                   const Task& task, const BackwardOutput& out) {
  thread_local BackwardBuffers<G> buffers;
  const int64_t dim = mlp.dim;
  const int64_t units = task.end - task.begin;
  const int64_t halves = mlp.gated ? 2 : 1;
  const bool in_place = mlp.dtype == Dtype::f32;
  Accumulator grad_up[2], grad_down;
  void* up_to[2];
  for (int64_t half = 0; half < halves; ++half) {
    const int64_t row = mlp.up_at(task.expert, half * mlp.hidden + task.begin);
    up_to[half] = at(out.grad_up, mlp.dtype, row);
    float* sums = buffers.grad_up.template get<float>(in_place ? 0 : halves * units * dim);
    grad_up[half] = {in_place ? static_cast<float*>(up_to[half]) : sums + half * units * dim, dim};
  }
  void* down_to = at(out.grad_down, mlp.dtype, mlp.down_at(task.expert, 0) + task.begin);
  grad_down = in_place ? Accumulator{static_cast<float*>(down_to), mlp.hidden}
                       : Accumulator{buffers.grad_down.template get<float>(units * dim), units};

  // Part 0 of an expert also sees to what does not depend on H: db2, and <dO, b2>.
  float* db1 = buffers.up_bias.template get<float>(mlp.up_rows);
  float* db2 = task.part == 0 ? buffers.down_bias.template get<float>(dim) : nullptr;
  std::fill_n(db1, mlp.up_rows, 0.0f);
  if (db2 != nullptr) std::fill_n(db2, dim, 0.0f);
  const float* b2 = nullptr;
  if (task.part == 0) {
    b2 = load_floats(mlp.down_bias, mlp.dtype, task.expert * dim, dim, buffers.bias);
  }
  float* row_weights = out.row_weights + task.part * mlp.plan.num_slots();
  for (int64_t first = task.first; first < task.last; first += kBackwardRows) {
    const auto block = gather_block<G>(mlp, grad_y, task, first, b2, db2, row_weights, buffers);
    for (int64_t unit = task.begin; unit < task.end; unit += kBackwardUnits) {
      backward_block<G>(mlp, gemm, task, saved, block, unit, grad_up, grad_down, out, db1,
                        buffers);
    }
    // Padded like the factors: each number of rows would be another kernel for oneDNN to generate.
    std::memcpy(out.rows + (task.part * mlp.plan.num_slots() + first) * dim,
                buffers.rows_x.template get<float>(0),
                static_cast<size_t>(block.count * dim) * sizeof(float));
  }

  for (int64_t half = 0; half < halves; ++half) {
    const int64_t row = half * mlp.hidden + task.begin;
    vector().store(db1 + row, mlp.dtype,
                   at(out.grad_up_bias, mlp.dtype, task.expert * mlp.up_rows + row), units);
    if (!in_place) store_matrix(grad_up[half].data, units, dim, mlp.dtype, up_to[half], dim);
  }
  if (!in_place) store_matrix(grad_down.data, dim, units, mlp.dtype, down_to, mlp.hidden);
  if (db2 != nullptr) {
    vector().store(db2, mlp.dtype, at(out.grad_down_bias, mlp.dtype, task.expert * dim), dim);
  }
}

void zero_empty_experts(const Mlp& mlp, const BackwardOutput& out) {
  for (int64_t e = 0; e < mlp.plan.num_experts; ++e) {
    if (mlp.plan.rows_of(e) > 0) continue;
    zero_rows(out.grad_up, mlp.dtype, e, 1, mlp.up_rows * mlp.dim);
    zero_rows(out.grad_down, mlp.dtype, e, 1, mlp.dim * mlp.hidden);
    zero_rows(out.grad_up_bias, mlp.dtype, e, 1, mlp.up_rows);
    zero_rows(out.grad_down_bias, mlp.dtype, e, 1, mlp.dim);
  }
}

}  // namespace

std::tuple<Tensor, Tensor> expert_mlp_cpu(Tensor x, Tensor up_proj, Tensor down_proj,
                                          std::optional<Tensor> up_proj_bias,
                                          std::optional<Tensor> down_proj_bias,
                                          Tensor top_k_weights, Tensor expert_offsets,
                                          Tensor row_to_token, Tensor row_to_slot,
                                          Tensor slot_to_row, std::string act, bool gated,
                                          bool save) {
  const Mlp mlp = view_mlp(x, up_proj, down_proj, up_proj_bias, down_proj_bias, top_k_weights,
                           expert_offsets, row_to_token, row_to_slot, slot_to_row, act, gated);
  const PlanView& plan = mlp.plan;
  Tensor y = new_empty(x, {plan.num_tokens, mlp.dim});
  Tensor saved = new_empty(x, {save ? plan.num_slots() : 0, mlp.up_rows});
  const Gemm& products = gemm();
  const Tasks tasks = cut_into_tasks(plan, {mlp.hidden, kUnits, kForwardRows});
  const bool straight = plan.k == 1 && tasks.max_parts == 1;
  Tensor rows = new_empty(x, {straight ? 0 : tasks.max_parts * plan.num_slots(), mlp.dim},
                          ScalarType::Float);
  ForwardOutput out{straight ? y.mutable_data_ptr() : nullptr, rows.mutable_data_ptr<float>(),
                    save ? saved.mutable_data_ptr() : nullptr};
  run_tasks(tasks.list, [&](const Task& task) {
    if (has_few_rows(mlp, task.expert)) {
      forward_few(mlp, task, out);
    } else if (in_bf16(mlp, products)) {
      forward_task<Bf16>(mlp, products, task, out);
    } else {
      forward_task<float>(mlp, products, task, out);
    }
    products.finish();
  });
  if (straight) {
    zero_skipped_tokens(plan, mlp.dim, mlp.dtype, y.mutable_data_ptr());
  } else {
    combine(plan, tasks, rows.const_data_ptr<float>(), mlp.dim, true, mlp.dtype,
            y.mutable_data_ptr());
  }
  if (save) {
    zero_rows(saved.mutable_data_ptr(), mlp.dtype, plan.num_rows(),
              plan.num_slots() - plan.num_rows(), mlp.up_rows);
  }
  return {y, saved};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> expert_mlp_backward_cpu(
    Tensor grad_y, Tensor x, Tensor up_proj, Tensor down_proj, std::optional<Tensor> up_proj_bias,
    std::optional<Tensor> down_proj_bias, Tensor top_k_weights, Tensor expert_offsets,
    Tensor row_to_token, Tensor row_to_slot, Tensor slot_to_row, Tensor saved, std::string act,
    bool gated) {
  const Mlp mlp = view_mlp(x, up_proj, down_proj, up_proj_bias, down_proj_bias, top_k_weights,
                           expert_offsets, row_to_token, row_to_slot, slot_to_row, act, gated);
  const PlanView& plan = mlp.plan;
  const void* grad_data = data_of("grad_y", grad_y, x, {plan.num_tokens, mlp.dim});
  const bool recompute = saved.dim() == 2 && saved.size(0) == 0;
  const void* z = data_of("saved", saved, x, {recompute ? 0 : plan.num_slots(), mlp.up_rows});

  Tensor grad_x = new_empty(x, {plan.num_tokens, mlp.dim});
  Tensor grad_up = new_empty(x, {plan.num_experts, mlp.up_rows, mlp.dim});
  Tensor grad_down = new_empty(x, {plan.num_experts, mlp.dim, mlp.hidden});
  Tensor grad_up_bias = new_empty(x, {plan.num_experts, mlp.up_rows});
  Tensor grad_down_bias = new_empty(x, {plan.num_experts, mlp.dim});
  Tensor grad_weights = new_empty(top_k_weights, {plan.num_tokens, plan.k});

  const Gemm& products = gemm();
  const Tasks tasks = cut_into_tasks(plan, {mlp.hidden, kUnits, 0});
  const int64_t partial_rows = tasks.max_parts * plan.num_slots();
  Tensor rows = new_empty(x, {partial_rows, mlp.dim}, ScalarType::Float);
  Tensor row_weights = new_empty(x, {partial_rows}, ScalarType::Float);
  const BackwardOutput out{grad_up.mutable_data_ptr(),       grad_down.mutable_data_ptr(),
                           grad_up_bias.mutable_data_ptr(),  grad_down_bias.mutable_data_ptr(),
                           rows.mutable_data_ptr<float>(),   row_weights.mutable_data_ptr<float>()};
  const RowSource grad_rows = mlp.rows_of(grad_data);
  run_tasks(tasks.list, [&](const Task& task) {
    if (in_bf16(mlp, products)) {
      backward_task<Bf16>(mlp, products, grad_rows, recompute ? nullptr : z, task, out);
    } else {
      backward_task<float>(mlp, products, grad_rows, recompute ? nullptr : z, task, out);
    }
    products.finish();
  });
  zero_empty_experts(mlp, out);
  combine(plan, tasks, rows.const_data_ptr<float>(), mlp.dim, false, mlp.dtype,
          grad_x.mutable_data_ptr());
  slot_sums(plan, tasks, row_weights.const_data_ptr<float>(),
            grad_weights.mutable_data_ptr<float>());
  return {grad_x, grad_up, grad_down, grad_up_bias, grad_down_bias, grad_weights};
}

}  // namespace moe_fast
