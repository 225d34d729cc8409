// Kernels of gather_rows and combine_rows: a warp processes one row, token or slot at a time, and
// its lanes process the columns. Indices out of bounds count as skipped.
#pragma once

#include "device.cuh"

namespace moe_fast {

// `Size` neighbouring elements, copied as one.
template <typename T, int Size>
struct alignas(sizeof(T) * Size) Pack {
  T at[Size];
};

__device__ inline bool within(int64_t index, int64_t size) { return index >= 0 && index < size; }

// rows[r] = x[row_to_token[r]], 0 from *num_valid on. A row is copied as `width` Words.
template <typename Word>
__global__ void gather_rows(const Word* x, const int64_t* num_valid, const int64_t* row_to_token,
                            int64_t num_tokens, int64_t num_rows, int64_t width, Word* rows) {
  for (int64_t row = warp_in_grid(); row < num_rows; row += warps_in_grid()) {
    const int64_t token = row < *num_valid ? row_to_token[row] : -1;
    const bool valid = within(token, num_tokens);
    for (int64_t i = lane_id(); i < width; i += 32) {
      rows[row * width + i] = valid ? x[token * width + i] : Word{};
    }
  }
}

// y[t] = sum_k w[t, k] rows[slot_to_row[t, k]]. A row is `width` packs.
template <typename T, int Size>
__global__ void combine_rows(const Pack<T, Size>* rows, const float* weights,
                             const int64_t* slot_to_row, int64_t num_tokens, int64_t k,
                             int64_t width, Pack<T, Size>* y) {
  for (int64_t token = warp_in_grid(); token < num_tokens; token += warps_in_grid()) {
    for (int64_t i = lane_id(); i < width; i += 32) {
      float sum[Size] = {};
      for (int64_t slot = token * k; slot < (token + 1) * k; ++slot) {
        const int64_t row = slot_to_row[slot];
        if (!within(row, num_tokens * k)) continue;
        const Pack<T, Size> from = rows[row * width + i];
        for (int j = 0; j < Size; ++j) sum[j] += weights[slot] * to_float(from.at[j]);
      }
      Pack<T, Size> to;
      for (int j = 0; j < Size; ++j) to.at[j] = from_float<T>(sum[j]);
      y[token * width + i] = to;
    }
  }
}

// The gradients of a slot's row and of its weight. The rows of skipped slots, from *num_valid on,
// are set to zero by the warp with the number of the row.
template <typename T, int Size>
__global__ void combine_rows_backward(const Pack<T, Size>* grad_y, const Pack<T, Size>* rows,
                                      const float* weights, const int64_t* num_valid,
                                      const int64_t* slot_to_row, int64_t num_slots, int64_t k,
                                      int64_t width, Pack<T, Size>* grad_rows,
                                      float* grad_weights) {
  for (int64_t slot = warp_in_grid(); slot < num_slots; slot += warps_in_grid()) {
    const int64_t row = slot_to_row[slot];
    const bool valid = within(row, *num_valid) && row < num_slots;
    float dot = 0.0f;
    for (int64_t i = lane_id(); valid && i < width; i += 32) {
      const Pack<T, Size> upstream = grad_y[slot / k * width + i], from = rows[row * width + i];
      Pack<T, Size> to;
      for (int j = 0; j < Size; ++j) {
        dot += to_float(upstream.at[j]) * to_float(from.at[j]);
        to.at[j] = from_float<T>(weights[slot] * to_float(upstream.at[j]));
      }
      grad_rows[row * width + i] = to;
    }
    dot = warp_sum(dot);
    if (lane_id() == 0) grad_weights[slot] = dot;
    for (int64_t i = lane_id(); slot >= *num_valid && i < width; i += 32) {
      grad_rows[slot * width + i] = Pack<T, Size>{};
    }
  }
}

}  // namespace moe_fast
