// Linear maps and MLPs of experts: each task gathers and quantises a block of an expert's sorted rows.
// In an MLP, the activated rows stay in the cache as floats until they are complete, since their scale
// depends on the whole row.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "../int8.h"
#include "int8_rows.h"
#include "tasks.h"

namespace moe_fast {
namespace {

using torch::headeronly::ScalarType;

constexpr int64_t kBlock = 128;  // rows per task

struct Experts {
  PlanView plan;
  const void* x;
  Dtype dtype;
  Int8Weight up, down;  // an expert's linear map has only `down`
  std::optional<Quantizer> up_fixed, down_fixed;
  Act act;
  bool gated;
};

// Results go to y [T, n] if each token has one row, otherwise to rows [S, n].
struct Results {
  void* y;
  float* rows;
  Int8Norm norm;
};

struct Buffers {
  Int8Rows x, hidden;
  Buffer loaded, z, h, ranges, out, residual;
};

struct Block {
  int64_t expert, first, last;
};

std::vector<Block> cut_into_blocks(const PlanView& plan) {
  const int64_t threads = std::max<int64_t>(torch::stable::get_num_threads(), 1);
  const int64_t share = threads == 1 ? kBlock : plan.num_rows() / (4 * threads);
  const int64_t most = std::clamp<int64_t>(round_up(share, kInt8Rows), kInt8Rows, kBlock);
  std::vector<Block> blocks;
  for (int64_t e = 0; e < plan.num_experts; ++e) {
    const int64_t rows = plan.rows_of(e);
    if (rows == 0) continue;
    const int64_t block = even_blocks(rows, most);
    for (int64_t r = 0; r < rows; r += block) {
      blocks.push_back({e, plan.offsets[e] + r, plan.offsets[e] + std::min(r + block, rows)});
    }
  }
  return blocks;
}

void gather(const Experts& in, int64_t k, const std::optional<Quantizer>& fixed, const Block& block,
            int64_t depth, Int8Rows& rows, Buffer& buffer) {
  rows.resize(block.last - block.first, depth);
  for (int64_t i = 0; i < rows.count; ++i) {
    const int64_t token = in.plan.row_to_token[block.first + i];
    const float* x = static_cast<const float*>(in.x) + token * k;
    if (in.dtype != Dtype::f32) x = load_floats(in.x, in.dtype, token * k, k, buffer);
    rows.put(i, x, k, fixed);
  }
}

// h = GELU(z) of a block's rows, quantised: z is activated as it leaves the product.
void compute_gelu(const Experts& in, const Int8Weight& up, Buffers& buffers) {
  const int64_t count = buffers.x.count, hidden = up.n;
  float* h = buffers.h.get<float>(count * hidden);
  auto* ranges = buffers.ranges.get<Lanes>(count);
  std::memset(ranges, 0, static_cast<size_t>(count) * sizeof(Lanes));
  multiply_rows(buffers.x, up, 0, hidden,
                [&](int64_t row, int64_t rows, int64_t column, int64_t columns,
                    const int32_t* sums) {
                  int8_ops().dequantize_gelu(sums, rows, columns, buffers.x.scale + row,
                                             up.from(column), h + row * hidden + column, hidden,
                                             ranges + row);
                });
  buffers.hidden.resize(count, in.down.depth);
  for (int64_t i = 0; i < count; ++i) {
    const Lanes& lanes = ranges[i];
    const float low = *std::min_element(lanes.low, lanes.low + 16);
    const float high = *std::max_element(lanes.high, lanes.high + 16);
    const float poison = std::accumulate(lanes.poison, lanes.poison + 16, 0.0f);
    const Quantizer own = quantizer(low, high, poison);
    buffers.hidden.put(i, h + i * hidden, hidden, in.down_fixed.value_or(own));
  }
}

// The same for any activation, plain or gated.
void compute_hidden(const Experts& in, const Int8Weight& up, Buffers& buffers) {
  const int64_t count = buffers.x.count, hidden = in.down.k;
  float* z = buffers.z.get<float>(count * up.n);
  multiply_rows(buffers.x, up, 0, up.n,
                [&](int64_t row, int64_t rows, int64_t column, int64_t columns,
                    const int32_t* sums) {
                  int8_ops().dequantize(sums, rows, columns, buffers.x.scale + row,
                                        up.from(column), z + row * up.n + column, up.n);
                });
  buffers.hidden.resize(count, in.down.depth);
  float* h = buffers.h.get<float>(hidden);
  for (int64_t i = 0; i < count; ++i) {
    const float* row = z + i * up.n;
    simd().activate(row, in.gated ? row + hidden : nullptr, in.act, h, hidden);
    buffers.hidden.put(i, h, hidden, in.down_fixed);
  }
}

void finish_block(const Experts& in, const Results& results, const Block& block,
                  const Int8Rows& rows, const Int8Weight& w, Buffers& buffers) {
  const int64_t count = rows.count;
  float* out = results.y == nullptr ? results.rows + block.first * w.n
                                    : buffers.out.get<float>(count * w.n);
  multiply_rows(rows, w, 0, w.n,
                [&](int64_t row, int64_t here, int64_t column, int64_t columns,
                    const int32_t* sums) {
                  int8_ops().dequantize(sums, here, columns, rows.scale + row, w.from(column),
                                        out + row * w.n + column, w.n);
                });
  for (int64_t i = 0; results.y != nullptr && i < count; ++i) {
    float* row = out + i * w.n;
    const float weight = in.plan.weight(block.first + i);
    if (weight != 1.0f) simd().scale_add(row, weight, nullptr, row, w.n);
    finish_row(row, w.n, in.plan.row_to_token[block.first + i], results.norm, in.dtype, results.y,
               buffers.residual);
  }
}

void run_block(const Experts& in, const Results& results, bool mlp, const Block& block) {
  thread_local Buffers buffers;
  const Int8Products products;
  const Int8Weight down = in.down.of(block.expert);
  if (!mlp) {
    gather(in, down.k, in.down_fixed, block, down.depth, buffers.x, buffers.loaded);
    finish_block(in, results, block, buffers.x, down, buffers);
    return;
  }
  const Int8Weight up = in.up.of(block.expert);
  gather(in, up.k, in.up_fixed, block, up.depth, buffers.x, buffers.loaded);
  if (in.act == Act::gelu && !in.gated) {
    compute_gelu(in, up, buffers);
  } else {
    compute_hidden(in, up, buffers);
  }
  finish_block(in, results, block, buffers.hidden, down, buffers);
}

// Sums the rows of each token, if it has several, and finishes the tokens that no block has.
void finish_tokens(const Experts& in, const Results& results, int64_t n, Tensor& y) {
  const bool straight = results.y != nullptr;
  if (!straight) {
    combine(in.plan, Tasks{}, results.rows, n, true, in.dtype, y.mutable_data_ptr());
    if (results.norm.residual == nullptr) return;
  } else if (in.plan.num_rows() == in.plan.num_tokens) {
    return;
  }
  run_chunks(in.plan.num_tokens, 64, [&](int64_t begin, int64_t end) {
    thread_local Buffer row_buffer, residual;
    for (int64_t t = begin; t < end; ++t) {
      if (straight && in.plan.slot_to_row[t] >= 0) continue;
      float* row = row_buffer.get<float>(n);
      if (straight) {
        std::fill_n(row, n, 0.0f);
      } else {
        simd().load(at(y.mutable_data_ptr(), in.dtype, t * n), in.dtype, row, n);
      }
      finish_row(row, n, t, results.norm, in.dtype, y.mutable_data_ptr(), residual);
    }
  });
}

Tensor run(const Experts& in, bool mlp, Tensor x, const std::optional<Tensor>& residual,
           const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias,
           double eps) {
  const int64_t n = in.down.n;
  Tensor y = new_output(x, {in.plan.num_tokens, n});
  const bool straight = in.plan.k == 1;
  Tensor rows = new_output(x, {straight ? 0 : in.plan.num_slots(), n}, ScalarType::Float);
  Results results{straight ? y.mutable_data_ptr() : nullptr, rows.mutable_data_ptr<float>(),
                  view_norm(residual, norm_weight, norm_bias, eps, y)};
  const std::vector<Block> blocks = cut_into_blocks(in.plan);
  run_all(static_cast<int64_t>(blocks.size()), [&](int64_t i) {
    run_block(in, results, mlp, blocks[static_cast<size_t>(i)]);
  });
  finish_tokens(in, results, n, y);
  return y;
}

void view_rows(Experts& in, const Tensor& x) {
  if (x.dim() != 2) throw std::runtime_error("x must be [T, D].");
  check_shape("x", x, {x.size(0), x.size(1)});
  in.x = x.const_data_ptr();
  in.dtype = dtype_of(x);
}

Act act_of(const std::string& name) {
  for (const NamedAct& known : kActs) {
    if (name == known.name) return known.act;
  }
  throw std::runtime_error("unknown activation '" + name + "'.");
}

}  // namespace

Tensor int8_expert_linear_cpu(Tensor x, Tensor values, Tensor scale, Tensor sums,
                              std::optional<Tensor> bias, std::optional<Tensor> range,
                              Tensor top_k_weights, Tensor expert_offsets, Tensor row_to_token,
                              Tensor row_to_slot, Tensor slot_to_row) {
  Experts in{};
  view_rows(in, x);
  const int64_t experts = expert_offsets.numel() - 1;
  in.plan = view_plan(top_k_weights, expert_offsets, row_to_token, row_to_slot, slot_to_row,
                      x.size(0), experts);
  in.down = view_weight("weight", values, scale, sums, bias, experts, x.size(1));
  in.down_fixed = view_range("input_range", range);
  return run(in, false, x, std::nullopt, std::nullopt, std::nullopt, 0.0);
}

Tensor int8_expert_mlp_cpu(Tensor x, Tensor up_values, Tensor up_scale, Tensor up_sums,
                           std::optional<Tensor> up_bias, std::optional<Tensor> up_range,
                           Tensor down_values, Tensor down_scale, Tensor down_sums,
                           std::optional<Tensor> down_bias, std::optional<Tensor> down_range,
                           Tensor top_k_weights, Tensor expert_offsets, Tensor row_to_token,
                           Tensor row_to_slot, Tensor slot_to_row, std::optional<Tensor> residual,
                           std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias,
                           double eps, std::string act, bool gated) {
  Experts in{};
  view_rows(in, x);
  in.act = act_of(act);
  in.gated = gated;
  const int64_t experts = expert_offsets.numel() - 1, dim = x.size(1);
  in.plan = view_plan(top_k_weights, expert_offsets, row_to_token, row_to_slot, slot_to_row,
                      x.size(0), experts);
  in.up = view_weight("up_proj", up_values, up_scale, up_sums, up_bias, experts, dim);
  if (gated && in.up.n % 2 != 0) throw std::runtime_error("up_proj must have an even U if gated.");
  in.down = view_weight("down_proj", down_values, down_scale, down_sums, down_bias, experts,
                        gated ? in.up.n / 2 : in.up.n);
  if (in.down.n != dim) throw std::runtime_error("down_proj must have D rows.");
  in.up_fixed = view_range("up_range", up_range);
  in.down_fixed = view_range("down_range", down_range);
  return run(in, true, x, residual, norm_weight, norm_bias, eps);
}

}  // namespace moe_fast
