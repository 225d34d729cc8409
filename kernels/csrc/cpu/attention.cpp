// Attention is computed for one sequence and head at a time, transposed, with a panel of up to 48
// queries and blocks of keys:
//
//   S^T = K Q^T, P^T = 2^(S^T - max), O^T = O^T * 2^(old max - new max) + V^T P^T
//
// Queries are columns, and the softmax runs down the columns, 16 of them in a vector, without sums
// or maxima across a vector; its result P^T is the right factor of the second product without
// another copy. Keys (padded with zeros) and transposed values are copied once for all queries.
// Sums are float32; P is rounded to bfloat16 if the products are in bfloat16.
//
// Source of the softmax over blocks of keys: Milakov and Gimelshein, arXiv 1805.02867; of keeping
// scores in the cache: FlashAttention, arXiv 2205.14135.
#include "../attention.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "attention_core.h"
#include "gemm.h"
#include "packing.h"
#include "plan_view.h"
#include "simd.h"
#include "tasks.h"

namespace moe_fast {
namespace {


constexpr int64_t kKeys = 256;    // per block: a panel's scores, 48 KB, fit the level 2 cache
constexpr int64_t kKeyStep = 16;  // blocks are multiples of it, to generate few kernels
constexpr float kInfinity = std::numeric_limits<float>::infinity();

Strided view(const char* name, const Tensor& tensor, const Tensor& query) {
  const auto check = [&](bool holds, const char* rule) {
    if (!holds) throw std::runtime_error(std::string(name) + " must " + rule);
  };
  check(tensor.dim() == 3, "be [T, heads, head_dim].");
  for (int64_t d = 0; d < 3; ++d) check(tensor.size(d) == query.size(d), "have query's shape.");
  check(tensor.is_cpu(), "be on the CPU.");
  check(tensor.scalar_type() == query.scalar_type(), "have query's dtype.");
  check(tensor.stride(2) == 1 || tensor.size(2) <= 1, "have a last stride of 1.");
  return {tensor.const_data_ptr(), dtype_of(tensor), tensor.stride(0), tensor.stride(1)};
}

Attention view_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                         const Tensor& cu_seqlens, double scale, std::optional<int64_t> window) {
  Attention in;
  in.query = view("query", query, query);
  in.key = view("key", key, query);
  in.value = view("value", value, query);
  in.dtype = in.query.dtype;
  in.heads = query.size(1);
  in.dim = query.size(2);
  in.scale = static_cast<float>(scale) * kLog2e;
  const int64_t tokens = query.size(0);
  in.num_sequences = cu_seqlens.numel() - 1;
  in.starts = indices_of("cu_seqlens", cu_seqlens, cu_seqlens.numel());
  bool rising = in.num_sequences >= 0 && in.starts[0] == 0 && in.starts[in.num_sequences] == tokens;
  for (int64_t s = 0; rising && s < in.num_sequences; ++s) rising = in.length(s) >= 0;
  if (!rising) {
    throw std::runtime_error("cu_seqlens must rise from 0 to T = " + std::to_string(tokens) + ".");
  }
  if (window.value_or(0) < 0) throw std::runtime_error("window must not be negative.");
  in.window = std::min(window.value_or(tokens), tokens);
  return in;
}

// bf16 products multiply pairs of elements.
bool in_bf16(const Attention& in, const Gemm& gemm) {
  return in.dtype == Dtype::bf16 && gemm.bf16 != nullptr && in.dim % 2 == 0 && in.query.in_pairs();
}

struct Buffers {
  Buffer keys, values, pairs, zeros, rows, converted, query, scores, weights, output;
};

// --- a sequence's keys and values as left factors ------------------------------------------------

// The keys [count, dim], with zeros up to a multiple of kKeyStep.
template <typename G>
const G* copy_keys(const Attention& in, int64_t first, int64_t count, int64_t head,
                   Buffers& buffers) {
  const int64_t padded = round_up(count, kKeyStep);
  G* keys = buffers.keys.get<G>(padded * in.dim);
  for (int64_t i = 0; i < count; ++i) {
    const void* row = in.key.row(first + i, head);
    if constexpr (std::is_same_v<G, float>) {
      simd().load(row, in.dtype, keys + i * in.dim, in.dim);
    } else {
      std::memcpy(keys + i * in.dim, row, static_cast<size_t>(in.dim) * sizeof(G));
    }
  }
  std::memset(keys + count * in.dim, 0, static_cast<size_t>((padded - count) * in.dim) * sizeof(G));
  return keys;
}

// Writes `count` rows of values, at most 16 (bf16: 16 pairs), as columns of out.
template <typename G>
void transpose_group(const Attention& in, int64_t first, int64_t count, int64_t head, G* out,
                      Buffers& buffers) {
  constexpr int64_t pair = sizeof(float) / sizeof(G);
  const int64_t here = (count + pair - 1) / pair;
  uint32_t* words = buffers.pairs.get<uint32_t>(16 * in.dim);
  const uint32_t* pointers[16];
  for (int64_t p = 0; p < here; ++p) {
    const void* row = in.value.row(first + p * pair, head);
    pointers[p] = words + p * in.dim;
    if constexpr (std::is_same_v<G, float>) {
      simd().load(row, in.dtype, reinterpret_cast<float*>(words + p * in.dim), in.dim);
    } else {
      const bool last = 2 * p + 1 == count;
      const void* next = last ? buffers.zeros.get<Bf16>(0) : in.value.row(first + 2 * p + 1, head);
      simd().interleave(static_cast<const Bf16*>(row), static_cast<const Bf16*>(next),
                          words + p * in.dim, in.dim);
    }
  }
  simd().transpose(pointers, here, in.dim, reinterpret_cast<uint32_t*>(out), kKeys / pair);
}

// The values transposed, in blocks [dim, kKeys], with zeros up to a multiple of kKeyStep.
template <typename G>
const G* transpose_values(const Attention& in, int64_t first, int64_t count, int64_t head,
                          Buffers& buffers) {
  constexpr int64_t group = 16 * sizeof(float) / sizeof(G);
  G* values = buffers.values.get<G>(round_up(count, kKeys) * in.dim);
  std::fill_n(buffers.zeros.get<G>(in.dim), in.dim, G{0});
  for (int64_t j = 0; j < round_up(count, kKeyStep); j += group) {
    G* out = values + j / kKeys * kKeys * in.dim + j % kKeys;
    const int64_t here = std::clamp<int64_t>(count - j, 0, group);
    transpose_group(in, first + j, here, head, out, buffers);
  }
  return values;
}

// --- a panel of queries --------------------------------------------------------------------------

struct Panel {
  int64_t first, count, width;  // of the sequence's queries; width: count, padded
};

// Panels of a sequence's queries, of nearly equal width.
struct Panels {
  int64_t length, groups, count;  // groups of 16
  explicit Panels(int64_t length_)
      : length(length_),
        groups((length_ + 15) / 16),
        count((groups * 16 + kPanel - 1) / kPanel) {}
  Panel operator[](int64_t i) const {
    const int64_t first = i * groups / count * 16, last = (i + 1) * groups / count * 16;
    return {first, std::min(last, length) - first, last - first};
  }
};

// Q^T [dim, width], the right factor of the scores.
template <typename G>
const G* pack_queries(const Attention& in, int64_t first, const Panel& panel, int64_t head,
                      Buffers& buffers) {
  constexpr int64_t pair = sizeof(float) / sizeof(G);
  G* packed = buffers.query.get<G>(in.dim * panel.width);
  const bool convert = pair == 1 && in.dtype != Dtype::f32;
  float* converted = buffers.converted.get<float>(convert ? 16 * in.dim : 0);
  for (int64_t j = 0; j < panel.width; j += 16) {
    const int64_t here = std::min<int64_t>(16, panel.count - j);
    const uint32_t* rows[16];
    for (int64_t i = 0; i < here; ++i) {
      const void* row = in.query.row(first + panel.first + j + i, head);
      if (convert) {
        simd().load(row, in.dtype, converted + i * in.dim, in.dim);
        row = converted + i * in.dim;
      }
      rows[i] = static_cast<const uint32_t*>(row);
    }
    simd().transpose(rows, here, in.dim / pair, reinterpret_cast<uint32_t*>(packed) + j,
                       panel.width);
  }
  return packed;
}

// The data of one head of a sequence. Indices count from the sequence's first token.
template <typename G>
struct Head {
  int64_t index, token, length;  // token: the sequence's first
  int64_t begin;                 // the first key that is copied, a multiple of kKeys
  const G* keys;
  const G* values;
};

// The state of a panel between blocks of keys.
template <typename G>
struct Running {
  Panel panel;
  const G* query;  // Q^T [dim, width]
  float* output;   // O^T [dim, width], undefined before the first keys
  bool seen_keys = false;
  float max[kPanel], sum[kPanel];
  Running(const Panel& panel_, const G* query_, float* output_)
      : panel(panel_), query(query_), output(output_) {
    std::fill_n(max, kPanel, -kInfinity);
    std::fill_n(sum, kPanel, 0.0f);
  }
};

// Writes -inf to the scores [num_keys, width] of keys that a query must not attend to: those after
// the end of the sequence, and those outside its window.
void hide(const Attention& in, const Panel& panel, int64_t first_key, int64_t num_keys,
          int64_t length, float* scores) {
  const int64_t width = panel.width;
  const int64_t real = std::min(num_keys, length - first_key);
  std::fill(scores + real * width, scores + num_keys * width, -kInfinity);
  const auto column = [&](int64_t query) {
    return std::clamp<int64_t>(query - panel.first, 0, width);
  };
  const int64_t last_key = first_key + real - 1;
  if (column(last_key - in.window) == 0 && column(first_key + in.window + 1) == width) return;
  for (int64_t i = 0; i < real; ++i) {
    float* row = scores + i * width;
    std::fill(row, row + column(first_key + i - in.window), -kInfinity);
    std::fill(row + column(first_key + i + in.window + 1), row + width, -kInfinity);
  }
}

// Adds the keys first .. first + count, which are in one block, to a panel.
template <typename G>
void add_keys(const Attention& in, const Gemm& gemm, const Head<G>& head, int64_t first,
              int64_t count, Running<G>& running, Buffers& buffers) {
  const int64_t width = running.panel.width, from = first - head.begin;
  float* scores = buffers.scores.get<float>(kKeys * kPanel);
  run(gemm, count, width, in.dim, head.keys + from * in.dim, in.dim, running.query, width, scores,
      width, false);
  const bool rising = in.scale > 0.0f;  // otherwise scores are scaled before -inf is written
  if (!rising) simd().scale_add(scores, in.scale, nullptr, scores, count * width);
  hide(in, running.panel, first, count, head.length, scores);

  G* weights;
  uint32_t* pairs = nullptr;
  if constexpr (std::is_same_v<G, float>) {
    weights = scores;
  } else {
    weights = buffers.weights.get<Bf16>(kKeys * kPanel);
    pairs = reinterpret_cast<uint32_t*>(weights);
  }
  float factor[kPanel];
  simd().softmax(scores, rising ? in.scale : 1.0f, count, width, running.max, running.sum, factor,
                   pairs);
  if (running.seen_keys) simd().scale_columns(running.output, factor, in.dim, width);
  const G* values = head.values + from / kKeys * kKeys * in.dim + from % kKeys;
  run(gemm, in.dim, width, count, values, kKeys, weights, width, running.output, width,
      running.seen_keys);
  running.seen_keys = true;
}

// Writes O^T, divided by the sums, to the rows of y.
template <typename G>
void finish(const Attention& in, const Head<G>& head, Running<G>& running, void* y,
            Buffers& buffers) {
  const Panel& panel = running.panel;
  float inverse[kPanel];
  for (int64_t i = 0; i < panel.width; ++i) inverse[i] = 1.0f / running.sum[i];
  simd().scale_columns(running.output, inverse, in.dim, panel.width);
  const int64_t padded = round_up(in.dim, 16);
  float* rows = buffers.rows.get<float>(panel.width * padded);
  transpose_floats(running.output, panel.width, in.dim, panel.width, rows, padded);
  for (int64_t i = 0; i < panel.count; ++i) {
    const int64_t to = ((head.token + panel.first + i) * in.heads + head.index) * in.dim;
    simd().store(rows + i * padded, in.dtype, at(y, in.dtype, to), in.dim);
  }
}

// --- tasks ---------------------------------------------------------------------------------------

template <typename G>
void attend(const Attention& in, const Gemm& gemm, const Piece& piece, void* y) {
  thread_local Buffers buffers;
  const int64_t token = in.starts[piece.sequence], length = in.length(piece.sequence);
  const Panels panels(length);
  const auto first_seen = [&](const Panel& panel) {
    return std::max<int64_t>(panel.first - in.window, 0) / kKeyStep * kKeyStep;
  };
  const auto end_seen = [&](const Panel& panel) {
    return round_up(std::min(panel.first + panel.count + in.window, length), kKeyStep);
  };
  const int64_t begin = first_seen(panels[piece.first_panel]) / kKeys * kKeys;
  const int64_t keys = std::min(end_seen(panels[piece.last_panel - 1]), length) - begin;
  for (int64_t index = piece.first_head; index < piece.last_head; ++index) {
    const Head<G> head{index,
                       token,
                       length,
                       begin,
                       copy_keys<G>(in, token + begin, keys, index, buffers),
                       transpose_values<G>(in, token + begin, keys, index, buffers)};
    for (int64_t p = piece.first_panel; p < piece.last_panel; ++p) {
      const Panel panel = panels[p];
      Running<G> running(panel, pack_queries<G>(in, token, panel, index, buffers),
                         buffers.output.get<float>(in.dim * kPanel));
      for (int64_t k = first_seen(panel), end; k < end_seen(panel); k = end) {
        end = std::min(end_seen(panel), (k / kKeys + 1) * kKeys);
        add_keys(in, gemm, head, k, end - k, running, buffers);
      }
      finish(in, head, running, y, buffers);
    }
  }
}

}  // namespace

