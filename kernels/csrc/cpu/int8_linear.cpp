// A linear map: each task quantises a block of rows of x and multiplies it by all of the weight, or, if
// there are few rows, by a part of its rows.
#include <torch/csrc/stable/ops.h>

#include "../int8.h"
#include "int8_rows.h"
#include "tasks.h"

namespace moe_fast {
namespace {

using torch::headeronly::ScalarType;

constexpr int64_t kBlock = 128;  // rows per task

ScalarType scalar_type_of(const std::string& dtype) {
  if (dtype == "float32") return ScalarType::Float;
  if (dtype == "bfloat16") return ScalarType::BFloat16;
  if (dtype == "float16") return ScalarType::Half;
  throw std::runtime_error("dtype must be float32, bfloat16 or float16; got " + dtype + ".");
}

struct Linear {
  const void* x;
  Dtype dtype;  // of x
  Int8Weight weight;
  std::optional<Quantizer> fixed;
  Int8Norm norm;
  void* y;
  Dtype to;  // of y
};

struct Buffers {
  Int8Rows rows;
  Buffer loaded, floats, residual;
};

void linear_block(const Linear& in, int64_t first, int64_t last, int64_t begin, int64_t end) {
  thread_local Buffers buffers;
  const Int8Weight& w = in.weight;
  const int64_t count = last - first;
  buffers.rows.resize(count, w.depth);
  for (int64_t i = 0; i < count; ++i) {
    const float* x = static_cast<const float*>(in.x) + (first + i) * w.k;
    if (in.dtype != Dtype::f32) {
      x = load_floats(in.x, in.dtype, (first + i) * w.k, w.k, buffers.loaded);
    }
    buffers.rows.put(i, x, w.k, in.fixed);
  }
  // Rows go to y at once, unless they are rounded, block by block, or normalised, as a whole.
  const bool whole = in.norm.residual != nullptr, rounded = !whole && in.to != Dtype::f32;
  float* rows = buffers.floats.get<float>(whole ? count * w.n : kInt8Rows * kInt8Columns);
  multiply_rows(buffers.rows, w, begin, end,
                [&](int64_t row, int64_t here, int64_t column, int64_t columns,
                    const int32_t* sums) {
                  float* out = rounded ? rows
                               : whole ? rows + row * w.n + column
                                       : static_cast<float*>(in.y) + (first + row) * w.n + column;
                  const int64_t ld = rounded ? kInt8Columns : w.n;
                  int8_ops().dequantize(sums, here, columns, buffers.rows.scale + row,
                                        w.from(column), out, ld);
                  for (int64_t i = 0; rounded && i < here; ++i) {
                    const int64_t to = (first + row + i) * w.n + column;
                    simd().store(rows + i * ld, in.to, at(in.y, in.to, to), columns);
                  }
                });
  for (int64_t i = 0; whole && i < count; ++i) {
    finish_row(rows + i * w.n, w.n, first + i, in.norm, in.to, in.y, buffers.residual);
  }
}

}  // namespace

Tensor int8_linear_cpu(Tensor x, Tensor values, Tensor scale, Tensor sums,
                       std::optional<Tensor> bias, std::optional<Tensor> range,
                       std::optional<Tensor> residual, std::optional<Tensor> norm_weight,
                       std::optional<Tensor> norm_bias, double eps, std::string dtype) {
  if (x.dim() != 2) throw std::runtime_error("x must be [T, K].");
  const int64_t tokens = x.size(0), k = x.size(1);
  check_shape("x", x, {tokens, k});
  Linear in{};
  in.dtype = dtype_of(x);
  in.weight = view_weight("weight", values, scale, sums, bias, -1, k);
  in.fixed = view_range("input_range", range);
  Tensor y = new_output(x, {tokens, in.weight.n}, scalar_type_of(dtype));
  in.to = dtype_of(y);
  in.norm = view_norm(residual, norm_weight, norm_bias, eps, y);
  if (tokens == 0) return y;
  in.x = x.const_data_ptr();
  in.y = y.mutable_data_ptr();

  const int64_t threads = std::max<int64_t>(torch::stable::get_num_threads(), 1);
  const int64_t most = std::clamp<int64_t>(tokens / (2 * threads), kInt8Rows, kBlock);
  const int64_t block = threads == 1 ? even_blocks(tokens, kBlock) : even_blocks(tokens, most);
  const int64_t blocks = (tokens + block - 1) / block;
  const int64_t groups = (in.weight.n + kInt8Columns - 1) / kInt8Columns;
  int64_t parts = 1;
  if (in.norm.residual == nullptr && blocks < threads) {
    parts = std::min(groups, (2 * threads + blocks - 1) / blocks);
  }
  run_all(blocks * parts, [&](int64_t task) {
    const Int8Products products;
    const int64_t row = task / parts * block, part = task % parts;
    const int64_t begin = part * groups / parts * kInt8Columns;
    const int64_t end = std::min((part + 1) * groups / parts * kInt8Columns, in.weight.n);
    linear_block(in, row, std::min(row + block, tokens), begin, end);
  });
  return y;
}

}  // namespace moe_fast
