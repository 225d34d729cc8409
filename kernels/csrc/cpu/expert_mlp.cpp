// The forward processes blocks of an expert's sorted rows, which are gathered while they are packed
// for the products, and blocks of H, so that z and h stay in the cache:
//
//   z^T = W1 x^T, h = act(z), y^T = W2 h^T. The weights are the left factors and are read in place.
//   The activation writes h^T in the packed layout of the next right factor.
//
// Weights that are stored in columns are the right factors instead: z = x W1^T and y = h W2^T.
//
// Products accumulate in float32. Tasks with the same rows and different parts of H write separate
// outputs, which combine() adds in a fixed order.
#include "../expert_mlp.h"

#include "up_projection.h"

namespace moe_fast {
namespace {

using torch::headeronly::ScalarType;

constexpr int64_t kForwardRows = 384;  // per task, which reads the weights once
constexpr int64_t kRowStep = 4;  // left factors' rows are padded to it: few kernels to generate

struct ForwardBuffers {
  UpBuffers up;
  Buffer activated, tile, weights, bias, rows, finished, rounded;
};

// Where results are written: directly to y [T, D] if each token has one row and H is not divided,
// otherwise to rows [parts, S, D].
struct ForwardOutput {
  void* y;      // or null
  float* rows;  // or null
  void* saved;  // [S, U], or null
};

// Writes h^T of a panel as `units` packed rows of a right factor.
template <typename G>
void activate_panel(const Mlp& mlp, const float* z, const float* z2, int64_t units, int64_t width,
                    G* out, Buffer& buffer) {
  if constexpr (std::is_same_v<G, float>) {
    simd().activate(z, z2, mlp.act, out, units * width);
  } else {
    float* h = buffer.get<float>(units * width);
    simd().activate(z, z2, mlp.act, h, units * width);
    auto* pairs = reinterpret_cast<uint32_t*>(out);
    for (int64_t u = 0; u < units; u += 2) {
      simd().round_pairs(h + u * width, h + (u + 1) * width, pairs + u / 2 * width, width);
    }
  }
}

// Writes the results [count, dims], `ld` apart, of a task's rows first .. first + count to `out`.
void row_epilogue(const Mlp& mlp, const Task& task, const ForwardOutput& out, int64_t first_dim,
                  int64_t dims, const float* rows, int64_t ld, int64_t first, int64_t count,
                  ForwardBuffers& buffers) {
  float* finished = buffers.finished.get<float>(dims);
  const float* bias = nullptr;
  if (task.part == 0) {
    bias = load_floats(mlp.down_bias, mlp.stored, task.expert * mlp.dim + first_dim, dims,
                       buffers.bias);
  }
  for (int64_t j = 0; j < count; ++j) {
    const int64_t row = task.first + first + j;
    if (out.y == nullptr) {
      float* to = out.rows + (task.part * mlp.plan.num_slots() + row) * mlp.dim + first_dim;
      simd().scale_add(rows + j * ld, 1.0f, bias, to, dims);
    } else {
      const int64_t to = mlp.plan.row_to_token[row] * mlp.dim + first_dim;
      simd().scale_add(rows + j * ld, mlp.plan.weight(row), bias, finished, dims);
      simd().store(finished, mlp.dtype, at(out.y, mlp.dtype, to), dims);
    }
  }
}

// The same for tiles [dims, width].
void finish_tiles(const Mlp& mlp, const Task& task, const ForwardOutput& out, int64_t first_dim,
                  int64_t dims, const float* tiles, ForwardBuffers& buffers) {
  const int64_t count = task.last - task.first;
  const int64_t padded = round_up(dims, 16);
  float* rows = buffers.rows.get<float>(kPanel * padded);
  for (int64_t column = 0, width; column < count; column += width) {
    width = panel_width(count, column);
    transpose_floats(tiles + column * dims, width, dims, width, rows, padded);
    row_epilogue(mlp, task, out, first_dim, dims, rows, padded, column,
                 std::min(width, count - column), buffers);
  }
}

// Of D, in the second product of `count` rows of `bytes` each.
int64_t dims_at_once(bool tiles, int64_t count, int64_t bytes) {
  constexpr int64_t kLevel2 = 3 << 19;  // 1.5 MB of the 2 MB that processors with AMX have
  // Every step reads h again. oneDNN's needs a copy of few rows' weights, which must fit the cache.
  if (tiles) return count * bytes > kLevel2 ? 3 * kUnits : kUnits;
  return count <= kPanel ? kUnits / 4 : kUnits;
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
    for (int64_t column = 0, width; column < count; column += width) {
      width = panel_width(count, column);
      const float* z = tiles + column * units;
      const float* z2 = mlp.gated ? tiles2 + column * units : nullptr;
      activate_panel(mlp, z, z2, units, width,
                     activated + column * part + (unit - task.begin) * width, buffers.tile);
      for (int64_t half = 0; out.saved != nullptr && half < (mlp.gated ? 2 : 1); ++half) {
        const int64_t to = (task.first + column) * mlp.up_rows + half * mlp.hidden + unit;
        store_rows(half ? z2 : z, units, width, std::min(width, count - column), mlp.dtype,
                   at(out.saved, mlp.dtype, to), mlp.up_rows, buffers.rows);
      }
    }
  }

