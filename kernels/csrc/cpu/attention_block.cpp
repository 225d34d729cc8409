// A layer's attention with its projections, for a few sequences at a time, so that their queries,
// keys, values and results stay in the level 2 cache of one core. One product gives all of q, k and
// v: their weights are packed side by side, once per call, as the right factor of the rows.
//
// Where that would leave threads idle (few or very long sequences), the same steps run one after the
// other over the whole batch.
#include "../layer.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "attention_core.h"
#include "gemm.h"
#include "norm_rows.h"
#include "packing.h"
#include "plan_view.h"
#include "simd.h"
#include "tasks.h"

namespace moe_fast {
namespace {

constexpr int64_t kRowBlock = 32;          // rows of a product: their sums fit the level 1 cache
constexpr int64_t kMostDepth = 1024;       // of a product's K at a time
constexpr int64_t kSequenceTokens = 256;   // sequences are taken together up to so many tokens
constexpr int64_t kLongSequence = 2048;    // longer ones are divided among the threads

void check(bool holds, const std::string& rule) {
  if (!holds) throw std::runtime_error(rule);
}

// The columns of a panel of the right factor: wide ones suit AMX, kPanel suits AVX.
template <typename G>
constexpr int64_t kColumns = sizeof(G) == sizeof(float) ? kPanel : 384;

// --- weights as right factors --------------------------------------------------------------------

// Weights [N, K] one below the other: row n of them all is column n of the right factor.
struct Weights {
  std::vector<const void*> rows;
  std::vector<float> bias;  // [N], or empty
  Dtype dtype;
  int64_t depth;  // K

