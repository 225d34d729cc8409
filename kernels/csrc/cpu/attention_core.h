// Attention over rows in memory, for the operations that compute it: varlen_attention, and
// attention_block, which computes the projections around it, too.
#pragma once

#include <cstdint>
#include <vector>

#include "gemm.h"
#include "packing.h"
#include "simd.h"

namespace moe_fast {

// A tensor [T, heads, head_dim] whose last stride is 1; the others are free.
struct Strided {
  const void* data;
  Dtype dtype;
  int64_t token_stride, head_stride;
  const void* row(int64_t token, int64_t head) const {
    return at(data, dtype, token * token_stride + head * head_stride);
  }
  // Whether each row can be read as pairs of 16-bit elements.
  bool in_pairs() const {
    return token_stride % 2 == 0 && head_stride % 2 == 0 &&
           reinterpret_cast<uintptr_t>(data) % sizeof(uint32_t) == 0;
  }
};

// The attention of packed sequences; sequence s has the tokens starts[s] to starts[s + 1].
struct Attention {
  Strided query, key, value;
  const int64_t* starts;
  int64_t num_sequences, heads, dim;
  Dtype dtype;
  float scale;     // of scores in base 2: log2(e) times the factor before the softmax
  int64_t window;  // no limit if at least T

  int64_t length(int64_t sequence) const { return starts[sequence + 1] - starts[sequence]; }
};

inline constexpr float kLog2e = 1.44269504f;

// Heads first_head .. last_head and query panels first_panel .. last_panel of a sequence, the ends
// excluded.
struct Piece {
  int64_t sequence;
  int64_t first_head, last_head;
  int64_t first_panel, last_panel;
};

// Divides the heads of each sequence, and its queries if there are too few heads, among `threads`
// threads; the largest pieces come first. Results do not depend on the division: no sum runs across
// pieces.
std::vector<Piece> cut_attention(const Attention& in, int64_t threads);

// Computes a piece on the calling thread, and writes it to y [T, heads, head_dim] of the inputs'
// dtype.
void attend_piece(const Attention& in, const Gemm& gemm, const Piece& piece, void* y);

}  // namespace moe_fast