  const int64_t step = dims_at_once(gemm.fits_tiles(mlp.dim, part), count, part * sizeof(G));
  for (int64_t dim = 0; dim < mlp.dim; dim += step) {
    const int64_t dims = std::min(step, mlp.dim - dim);
    const int64_t from = mlp.down_at(task.expert, dim) + task.begin;
    const auto weights = left_factor<G>(gemm, at(mlp.down, mlp.stored, from), mlp.stored, mlp.hidden,
                                        dims, part, count, buffers.weights);
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
  simd().activate(z[0], z[1], mlp.act, h, count * part);
  Bf16* activated = buffers.activated.get<Bf16>(count * part);
  simd().store(h, mlp.dtype, activated, count * part);
  float* rows = buffers.rows.get<float>(count * dim);
  const auto* weights = reinterpret_cast<const Bf16*>(
      at(mlp.down, mlp.dtype, mlp.down_at(task.expert, 0) + task.begin));
  simd().dots_bf16(weights, mlp.hidden, dim, activated, part, count, part, rows, dim);
  row_epilogue(mlp, task, out, 0, dim, rows, dim, 0, count, buffers);
}

// --- forward by weights in columns -------------------------------------------------------------

// Reads memory in its order, at the rate of a stream, 20 GB/s. Blocks of an expert's weights are
// pieces of many rows, and the processor would wait for each piece, which gives 7 GB/s.
void stream_in(const void* data, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) (void)static_cast<const volatile char*>(data)[i];
}

// Whether all values are bf16's: a product of two such is exact in float32.
bool are_bf16(const float* x, int64_t n) {
  uint32_t lower = 0;
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    lower |= bits;
  }
  return (lower & 0xffffu) == 0;
}