  int64_t count() const { return static_cast<int64_t>(rows.size()); }
  int64_t padded() const { return round_up(count(), 16); }
  bool in_pairs() const {
    return depth % 2 == 0 && std::all_of(rows.begin(), rows.end(), [](const void* row) {
             return reinterpret_cast<uintptr_t>(row) % sizeof(uint32_t) == 0;
           });
  }
};

void add_weight(Weights& to, const char* name, const Tensor& weight, const Tensor& x,
                int64_t rows) {
  const void* data = data_of(name, weight, x, {rows, to.depth});
  for (int64_t r = 0; r < rows; ++r) to.rows.push_back(at(data, to.dtype, r * to.depth));
}

// Appends the biases of the projections, all of which have `size`; missing ones are zeros.
std::vector<float> joined_biases(const std::vector<const std::optional<Tensor>*>& biases,
                                 int64_t size) {
  const bool any = std::any_of(biases.begin(), biases.end(),
                               [](const auto* bias) { return bias->has_value(); });
  std::vector<float> all;
  for (const auto* bias : biases) {
    std::vector<float> one = floats_of("bias", *bias, size);
    if (any) one.resize(static_cast<size_t>(size), 0.0f);
    all.insert(all.end(), one.begin(), one.end());
  }
  return all;
}

// Packs 16 columns, from `column` on, into the panels at `out`.
template <typename G>
void pack_weights(const Weights& weights, int64_t column, G* out) {
  constexpr int64_t pair = sizeof(float) / sizeof(G);
  thread_local Buffer converted;
  const int64_t here = std::min<int64_t>(16, weights.count() - column);
  const bool convert = pair == 1 && weights.dtype != Dtype::f32;
  float* floats = convert ? converted.get<float>(16 * weights.depth) : nullptr;
  const uint32_t* rows[16];
  for (int64_t i = 0; i < here; ++i) {
    const void* row = weights.rows[static_cast<size_t>(column + i)];
    if (convert) {
      simd().load(row, weights.dtype, floats + i * weights.depth, weights.depth);
      row = floats + i * weights.depth;
    }
    rows[i] = static_cast<const uint32_t*>(row);
  }
  const int64_t panel = column / kColumns<G> * kColumns<G>;
  const int64_t width = std::min(kColumns<G>, weights.padded() - panel);
  auto* words = reinterpret_cast<uint32_t*>(out + panel * weights.depth) + (column - panel);
  simd().transpose(rows, here, weights.depth / pair, words, width);
}

// --- products of rows ----------------------------------------------------------------------------

// `count` rows [dim] of `dtype` as a left factor whose rows are padded with zeros to a multiple of
// 16, so that oneDNN generates few kernels; whole blocks are read in place.
template <typename G>
LeftFactor<G> left_rows(const void* data, Dtype dtype, int64_t dim, int64_t count, Buffer& buffer) {
  constexpr bool floats = sizeof(G) == sizeof(float);
  const bool same = floats == (dtype == Dtype::f32);
  if (same && count == kRowBlock) return {static_cast<const G*>(data), dim};
  const int64_t padded = round_up(count, 16);
  G* copy = buffer.get<G>(padded * dim);
  if constexpr (floats) {
    simd().load(data, dtype, copy, count * dim);
  } else {
    std::memcpy(copy, data, static_cast<size_t>(count * dim) * sizeof(G));
  }
  std::memset(copy + count * dim, 0, static_cast<size_t>((padded - count) * dim) * sizeof(G));
  return {copy, dim};
}

// Columns `panel` .. panel + width of A [rows, K] B, without the bias, to c, `ldc` apart.
template <typename G>
void multiply_panel(const Gemm& gemm, LeftFactor<G> a, int64_t rows, const Weights& weights,
                    const G* packed, int64_t panel, int64_t width, float* c, int64_t ldc) {
  const int64_t depth = weights.depth;
  for (int64_t k = 0; k < depth; k += kMostDepth) {
    run(gemm, rows, width, std::min(kMostDepth, depth - k), a.data + k, a.ld,
        packed + panel * depth + k * width, width, c, ldc, k > 0);
  }
}

// All columns of it, to c [rows, weights.padded()].
template <typename G>
void multiply_rows(const Gemm& gemm, LeftFactor<G> a, int64_t rows, const Weights& weights,
                   const G* packed, float* c) {
  const int64_t padded = weights.padded();
  for (int64_t panel = 0; panel < padded; panel += kColumns<G>) {
    multiply_panel(gemm, a, rows, weights, packed, panel, std::min(kColumns<G>, padded - panel),
                   c + panel, padded);
  }
}

// --- the block -----------------------------------------------------------------------------------

struct Scratch {
  Buffer rows, sums, floats, projected, context;
};

struct Rotation {
  const void* cos = nullptr;  // null: none
  const void* sin = nullptr;
  Dtype dtype = Dtype::f32;
};

struct Block {
  const void* x;
  Dtype dtype;
  int64_t tokens, dim, heads, head_dim;
  const int64_t* starts;
  int64_t num_sequences;
  Weights projections, output;
  Rotation rotation;
  float scale;
  int64_t window;
  NormRows norm;

  int64_t inner() const { return heads * head_dim; }
  double cost(int64_t sequence) const {
    const auto length = static_cast<double>(starts[sequence + 1] - starts[sequence]);
    return length * (static_cast<double>(dim) / 2 + length);
  }
};

template <typename G>
class Runner {
 public:
  Runner(const Block& block, const Gemm& gemm, G* projections, G* output)
      : in_(block), gemm_(gemm), projections_(projections), output_(output) {}

  void pack() const {
    const int64_t first = in_.projections.padded() / 16, second = in_.output.padded() / 16;
    run_all(first + second, [&](int64_t i) {
      if (i < first) pack_weights(in_.projections, i * 16, projections_);
      else pack_weights(in_.output, (i - first) * 16, output_);
    });
  }

