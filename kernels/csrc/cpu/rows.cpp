// Each thread has its own tokens, slots or rows; no sum runs across threads.
#include "../rows.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "packing.h"
#include "plan_view.h"
#include "simd.h"
#include "tasks.h"

namespace moe_fast {
namespace {


void refuse(const char* name, const std::string& allowed, int64_t value, int64_t position) {
  throw std::runtime_error(std::string(name) + " must be " + allowed + "; got " +
                           std::to_string(value) + " at " + std::to_string(position) + ".");
}

// The last of the offsets, which is the number of valid rows among `rows`.
int64_t valid_rows(const Tensor& expert_offsets, int64_t rows) {
  const int64_t last = expert_offsets.numel() - 1;
  const int64_t* offsets = indices_of("plan.expert_offsets", expert_offsets, last + 1);
  if (last < 1) throw std::runtime_error("plan.expert_offsets must be [E + 1], E >= 1.");
  if (offsets[last] < 0 || offsets[last] > rows) {
    refuse("plan.expert_offsets", "at most T * K = " + std::to_string(rows), offsets[last], last);
  }
  return offsets[last];
}

// Returns slot_to_row, whose values must be -1 or below `rows`, and different except for -1.
const int64_t* places_of(const Tensor& slot_to_row, int64_t slots, int64_t rows) {
  const int64_t* places = indices_of("plan.slot_to_row", slot_to_row, slots);
  std::vector<bool> taken(static_cast<size_t>(rows));
  for (int64_t slot = 0; slot < slots; ++slot) {
    const int64_t row = places[slot];
    if (row == -1) continue;
    if (row < 0 || row >= rows || taken[static_cast<size_t>(row)]) {
      refuse("plan.slot_to_row", "-1 or a row below " + std::to_string(rows) + ", each once", row,
             slot);
    }
    taken[static_cast<size_t>(row)] = true;
  }
  return places;
}

struct Weighted {
  Dtype dtype;
  int64_t num_tokens, k, dim;
  const void* rows;
  const float* weights;
};

Weighted view(const Tensor& rows, const Tensor& top_k_weights) {
  if (rows.dim() != 2 || top_k_weights.dim() != 2) {
    throw std::runtime_error("rows must be [S, D] and top_k_weights [T, K].");
  }
  const int64_t tokens = top_k_weights.size(0), k = top_k_weights.size(1), dim = rows.size(1);
  return {dtype_of(rows), tokens, k, dim, data_of("rows", rows, rows, {tokens * k, dim}),
          weights_of(top_k_weights, tokens)};
}

// A row of `dim` values as floats: in place, or converted into the buffer.
const float* floats_at(const void* data, Dtype dtype, int64_t row, int64_t dim, Buffer& buffer) {
  return dtype == Dtype::f32 ? static_cast<const float*>(data) + row * dim
                             : load_floats(data, dtype, row * dim, dim, buffer);
}

// The least number of rows of `dim` values that is worth a thread.
int64_t grain(int64_t dim) { return (1 << 15) / std::max<int64_t>(dim, 1) + 1; }

}  // namespace

Tensor gather_rows_cpu(Tensor x, Tensor expert_offsets, Tensor row_to_token) {
  if (x.dim() != 2) throw std::runtime_error("x must be [T, D].");
  const Dtype dtype = dtype_of(x);
  const int64_t tokens = x.size(0), dim = x.size(1), num_rows = row_to_token.numel();
  const void* from = data_of("x", x, x, {tokens, dim});
  const int64_t* token_of = indices_of("plan.row_to_token", row_to_token, num_rows);
  const int64_t valid = valid_rows(expert_offsets, num_rows);
  for (int64_t row = 0; row < valid; ++row) {
    if (token_of[row] < 0 || token_of[row] >= tokens) {
      refuse("plan.row_to_token", "a token below " + std::to_string(tokens), token_of[row], row);
    }
  }
  Tensor rows = new_tensor(x, {num_rows, dim});
  if (dim == 0) return rows;
  void* to = rows.mutable_data_ptr();
  const auto bytes = static_cast<size_t>(dim * bytes_of(dtype));
  run_chunks(num_rows, grain(dim), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < std::min(end, valid); ++row) {
      std::memcpy(at(to, dtype, row * dim), at(from, dtype, token_of[row] * dim), bytes);
    }
    for (int64_t row = std::max(begin, valid); row < end; ++row) {
      std::memset(at(to, dtype, row * dim), 0, bytes);
    }
  });
  return rows;
}

Tensor combine_rows_cpu(Tensor rows, Tensor top_k_weights, Tensor slot_to_row) {
  const Weighted in = view(rows, top_k_weights);
  const int64_t* places = places_of(slot_to_row, in.num_tokens * in.k, in.num_tokens * in.k);
  Tensor y = new_tensor(rows, {in.num_tokens, in.dim});
  if (in.dim == 0) return y;
  void* to = y.mutable_data_ptr();
  run_chunks(in.num_tokens, grain(in.dim * in.k), [&](int64_t begin, int64_t end) {
    thread_local Buffer sums, converted;
    float* sum = sums.get<float>(in.dim);
    for (int64_t token = begin; token < end; ++token) {
      std::fill_n(sum, in.dim, 0.0f);
      for (int64_t slot = token * in.k; slot < (token + 1) * in.k; ++slot) {
        if (places[slot] < 0) continue;
        const float* row = floats_at(in.rows, in.dtype, places[slot], in.dim, converted);
        simd().add_scaled(sum, row, in.weights[slot], in.dim);
      }
      simd().store(sum, in.dtype, at(to, in.dtype, token * in.dim), in.dim);
    }
  });
  return y;
}

std::tuple<Tensor, Tensor> combine_rows_backward_cpu(Tensor grad_y, Tensor rows,
                                                     Tensor top_k_weights, Tensor expert_offsets,
                                                     Tensor slot_to_row) {
  const Weighted in = view(rows, top_k_weights);
  const int64_t slots = in.num_tokens * in.k;
  const int64_t valid = valid_rows(expert_offsets, slots);
  const int64_t* places = places_of(slot_to_row, slots, valid);
  const void* upstream = data_of("grad_y", grad_y, rows, {in.num_tokens, in.dim});
  Tensor grad_rows = new_tensor(rows, {slots, in.dim});
  Tensor grad_weights = new_tensor(top_k_weights, {in.num_tokens, in.k});
  void* to = grad_rows.mutable_data_ptr();
  float* dots = grad_weights.mutable_data_ptr<float>();
  std::fill_n(dots, slots, 0.0f);
  if (slots == 0 || in.dim == 0) return {grad_rows, grad_weights};
  // The rows of skipped slots are the last ones, see plan.h.
  std::memset(at(to, in.dtype, valid * in.dim), 0,
              static_cast<size_t>((slots - valid) * in.dim * bytes_of(in.dtype)));
  run_chunks(slots, grain(in.dim), [&](int64_t begin, int64_t end) {
    thread_local Buffer upstreams, converted, scaled;
    for (int64_t slot = begin; slot < end; ++slot) {
      if (places[slot] < 0) continue;
      const int64_t row = places[slot];
      const float* g = floats_at(upstream, in.dtype, slot / in.k, in.dim, upstreams);
      dots[slot] = simd().dot(g, floats_at(in.rows, in.dtype, row, in.dim, converted), in.dim);
      float* out = scaled.get<float>(in.dim);
      simd().scale_add(g, in.weights[slot], nullptr, out, in.dim);
      simd().store(out, in.dtype, at(to, in.dtype, row * in.dim), in.dim);
    }
  });
  return {grad_rows, grad_weights};
}

}  // namespace moe_fast
