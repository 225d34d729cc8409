// As in expert_mlp.cpp, with one projection. The forward computes y^T = W x^T and reads the weights
// in place; the backward computes u = dO W, from which dx and the gradients of the routing weights
// follow, and dW += (w dO)^T x.
#include "../expert_linear.h"

#include <torch/csrc/stable/ops.h>

#include <stdexcept>

#include "gemm.h"
#include "gradient.h"
#include "packing.h"
#include "plan_view.h"
#include "simd.h"
#include "tasks.h"

namespace moe_fast {
namespace {

using torch::headeronly::ScalarType;

constexpr int64_t kOutputs = 128;       // of O at a time in the forward
constexpr int64_t kForwardRows = 768;   // per task, which reads the weights once
constexpr int64_t kBackwardRows = 512;  // per block in the backward
constexpr int64_t kInputs = 96;         // parts of I in the backward are multiples of it

struct Linear {
  PlanView plan;
  Dtype dtype;
  int64_t in, out;  // I, O
  const void *x, *weight, *bias;
  const void* weight_row(int64_t expert, int64_t o) const {
    return at(weight, dtype, (expert * out + o) * in);
  }
};

Linear view_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                   const Tensor& top_k_weights, const Tensor& expert_offsets,
                   const Tensor& row_to_token, const Tensor& row_to_slot,
                   const Tensor& slot_to_row) {
  if (x.dim() != 2 || weight.dim() != 3) {
    throw std::runtime_error("x must be [T, I] and weight [E, O, I].");
  }
  Linear linear;
  linear.dtype = dtype_of(x);
  linear.in = x.size(1);
  linear.out = weight.size(1);
  const int64_t experts = weight.size(0);
  linear.plan = view_plan(top_k_weights, expert_offsets, row_to_token, row_to_slot, slot_to_row,
                          x.size(0), experts);
  linear.x = data_of("x", x, x, {x.size(0), linear.in});
  linear.weight = data_of("weight", weight, x, {experts, linear.out, linear.in});
  linear.bias = data_of("bias", bias, x, {experts, linear.out});
  if (linear.in == 0 || linear.out == 0) throw std::runtime_error("I and O must not be 0.");
  return linear;
}

// bf16 products need even depths, since pairs of them are multiplied at once.
bool in_bf16(const Linear& linear, const Gemm& gemm) {
  return linear.dtype == Dtype::bf16 && gemm.bf16 != nullptr && linear.in % 2 == 0 &&
         linear.out % 2 == 0;
}

struct Buffers {
  Buffer columns, weights, tiles, converted, bias, rows, finished;      // forward
  Buffer grad, grad_t, x, factor, group, pairs, grad_weight, db, input;  // backward
};

// Writes y [T, O] if each token has one row, otherwise rows [S, O]; the other one is null.
template <typename G>
void forward_task(const Linear& linear, const Gemm& gemm, const Task& task, void* y,
                  float* rows_out) {
  thread_local Buffers buffers;
  const PlanView& plan = linear.plan;
  const int64_t count = task.last - task.first;
  G* columns = buffers.columns.get<G>(round_up(count, 16) * linear.in);
  pack_columns(RowSource{linear.x, linear.dtype, linear.in, plan.row_to_token}, task.first, count,
               columns, buffers.converted);
  for (int64_t o = task.begin; o < task.end; o += kOutputs) {
    const int64_t outputs = std::min(kOutputs, task.end - o);
    const int64_t padded = round_up(outputs, 16);
    const auto weights = left_factor<G>(gemm, linear.weight_row(task.expert, o), linear.dtype, linear.in,
                                        outputs, linear.in, count, buffers.weights);
    float* tiles = buffers.tiles.get<float>(outputs * round_up(count, 16));
    multiply_tiles(gemm, weights, outputs, linear.in, columns, count, tiles);
    const float* bias = load_floats(linear.bias, linear.dtype, task.expert * linear.out + o,
                                    outputs, buffers.bias);
    float* rows = buffers.rows.get<float>(kPanel * padded);
    float* finished = buffers.finished.get<float>(outputs);
    for (int64_t column = 0, width; column < count; column += width) {
      width = panel_width(count, column);
      transpose_floats(tiles + column * outputs, width, outputs, width, rows, padded);
      for (int64_t j = 0; j < std::min(width, count - column); ++j) {
        const int64_t row = task.first + column + j;
        if (y == nullptr) {
          simd().scale_add(rows + j * padded, 1.0f, bias, rows_out + row * linear.out + o,
                             outputs);
        } else {
          const int64_t to = plan.row_to_token[row] * linear.out + o;
          simd().scale_add(rows + j * padded, plan.weight(row), bias, finished, outputs);
          simd().store(finished, linear.dtype, at(y, linear.dtype, to), outputs);
        }
      }
    }
  }
}

struct BackwardOutput {
  void *grad_weight, *grad_bias;
  float* rows;         // u [S, I]
  float* row_weights;  // [parts, S]
};

// A task computes inputs begin .. end of I for all rows of its expert.
template <typename G>
void backward_task(const Linear& linear, const Gemm& gemm, const void* grad_y, const Task& task,
                   const BackwardOutput& out) {
  thread_local Buffers buffers;
  const PlanView& plan = linear.plan;
  const Dtype dtype = linear.dtype;
  const int64_t outputs = linear.out;
  const int64_t inputs = task.end - task.begin;
  const RowSource grad_rows{grad_y, dtype, outputs, plan.row_to_token};
  const RowSource x_rows{linear.x, dtype, linear.in, plan.row_to_token};

  // Part 0 of an expert also computes what does not depend on I: db, and <dO, b>.
  float* db = task.part == 0 ? buffers.db.get<float>(outputs) : nullptr;
  if (db != nullptr) std::fill_n(db, outputs, 0.0f);
  const float* bias = nullptr;
  if (task.part == 0) {
    bias = load_floats(linear.bias, dtype, task.expert * outputs, outputs, buffers.bias);
  }
  G* factor = buffers.factor.get<G>(outputs * round_up(inputs, 16));
  pack_rows([&](int64_t o) { return at(linear.weight_row(task.expert, o), dtype, task.begin); },
            dtype, outputs, inputs, factor);
  float* grad_weight = buffers.grad_weight.get<float>(outputs * inputs);
  float* row_weights = out.row_weights + task.part * plan.num_slots();
  float* input = buffers.input.get<float>(inputs);

  const int64_t step = even_blocks(task.last - task.first, kBackwardRows);
  for (int64_t first = task.first; first < task.last; first += step) {
    const int64_t count = std::min(step, task.last - first);
    const int64_t padded = round_up(count, kGroup);
    G* grad = buffers.grad.get<G>(padded * outputs);
    G* grad_t = buffers.grad_t.get<G>(padded * outputs);
    G* x = buffers.x.get<G>(padded * round_up(inputs, 16));
    pack_gradient(grad_rows, plan, first, count, bias, grad, grad_t, db, row_weights,
                  buffers.group, buffers.pairs);
    const auto x_row = [&](int64_t i) -> const void* {
      return i < count ? at(x_rows.row(first + i), dtype, task.begin) : nullptr;
    };
    pack_rows(x_row, dtype, padded, inputs, x);

    // Padded like the factors, because oneDNN would generate a kernel for every number of rows.
    float* rows = buffers.rows.get<float>(padded * inputs);
    multiply<G>(gemm, {grad, outputs}, padded, outputs, factor, inputs, rows, inputs, false);
    for (int64_t i = 0; i < count; ++i) {
      const float* u = rows + i * inputs;
      simd().load(x_row(i), dtype, input, inputs);
      row_weights[first + i] += simd().dot(u, input, inputs);
      std::memcpy(out.rows + (first + i) * linear.in + task.begin, u,
                  static_cast<size_t>(inputs) * sizeof(float));
    }
    multiply<G>(gemm, {grad_t, padded}, outputs, padded, x, inputs, grad_weight, inputs,
                first > task.first);
  }
  const int64_t to = task.expert * outputs * linear.in + task.begin;
  store_matrix(grad_weight, outputs, inputs, dtype, at(out.grad_weight, dtype, to), linear.in);
  if (db != nullptr) {
    simd().store(db, dtype, at(out.grad_bias, dtype, task.expert * outputs), outputs);
  }
}

}  // namespace