  // Writes q, k and v of the tokens first .. last to projected [last - first, 3 inner].
  void project(int64_t first, int64_t last, G* projected, Scratch& scratch) const {
    const Weights& weights = in_.projections;
    const int64_t padded = weights.padded();
    // A rotation needs whole rows; otherwise a panel is stored while it is in the level 1 cache.
    const bool whole = in_.rotation.cos != nullptr;
    const int64_t step = whole ? padded : kColumns<G>;
    float* sums = scratch.sums.get<float>(kRowBlock * std::min(step, padded));
    for (int64_t t = first; t < last; t += kRowBlock) {
      const int64_t count = std::min(kRowBlock, last - t), rows = round_up(count, 16);
      const auto a = left_rows<G>(at(in_.x, in_.dtype, t * in_.dim), in_.dtype, in_.dim, count,
                                  scratch.rows);
      for (int64_t panel = 0; panel < weights.count(); panel += step) {
        const int64_t width = std::min(step, padded - panel);
        if (whole) {
          multiply_rows(gemm_, a, rows, weights, projections_, sums);
        } else {
          multiply_panel(gemm_, a, rows, weights, projections_, panel, width, sums, width);
        }
        const int64_t used = std::min(width, weights.count() - panel);
        const float* bias = weights.bias.empty() ? nullptr : weights.bias.data() + panel;
        for (int64_t r = 0; r < count; ++r) {
          float* row = sums + r * width;
          G* to = projected + (t - first + r) * weights.count() + panel;
          if (whole) {
            if (bias != nullptr) simd().add_scaled(row, bias, 1.0f, used);
            rotate(row, t + r, scratch);
          }
          simd().store_sum(row, whole ? nullptr : bias, kStored, to, used);
        }
      }
    }
  }

  // The attention of the sequences first .. last, whose tokens are in `projected`.
  Attention attention(const int64_t* starts, int64_t count, const G* projected) const {
    const int64_t inner = in_.inner(), width = 3 * inner;
    Attention attention;
    attention.query = {projected, kStored, width, in_.head_dim};
    attention.key = {projected + inner, kStored, width, in_.head_dim};
    attention.value = {projected + 2 * inner, kStored, width, in_.head_dim};
    attention.starts = starts;
    attention.num_sequences = count;
    attention.heads = in_.heads;
    attention.dim = in_.head_dim;
    attention.dtype = kStored;
    attention.scale = in_.scale;
    attention.window = in_.window;
    return attention;
  }

  // The output projection, sum and norm of the tokens first .. last.
  void finish(int64_t first, int64_t last, const G* context, Scratch& scratch) const {
    const Weights& weights = in_.output;
    const int64_t ld = weights.padded();
    float* sums = scratch.sums.get<float>(kRowBlock * ld);
    for (int64_t t = first; t < last; t += kRowBlock) {
      const int64_t count = std::min(kRowBlock, last - t);
      const auto a = left_rows<G>(context + (t - first) * weights.depth, kStored, weights.depth,
                                  count, scratch.rows);
      multiply_rows(gemm_, a, round_up(count, 16), weights, output_, sums);
      for (int64_t r = 0; r < count; ++r) {
        in_.norm.finish(sums + r * ld, weights.bias.empty() ? nullptr : weights.bias.data(), t + r,
                        scratch.floats);
      }
    }
  }

  // All steps for the sequences first .. last, on the calling thread.
  void run_sequences(int64_t first, int64_t last) const {
    thread_local Scratch scratch;
    const int64_t begin = in_.starts[first], tokens = in_.starts[last] - begin;
    std::vector<int64_t> starts;
    for (int64_t s = first; s <= last; ++s) starts.push_back(in_.starts[s] - begin);
    G* projected = scratch.projected.get<G>(tokens * 3 * in_.inner());
    project(begin, begin + tokens, projected, scratch);
    G* context = scratch.context.get<G>(tokens * in_.inner());
    const Attention part = attention(starts.data(), last - first, projected);
    for (const Piece& piece : cut_attention(part, 1)) attend_piece(part, gemm_, piece, context);
    finish(begin, begin + tokens, context, scratch);
  }