template <typename G>
void forward_columns(const Mlp& mlp, const Gemm& gemm, const Task& task, const ForwardOutput& out) {
  thread_local ForwardBuffers buffers;
  constexpr Dtype wanted = std::is_same_v<G, float> ? Dtype::f32 : Dtype::bf16;
  const int64_t count = task.last - task.first, part = task.end - task.begin, dim = mlp.dim;
  const int64_t padded = round_up(count, kRowStep);
  G* x = buffers.up.columns.get<G>(padded * dim);
  for (int64_t j = 0; j < count; ++j) {
    const void* row = mlp.rows_of(mlp.x).row(task.first + j);
    if constexpr (wanted == Dtype::f32) {
      simd().load(row, mlp.dtype, x + j * dim, dim);
    } else {
      std::memcpy(x + j * dim, row, static_cast<size_t>(dim) * sizeof(G));
    }
  }
  std::memset(x + count * dim, 0, static_cast<size_t>((padded - count) * dim) * sizeof(G));
  // If x was bf16 before it was cast, the bf16 product sums the same terms, twice as fast.
  const Bf16* exact = nullptr;
  if constexpr (wanted == Dtype::f32) {
    if (mlp.stored == Dtype::bf16 && gemm.bf16 != nullptr && dim % 2 == 0 &&
        are_bf16(x, count * dim)) {
      Bf16* rounded = buffers.rounded.get<Bf16>(padded * dim);
      simd().store(x, Dtype::bf16, rounded, padded * dim);
      exact = rounded;
    }
  }

  const bool whole = part == mlp.hidden;
  const int64_t row_bytes = dim * bytes_of(mlp.stored);
  if (whole) stream_in(at(mlp.up, mlp.stored, mlp.up_at(task.expert, 0)), mlp.up_rows * row_bytes);
  G* activated = buffers.activated.get<G>(padded * part);
  for (int64_t unit = task.begin; unit < task.end; unit += kUnits) {
    const int64_t units = std::min(kUnits, task.end - unit);
    if (exact != nullptr) {
      project_columns<Bf16>(mlp, gemm, task.expert, exact, padded, unit, units, buffers.up);
    } else {
      project_columns<G>(mlp, gemm, task.expert, x, padded, unit, units, buffers.up);
    }
    const float* z[2] = {buffers.up.tiles.get<float>(0),
                         mlp.gated ? buffers.up.tiles2.get<float>(0) : nullptr};
    float* h = buffers.tile.get<float>(padded * units);
    simd().activate(z[0], z[1], mlp.act, h, padded * units);
    for (int64_t j = 0; j < padded; ++j) {
      simd().store(h + j * units, wanted, activated + j * part + (unit - task.begin), units);
    }
    for (int64_t half = 0; out.saved != nullptr && half < (mlp.gated ? 2 : 1); ++half) {
      const int64_t to = task.first * mlp.up_rows + half * mlp.hidden + unit;
      store_matrix(z[half], count, units, mlp.dtype, at(out.saved, mlp.dtype, to), mlp.up_rows);
    }
  }

  if (whole) {
    stream_in(at(mlp.down, mlp.stored, mlp.down_at(task.expert, 0)), mlp.hidden * row_bytes);
  }
  for (int64_t first = 0; first < dim; first += kUnits) {
    const int64_t dims = std::min(kUnits, dim - first);
    G* factor = buffers.weights.get<G>(part * round_up(dims, 16));
    const int64_t from = (task.expert * mlp.hidden + task.begin) * dim + first;
    pack_matrix(at(mlp.down, mlp.stored, from), mlp.stored, dim, part, dims, factor);
    float* rows = buffers.rows.get<float>(padded * dims);
    multiply<G>(gemm, {activated, part}, padded, part, factor, dims, rows, dims, false);
    row_epilogue(mlp, task, out, first, dims, rows, dims, 0, count, buffers);
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
  Tensor y = new_output(x, {plan.num_tokens, mlp.dim});
  Tensor saved = new_output(x, {save ? plan.num_slots() : 0, mlp.up_rows});
  const Gemm& products = gemm();
  const Tasks tasks = cut_into_tasks(plan, {mlp.hidden, kUnits, kForwardRows});
  const bool straight = plan.k == 1 && tasks.max_parts == 1;
  Tensor rows = new_output(x, {straight ? 0 : tasks.max_parts * plan.num_slots(), mlp.dim},
                          ScalarType::Float);
  ForwardOutput out{straight ? y.mutable_data_ptr() : nullptr, rows.mutable_data_ptr<float>(),
                    save ? saved.mutable_data_ptr() : nullptr};
  run_tasks(tasks.list, [&](const Task& task) {
    const bool bf16 = in_bf16(mlp, products);
    if (mlp.layout != Layout::rows) {
      (bf16 ? forward_columns<Bf16> : forward_columns<float>)(mlp, products, task, out);
    } else if (has_few_rows(mlp, products, task.expert)) {
      forward_few(mlp, task, out);
    } else {
      (bf16 ? forward_task<Bf16> : forward_task<float>)(mlp, products, task, out);
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

}  // namespace moe_fast
