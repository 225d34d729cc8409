// The backward processes blocks of rows and of H, like the forward:
//
//   dh = dO W2; h and dz from z; dW2 += (w dO)^T h; dW1 += dz^T x; dx += dz W1.
#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "../expert_mlp.h"
#include "gradient.h"
#include "up_projection.h"

namespace moe_fast {
namespace {

using torch::headeronly::ScalarType;

// Rows, and units of H, per block: their tiles fit the level 2 and 3 caches.
constexpr int64_t kBackwardRows = 1024;
constexpr int64_t kBackwardUnits = 256;

// A task computes units begin .. end of H for all rows of its expert: those rows and columns of the
// weights' gradients, and its part of dx and of the gradients of the routing weights.
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

// One block of rows of a task, gathered into the factors of the products.
template <typename G>
struct RowBlock {
  int64_t first, count, padded;  // padded to a multiple of kGroup with zeros
  G* grad;                       // dO [padded, D]
  G* grad_t;                     // (w dO)^T [D, padded]
  G* x;                          // right factor [padded, D]
};

template <typename G>
RowBlock<G> gather_block(const Mlp& mlp, const RowSource& grad_y, int64_t first, int64_t count,
                         const float* down_bias, float* db2, float* row_weights,
                         BackwardBuffers<G>& buffers) {
  const int64_t dim = mlp.dim;
  RowBlock<G> block;
  block.first = first;
  block.count = count;
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

// h and dz of a block of units, in the layouts that the products need.
template <typename G>
struct UnitBlock {
  int64_t first, units;
  G* h;        // right factor [padded, units]
  G* dz[2];    // left factors [padded, units]
  G* dz_t[2];  // left factors [units, padded]
};

// Computes z of the block's rows and units again, as float rows [count, units] in buffers.z and z2.
template <typename G>
void compute_z(const Mlp& mlp, const Gemm& gemm, const Task& task, const RowBlock<G>& block,
               const UnitBlock<G>& unit, BackwardBuffers<G>& buffers) {
  const int64_t halves = mlp.gated ? 2 : 1;
  float* z[2] = {buffers.z.template get<float>(block.padded * unit.units),
                 buffers.z2.template get<float>(mlp.gated ? block.padded * unit.units : 0)};
  if (has_few_rows(mlp, gemm, task.expert)) {
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
      for (int64_t column = 0, width; column < block.count; column += width) {
        width = panel_width(block.count, column);
        store_rows(tiles + column * units, units, width, std::min(width, block.count - column),
                   Dtype::f32,
                   z[half] + column * unit.units + u, unit.units, buffers.rows);
      }
    }
  }
}

// `count` rows of one half of z from row `first` of the block on, [count, units]: from the result
// of compute_z(), or loaded from what the forward saved, then at most kGroup rows.
template <typename G>
const float* rows_of_z(const Mlp& mlp, const void* saved, const RowBlock<G>& block,
                       const UnitBlock<G>& unit, int64_t half, int64_t first, int64_t count,
                       BackwardBuffers<G>& buffers) {
  Buffer& buffer = half ? buffers.z2 : buffers.z;
  if (saved == nullptr) return buffer.get<float>(0) + first * unit.units;
  float* z = buffer.get<float>(kGroup * unit.units);
  for (int64_t j = 0; j < count; ++j) {
    const int64_t row = block.first + first + j;
    const void* from = at(saved, mlp.dtype, row * mlp.up_rows + half * mlp.hidden + unit.first);
    simd().load(from, mlp.dtype, z + j * unit.units, unit.units);
  }
  return z;
}

template <typename G>
void activation_backward(const Mlp& mlp, const void* saved, const RowBlock<G>& block,
                         const UnitBlock<G>& unit, const float* grad_h, float* row_weights,
                         float* db1, BackwardBuffers<G>& buffers) {
  const int64_t n = unit.units;
  const int64_t halves = mlp.gated ? 2 : 1;
  float* group = buffers.group.template get<float>(3 * kGroup * n);  // h, dz, dz2
  float* dz[2] = {group + kGroup * n, group + 2 * kGroup * n};
  constexpr Dtype stored = std::is_same_v<G, float> ? Dtype::f32 : Dtype::bf16;
  for (int64_t i = 0; i < block.padded; i += kGroup) {
    const int64_t here = std::clamp<int64_t>(block.count - i, 0, kGroup);
    const float* z = rows_of_z(mlp, saved, block, unit, 0, i, here, buffers);
    const float* z2 =
        mlp.gated ? rows_of_z(mlp, saved, block, unit, 1, i, here, buffers) : nullptr;
    for (int64_t j = 0; j < here; ++j) {
      const int64_t r = i + j;
      const float* second = mlp.gated ? z2 + j * n : nullptr;
      float* dz2 = mlp.gated ? dz[1] + j * n : nullptr;
      row_weights[block.first + r] += simd().activate_backward(
          grad_h + r * n, z + j * n, second, mlp.plan.weight(block.first + r), mlp.act,
          group + j * n, dz[0] + j * n, dz2, n);
    }
    for (int64_t half = 0; half < halves; ++half) {
      for (int64_t j = 0; j < here; ++j) {
        if (db1 != nullptr) {
          simd().add_scaled(db1 + half * mlp.hidden + unit.first, dz[half] + j * n, 1.0f, n);
        }
        simd().store(dz[half] + j * n, stored, unit.dz[half] + (i + j) * n, n);
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

// Where the weights' gradients of units first .. first + units are summed, in float32: in the
// output itself if that is its dtype. Null if they are not summed but written at once, rounded.
struct WeightSums {
  int64_t first, units;
  float* up[2];   // [units, D]
  float* down;    // [D, units], down_ld apart
  int64_t down_ld;
};

// Whether the weights' gradients of `units` of H, from one block of rows, are written at once.
template <typename G>
bool written_at_once(const Mlp& mlp, const Gemm& gemm, const RowBlock<G>& block, int64_t units) {
  return std::is_same_v<G, Bf16> && gemm.fits_tiles(mlp.dim, block.padded) &&
         gemm.fits_tiles(units, block.padded);
}

template <typename G>
WeightSums weight_sums(const Mlp& mlp, const Task& task, const BackwardOutput& out, int64_t first,
                       int64_t units, BackwardBuffers<G>& buffers) {
  const int64_t halves = mlp.gated ? 2 : 1;
  WeightSums sums{first, units, {nullptr, nullptr}, nullptr, 0};
  if (mlp.dtype == Dtype::f32) {
    for (int64_t half = 0; half < halves; ++half) {
      const int64_t row = mlp.up_at(task.expert, half * mlp.hidden + first);
      sums.up[half] = static_cast<float*>(out.grad_up) + row;
    }
    sums.down = static_cast<float*>(out.grad_down) + mlp.down_at(task.expert, 0) + first;
    sums.down_ld = mlp.hidden;
  } else {
    float* up = buffers.grad_up.template get<float>(halves * units * mlp.dim);
    for (int64_t half = 0; half < halves; ++half) sums.up[half] = up + half * units * mlp.dim;
    sums.down = buffers.grad_down.template get<float>(units * mlp.dim);
    sums.down_ld = units;
  }
  return sums;
}

void store_sums(const Mlp& mlp, const Task& task, const BackwardOutput& out,
                const WeightSums& sums) {
  if (mlp.dtype == Dtype::f32 || sums.down == nullptr) return;
  for (int64_t half = 0; half < (mlp.gated ? 2 : 1); ++half) {
    const int64_t row = mlp.up_at(task.expert, half * mlp.hidden + sums.first);
    store_matrix(sums.up[half], sums.units, mlp.dim, mlp.dtype, at(out.grad_up, mlp.dtype, row),
                 mlp.dim);
  }
  const int64_t column = mlp.down_at(task.expert, 0) + sums.first;
  store_matrix(sums.down, mlp.dim, sums.units, mlp.dtype, at(out.grad_down, mlp.dtype, column),
               mlp.hidden);
}

// A gradient of weights, A B [m, n]: added to (or, unless `later`, written to) sums, sums_ld apart,
// or written to `out` in bf16 if sums is null.
template <typename G>
void weight_gradient(const Gemm& gemm, LeftFactor<G> a, int64_t m, int64_t k, const G* b, int64_t n,
                     float* sums, int64_t sums_ld, bool later, void* out, int64_t out_ld) {
  if constexpr (std::is_same_v<G, Bf16>) {
    if (sums == nullptr) {
      gemm.rounded_tiles(m, n, k, a.data, a.ld, b, static_cast<Bf16*>(out), out_ld);
      return;
    }
  }
  multiply<G>(gemm, a, m, k, b, n, sums, sums_ld, later);
}

// The products of a block of rows with a block of units.
template <typename G>
void backward_block(const Mlp& mlp, const Gemm& gemm, const Task& task, const void* saved,
                    const RowBlock<G>& block, int64_t first_unit, int64_t units,
                    const WeightSums& sums, const BackwardOutput& out, float* db1,
                    BackwardBuffers<G>& buffers) {
  const int64_t dim = mlp.dim;
  const int64_t halves = mlp.gated ? 2 : 1;
  UnitBlock<G> unit;
  unit.first = first_unit;
  unit.units = units;
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

  if (saved == nullptr) compute_z(mlp, gemm, task, block, unit, buffers);
  float* row_weights = out.row_weights + task.part * mlp.plan.num_slots();
  activation_backward(mlp, saved, block, unit, grad_h, row_weights, db1, buffers);

  const bool later = block.first > task.first;
  const int64_t offset = first_unit - sums.first;
  const bool summed = sums.down != nullptr;
  const int64_t down_at = mlp.down_at(task.expert, 0) + first_unit;
  weight_gradient<G>(gemm, {block.grad_t, block.padded}, dim, block.padded, unit.h, n,
                     summed ? sums.down + offset : nullptr, sums.down_ld, later,
                     at(out.grad_down, mlp.dtype, down_at), mlp.hidden);
  float* rows = buffers.rows_x.template get<float>(block.padded * dim);
  for (int64_t half = 0; half < halves; ++half) {
    const int64_t up_at = mlp.up_at(task.expert, half * mlp.hidden + first_unit);
    weight_gradient<G>(gemm, {unit.dz_t[half], block.padded}, n, block.padded, block.x, dim,
                       summed ? sums.up[half] + offset * dim : nullptr, dim, later,
                       at(out.grad_up, mlp.dtype, up_at), dim);
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

  // Part 0 of an expert also computes what does not depend on H: db2, and <dO, b2>.
  float* db1 = buffers.up_bias.template get<float>(mlp.up_rows);
  float* db2 = task.part == 0 ? buffers.down_bias.template get<float>(dim) : nullptr;
  std::fill_n(db1, mlp.up_rows, 0.0f);
  if (db2 != nullptr) std::fill_n(db2, dim, 0.0f);
  const float* b2 = nullptr;
  if (task.part == 0) {
    b2 = load_floats(mlp.down_bias, mlp.dtype, task.expert * dim, dim, buffers.bias);
  }
  float* row_weights = out.row_weights + task.part * mlp.plan.num_slots();

  // With one block of rows each block of units is finished at once, so its sums stay in the cache.
  const int64_t rows = task.last - task.first;
  const int64_t step = even_blocks(rows, kBackwardRows);
  const bool whole = rows <= step;
  WeightSums sums;
  if (!whole) sums = weight_sums(mlp, task, out, task.begin, units, buffers);
  for (int64_t first = task.first; first < task.last; first += step) {
    const int64_t count = std::min(step, task.last - first);
    const auto block = gather_block<G>(mlp, grad_y, first, count, b2, db2, row_weights, buffers);
    for (int64_t unit = task.begin; unit < task.end; unit += kBackwardUnits) {
      const int64_t here = std::min(kBackwardUnits, task.end - unit);
      if (whole && written_at_once(mlp, gemm, block, here)) {
        sums = {unit, here, {nullptr, nullptr}, nullptr, 0};
      } else if (whole) {
        sums = weight_sums(mlp, task, out, unit, here, buffers);
      }
      backward_block<G>(mlp, gemm, task, saved, block, unit, here, sums, out, db1, buffers);
      if (whole) store_sums(mlp, task, out, sums);
    }
    // rows_x is padded, because oneDNN would generate a kernel for every number of rows.
    std::memcpy(out.rows + (task.part * mlp.plan.num_slots() + first) * dim,
                buffers.rows_x.template get<float>(0),
                static_cast<size_t>(block.count * dim) * sizeof(float));
  }
  if (!whole) store_sums(mlp, task, out, sums);

  for (int64_t half = 0; half < (mlp.gated ? 2 : 1); ++half) {
    const int64_t row = half * mlp.hidden + task.begin;
    simd().store(db1 + row, mlp.dtype,
                   at(out.grad_up_bias, mlp.dtype, task.expert * mlp.up_rows + row), units);
  }
  if (db2 != nullptr) {
    simd().store(db2, mlp.dtype, at(out.grad_down_bias, mlp.dtype, task.expert * dim), dim);
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

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> expert_mlp_backward_cpu(
    Tensor grad_y, Tensor x, Tensor up_proj, Tensor down_proj, std::optional<Tensor> up_proj_bias,
    std::optional<Tensor> down_proj_bias, Tensor top_k_weights, Tensor expert_offsets,
    Tensor row_to_token, Tensor row_to_slot, Tensor slot_to_row, Tensor saved, std::string act,
    bool gated) {
  const Mlp mlp = view_mlp(x, up_proj, down_proj, up_proj_bias, down_proj_bias, top_k_weights,
                           expert_offsets, row_to_token, row_to_slot, slot_to_row, act, gated);
  if (mlp.layout != Layout::rows || mlp.stored != mlp.dtype) {
    throw std::runtime_error("the backward takes contiguous weights in the dtype of x.");
  }
  const PlanView& plan = mlp.plan;
  const void* grad_data = data_of("grad_y", grad_y, x, {plan.num_tokens, mlp.dim});
  const bool recompute = saved.dim() == 2 && saved.size(0) == 0;
  const void* z = data_of("saved", saved, x, {recompute ? 0 : plan.num_slots(), mlp.up_rows});

  Tensor grad_x = new_output(x, {plan.num_tokens, mlp.dim});
  Tensor grad_up = new_output(x, {plan.num_experts, mlp.up_rows, mlp.dim});
  Tensor grad_down = new_output(x, {plan.num_experts, mlp.dim, mlp.hidden});
  Tensor grad_up_bias = new_output(x, {plan.num_experts, mlp.up_rows});
  Tensor grad_down_bias = new_output(x, {plan.num_experts, mlp.dim});
  Tensor grad_weights = new_output(top_k_weights, {plan.num_tokens, plan.k});

  const Gemm& products = gemm();
  const Tasks tasks = cut_into_tasks(plan, {mlp.hidden, kUnits, 0});
  const int64_t partial_rows = tasks.max_parts * plan.num_slots();
  Tensor rows = new_output(x, {partial_rows, mlp.dim}, ScalarType::Float);
  Tensor row_weights = new_output(x, {partial_rows}, ScalarType::Float);
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