  // Each step for the whole batch, on all threads.
  void run_steps(G* projected, G* context) const {
    const int64_t blocks = (in_.tokens + kRowBlock - 1) / kRowBlock;
    const auto each_block = [&](auto&& work) {
      run_all(blocks, [&](int64_t i) {
        thread_local Scratch scratch;
        work(i * kRowBlock, std::min((i + 1) * kRowBlock, in_.tokens), scratch);
        gemm_.finish();
      });
    };
    each_block([&](int64_t first, int64_t last, Scratch& scratch) {
      project(first, last, projected + first * 3 * in_.inner(), scratch);
    });
    const Attention whole = attention(in_.starts, in_.num_sequences, projected);
    const int64_t threads = std::max<int64_t>(torch::stable::get_num_threads(), 1);
    const std::vector<Piece> pieces = cut_attention(whole, threads);
    run_all(static_cast<int64_t>(pieces.size()), [&](int64_t i) {
      attend_piece(whole, gemm_, pieces[static_cast<size_t>(i)], context);
      gemm_.finish();
    });
    each_block([&](int64_t first, int64_t last, Scratch& scratch) {
      finish(first, last, context + first * in_.inner(), scratch);
    });
  }

 private:
  static constexpr Dtype kStored = sizeof(G) == sizeof(float) ? Dtype::f32 : Dtype::bf16;

  void rotate(float* row, int64_t token, Scratch& scratch) const {
    const Rotation& rotation = in_.rotation;
    const int64_t dim = in_.head_dim;
    float* factors = scratch.floats.get<float>(2 * dim);
    simd().load(at(rotation.cos, rotation.dtype, token * dim), rotation.dtype, factors, dim);
    simd().load(at(rotation.sin, rotation.dtype, token * dim), rotation.dtype, factors + dim, dim);
    for (int64_t part = 0; part < 2; ++part) {  // queries and keys
      simd().rotate(row + part * in_.inner(), factors, factors + dim, in_.heads, dim / 2);
    }
  }