std::vector<Piece> cut_attention(const Attention& in, int64_t threads) {
  const auto cost = [&](int64_t sequence) {
    const int64_t length = in.length(sequence);
    return static_cast<double>(length) * static_cast<double>(std::min(length, in.window) + kKeys);
  };
  double total = 0;
  for (int64_t s = 0; s < in.num_sequences; ++s) total += cost(s);
  const double share = threads == 1 ? total : total / static_cast<double>(8 * threads);
  std::vector<std::pair<double, Piece>> pieces;
  for (int64_t s = 0; s < in.num_sequences; ++s) {
    if (in.length(s) == 0) continue;
    const int64_t panels = Panels(in.length(s)).count;
    const auto wanted = std::max<int64_t>(std::llround(cost(s) / share), 1);
    const int64_t head_parts = std::min(wanted, in.heads);
    const int64_t panel_parts = std::clamp<int64_t>(wanted / std::max<int64_t>(in.heads, 1), 1,
                                                    panels);
    for (int64_t h = 0; h < head_parts; ++h) {
      for (int64_t p = 0; p < panel_parts; ++p) {
        pieces.push_back({cost(s) / static_cast<double>(head_parts * panel_parts),
                          {s, h * in.heads / head_parts, (h + 1) * in.heads / head_parts,
                           p * panels / panel_parts, (p + 1) * panels / panel_parts}});
      }
    }
  }
  std::stable_sort(pieces.begin(), pieces.end(),
                   [](const auto& a, const auto& b) { return a.first > b.first; });
  std::vector<Piece> sorted;
  for (const auto& [_, piece] : pieces) sorted.push_back(piece);
  return sorted;
}

void attend_piece(const Attention& in, const Gemm& gemm, const Piece& piece, void* y) {
  if (in_bf16(in, gemm)) {
    attend<Bf16>(in, gemm, piece, y);
  } else {
    attend<float>(in, gemm, piece, y);
  }
}

Tensor varlen_attention_cpu(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens, double scale,
                            std::optional<int64_t> window) {
  const Attention in = view_attention(query, key, value, cu_seqlens, scale, window);
  Tensor y = new_tensor(query, {query.size(0), in.heads, in.dim});
  if (in.heads == 0 || in.dim == 0) return y;
  void* to = y.mutable_data_ptr();
  const Gemm& products = gemm();
  const int64_t threads = std::max<int64_t>(torch::stable::get_num_threads(), 1);
  const std::vector<Piece> pieces = cut_attention(in, threads);
  run_all(static_cast<int64_t>(pieces.size()), [&](int64_t i) {
    attend_piece(in, products, pieces[static_cast<size_t>(i)], to);
    products.finish();
  });
  return y;
}

}  // namespace moe_fast