Tensor expert_linear_cpu(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor top_k_weights,
                         Tensor expert_offsets, Tensor row_to_token, Tensor row_to_slot,
                         Tensor slot_to_row) {
  const Linear linear = view_linear(x, weight, bias, top_k_weights, expert_offsets, row_to_token,
                                    row_to_slot, slot_to_row);
  const PlanView& plan = linear.plan;
  Tensor y = new_output(x, {plan.num_tokens, linear.out});
  const Gemm& products = gemm();
  // Each part of O writes its own columns, so that nothing is summed over parts.
  Tasks tasks = cut_into_tasks(plan, {linear.out, kOutputs, kForwardRows});
  tasks.max_parts = 1;
  const bool straight = plan.k == 1;
  Tensor rows = new_output(x, {straight ? 0 : plan.num_slots(), linear.out}, ScalarType::Float);
  void* y_to = straight ? y.mutable_data_ptr() : nullptr;
  float* rows_to = rows.mutable_data_ptr<float>();
  run_tasks(tasks.list, [&](const Task& task) {
    if (in_bf16(linear, products)) {
      forward_task<Bf16>(linear, products, task, y_to, rows_to);
    } else {
      forward_task<float>(linear, products, task, y_to, rows_to);
    }
    products.finish();
  });
  if (straight) {
    zero_skipped_tokens(plan, linear.out, linear.dtype, y_to);
  } else {
    combine(plan, tasks, rows_to, linear.out, true, linear.dtype, y.mutable_data_ptr());
  }
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> expert_linear_backward_cpu(
    Tensor grad_y, Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor top_k_weights,
    Tensor expert_offsets, Tensor row_to_token, Tensor row_to_slot, Tensor slot_to_row) {
  const Linear linear = view_linear(x, weight, bias, top_k_weights, expert_offsets, row_to_token,
                                    row_to_slot, slot_to_row);
  const PlanView& plan = linear.plan;
  const void* grad_data = data_of("grad_y", grad_y, x, {plan.num_tokens, linear.out});
  Tensor grad_x = new_output(x, {plan.num_tokens, linear.in});
  Tensor grad_weight = new_output(x, {plan.num_experts, linear.out, linear.in});
  Tensor grad_bias = new_output(x, {plan.num_experts, linear.out});
  Tensor grad_weights = new_output(top_k_weights, {plan.num_tokens, plan.k});

  const Gemm& products = gemm();
  Tasks tasks = cut_into_tasks(plan, {linear.in, kInputs, 0});
  Tensor rows = new_output(x, {plan.num_slots(), linear.in}, ScalarType::Float);
  Tensor row_weights =
      new_output(x, {tasks.max_parts * plan.num_slots()}, ScalarType::Float);
  const BackwardOutput out{grad_weight.mutable_data_ptr(), grad_bias.mutable_data_ptr(),
                           rows.mutable_data_ptr<float>(), row_weights.mutable_data_ptr<float>()};
  run_tasks(tasks.list, [&](const Task& task) {
    if (in_bf16(linear, products)) {
      backward_task<Bf16>(linear, products, grad_data, task, out);
    } else {
      backward_task<float>(linear, products, grad_data, task, out);
    }
    products.finish();
  });
  for (int64_t e = 0; e < plan.num_experts; ++e) {
    if (plan.rows_of(e) > 0) continue;
    zero_rows(out.grad_weight, linear.dtype, e, 1, linear.out * linear.in);
    zero_rows(out.grad_bias, linear.dtype, e, 1, linear.out);
  }
  slot_sums(plan, tasks, out.row_weights, grad_weights.mutable_data_ptr<float>());
  tasks.max_parts = 1;  // u has no parts: each task wrote its own columns
  combine(plan, tasks, out.rows, linear.in, true, linear.dtype, grad_x.mutable_data_ptr());
  return {grad_x, grad_weight, grad_bias, grad_weights};
}

}  // namespace moe_fast