  const Block& in_;
  const Gemm& gemm_;
  G* projections_;
  G* output_;
};

// Sequences first .. last, which a thread computes together.
struct Group {
  int64_t first, last;
  double cost;
};

std::vector<Group> groups_of(const Block& in) {
  std::vector<Group> groups;
  int64_t first = 0;
  double cost = 0;
  for (int64_t s = 0; s < in.num_sequences; ++s) {
    if (s > first && in.starts[s + 1] - in.starts[first] > kSequenceTokens) {
      groups.push_back({first, s, cost});
      first = s;
      cost = 0;
    }
    cost += in.cost(s);
  }
  if (first < in.num_sequences) groups.push_back({first, in.num_sequences, cost});
  std::stable_sort(groups.begin(), groups.end(),
                   [](const Group& a, const Group& b) { return a.cost > b.cost; });
  return groups;
}

// Whether threads that take whole groups would be about equally busy, with scratch memory of a
// modest size.
bool suits_groups(const Block& in, const std::vector<Group>& groups) {
  const auto threads = static_cast<double>(std::max<int64_t>(torch::stable::get_num_threads(), 1));
  double total = 0;
  for (const Group& group : groups) total += group.cost;
  for (int64_t s = 0; s < in.num_sequences; ++s) {
    if (in.starts[s + 1] - in.starts[s] > kLongSequence) return false;
  }
  return threads == 1 || groups.front().cost * threads * 4 <= total;
}

template <typename G>
void run_block(const Block& in, const Gemm& gemm, const Tensor& like) {
  thread_local Buffer projections, output;
  const Runner<G> runner(in, gemm,
                         projections.get<G>(in.projections.padded() * in.projections.depth),
                         output.get<G>(in.output.padded() * in.output.depth));
  runner.pack();
  const std::vector<Group> groups = groups_of(in);
  if (suits_groups(in, groups)) {
    run_all(static_cast<int64_t>(groups.size()), [&](int64_t i) {
      const Group& group = groups[static_cast<size_t>(i)];
      runner.run_sequences(group.first, group.last);
      gemm.finish();
    });
    return;
  }
  const auto dtype = sizeof(G) == sizeof(float) ? torch::headeronly::ScalarType::Float
                                                : torch::headeronly::ScalarType::BFloat16;
  Tensor projected = new_output(like, {in.tokens, 3 * in.inner()}, dtype);
  Tensor context = new_output(like, {in.tokens, in.inner()}, dtype);
  runner.run_steps(static_cast<G*>(projected.mutable_data_ptr()),
                   static_cast<G*>(context.mutable_data_ptr()));
}

}  // namespace

std::tuple<Tensor, Tensor> attention_block_cpu(
    Tensor x, Tensor residual, Tensor q_weight, Tensor k_weight, Tensor v_weight, Tensor out_weight,
    std::optional<Tensor> q_bias, std::optional<Tensor> k_bias, std::optional<Tensor> v_bias,
    std::optional<Tensor> out_bias, Tensor norm_weight, std::optional<Tensor> norm_bias,
    Tensor cu_seqlens, std::optional<Tensor> cos, std::optional<Tensor> sin, int64_t heads,
    double scale, std::optional<int64_t> window, double eps, bool keep_exact) {
  check(x.dim() == 2 && q_weight.dim() == 2, "x and q_weight must have two dimensions.");
  Block in;
  in.tokens = x.size(0);
  in.dim = x.size(1);
  in.x = data_of("x", x, x, {in.tokens, in.dim});
  in.dtype = dtype_of(x);
  in.heads = heads;
  const int64_t inner = q_weight.size(0);
  check(heads > 0 && inner % heads == 0, "q_weight must have heads * head_dim rows.");
  in.head_dim = inner / heads;
  in.projections = {{}, {}, in.dtype, in.dim};
  add_weight(in.projections, "q_weight", q_weight, x, inner);
  add_weight(in.projections, "k_weight", k_weight, x, inner);
  add_weight(in.projections, "v_weight", v_weight, x, inner);
  in.projections.bias = joined_biases({&q_bias, &k_bias, &v_bias}, inner);
  in.output = {{}, {}, in.dtype, inner};
  add_weight(in.output, "out_weight", out_weight, x, in.dim);
  in.output.bias = floats_of("out_bias", out_bias, in.dim);
  in.num_sequences = cu_seqlens.numel() - 1;
  in.starts = indices_of("cu_seqlens", cu_seqlens, cu_seqlens.numel());
  bool rising = in.num_sequences >= 0 && in.starts[0] == 0 &&
                in.starts[in.num_sequences] == in.tokens;
  for (int64_t s = 0; rising && s < in.num_sequences; ++s) rising = in.starts[s] <= in.starts[s + 1];
  check(rising, "cu_seqlens must rise from 0 to T = " + std::to_string(in.tokens) + ".");
  check(cos.has_value() == sin.has_value(), "cos and sin must be given together.");
  if (cos.has_value()) {
    check(in.head_dim % 2 == 0, "head_dim must be even for a rotation.");
    in.rotation.dtype = dtype_of(*cos);
    in.rotation.cos = data_of("cos", *cos, *cos, {in.tokens, in.head_dim});
    in.rotation.sin = data_of("sin", *sin, *cos, {in.tokens, in.head_dim});
  }
  in.scale = static_cast<float>(scale) * kLog2e;
  check(window.value_or(0) >= 0, "window must not be negative.");
  in.window = std::min(window.value_or(in.tokens), in.tokens);

  Tensor out = new_output(x, {in.tokens, in.dim});
  Tensor exact =
      new_output(x, {keep_exact ? in.tokens : 0, in.dim}, torch::headeronly::ScalarType::Float);
  in.norm = view_norm(x, residual, norm_weight, norm_bias, eps, out, exact);
  if (in.tokens == 0 || in.dim == 0 || inner == 0) return {out, exact};
  const Gemm& products = gemm();
  const bool pairs = in.projections.in_pairs() && in.output.in_pairs() &&
                     reinterpret_cast<uintptr_t>(in.x) % sizeof(uint32_t) == 0;
  if (in.dtype == Dtype::bf16 && products.bf16 != nullptr && pairs) {
    run_block<Bf16>(in, products, x);
  } else {
    run_block<float>(in, products, x);
  }
  return {out, exact};
}

}  // namespace moe_fast
