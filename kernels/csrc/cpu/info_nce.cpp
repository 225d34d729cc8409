// The whole matrix of logits is in memory: it is made for batches whose logits fit in the cache. Rows
// are anchors, columns candidates: first the B positives, then the hard negatives. Logits are in base
// 2, s / ln 2. The direction from positives to anchors is computed on the transposed matrix [B, B]
// by the same functions, because all masks are symmetric there.
#include "../info_nce.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "logit_rows.h"
#include "packing.h"
#include "plan_view.h"
#include "simd.h"
#include "tasks.h"

namespace moe_fast {
namespace {

using torch::headeronly::ScalarType;

constexpr double kLn2 = 0.6931471805599453;
constexpr float kShortest = 1e-12f;  // a shorter vector has no direction

// What the gradient of a row (or column) needs: four rows of a tensor [4, n].
enum Sum { kLogTotal, kOwn, kTarget, kEvery, kNumSums };

// Rows x [count, d] of one tensor.
struct Rows {
  const void* data = nullptr;
  Dtype dtype = Dtype::f32;
  int64_t count = 0, dim = 0;

  // Row i as floats: in place, or converted.
  const float* row(int64_t i, Buffer& buffer) const {
    return dtype == Dtype::f32 ? static_cast<const float*>(data) + i * dim
                               : load_floats(data, dtype, i * dim, dim, buffer);
  }
};

struct Problem {
  Rows anchors;
  Rows candidates[2];  // positives, hard negatives
  float scale;
  const int64_t *row_ids, *col_ids, *domain_ids, *group_ids;
  const float* weights;  // null: all are 1 / B
  double smoothing;
  bool symmetric, cosine;

  int64_t batch() const { return anchors.count; }
  int64_t dim() const { return anchors.dim; }
  int64_t num_candidates() const { return batch() + candidates[1].count; }
  int64_t first(int part) const { return part == 0 ? 0 : batch(); }  // column of candidates[part]
  float weight(int64_t i) const {
    return weights == nullptr ? 1.0f / static_cast<float>(batch()) : weights[i];
  }
};

Rows view_rows(const char* name, const Tensor& x, int64_t count, int64_t dim) {
  return {data_of(name, x, x, {count, dim}), dtype_of(x), count, dim};
}

const int64_t* ids_of(const char* name, const std::optional<Tensor>& ids, int64_t count) {
  return ids.has_value() ? indices_of(name, *ids, count) : nullptr;
}

const float* floats_of(const char* name, const Tensor& x, std::vector<int64_t> shape) {
  check_shape(name, x, shape);
  if (x.scalar_type() != ScalarType::Float) {
    throw std::runtime_error(std::string(name) + " must be float32.");
  }
  return x.const_data_ptr<float>();
}

Problem view_problem(const Tensor& a, const Tensor& b, const std::optional<Tensor>& negatives,
                     const Tensor& scale, const std::optional<Tensor>& row_ids,
                     const std::optional<Tensor>& col_ids, const std::optional<Tensor>& domain_ids,
                     const std::optional<Tensor>& group_ids, const std::optional<Tensor>& weights,
                     double label_smoothing, bool symmetric, bool cosine) {
  if (a.dim() != 2 || a.size(0) < 1) throw std::runtime_error("a must be [B, d], B >= 1.");
  const int64_t batch = a.size(0), dim = a.size(1);
  Problem problem;
  problem.anchors = view_rows("a", a, batch, dim);
  problem.candidates[0] = view_rows("b", b, batch, dim);
  problem.candidates[1].dim = dim;
  if (negatives.has_value() && negatives->numel() > 0) {
    problem.candidates[1] = view_rows("negatives", *negatives, negatives->size(0), dim);
  }
  if (problem.candidates[1].count % batch != 0) {
    throw std::runtime_error("negatives must be [B * G, d].");
  }
  problem.scale = *floats_of("scale", scale, {});
  if (!(problem.scale > 0.0f && std::isfinite(problem.scale))) {
    throw std::runtime_error("scale must be greater than 0 and finite.");
  }
  problem.row_ids = ids_of("row_ids", row_ids, batch);
  problem.col_ids = ids_of("col_ids", col_ids, problem.num_candidates());
  if ((problem.row_ids == nullptr) != (problem.col_ids == nullptr)) {
    throw std::runtime_error("row_ids and col_ids go together.");
  }
  problem.domain_ids = ids_of("domain_ids", domain_ids, batch);
  problem.group_ids = ids_of("group_ids", group_ids, batch);
  problem.weights =
      weights.has_value() ? floats_of("weights", *weights, {batch}) : nullptr;
  problem.smoothing = label_smoothing;
  problem.symmetric = symmetric;
  problem.cosine = cosine;
  return problem;
}

// The least number of rows, of `cost` multiplications each, that is worth a thread.
int64_t grain(int64_t cost) { return (int64_t{1} << 21) / std::max<int64_t>(cost, 1) + 1; }

// 1 / length of each row, 0 for a zero vector; 1 for dot products.
std::vector<float> inverse_norms(const Problem& problem, const Rows& rows) {
  std::vector<float> out(static_cast<size_t>(rows.count), 1.0f);
  const float bound = std::sqrt(std::numeric_limits<float>::max() /
                                static_cast<float>(std::max<int64_t>(rows.dim, 1)));
  std::atomic<bool> all_bounded{true};
  run_chunks(rows.count, grain(rows.dim), [&](int64_t begin, int64_t end) {
    thread_local Buffer buffer;
    bool bounded = true;
    for (int64_t i = begin; i < end; ++i) {
      const float norm = std::sqrt(
          simd().logits->squares(rows.row(i, buffer), rows.dim, bound, &bounded));
      if (problem.cosine) out[static_cast<size_t>(i)] = norm > kShortest ? 1.0f / norm : 0.0f;
    }
    if (!bounded) all_bounded = false;
  });
  if (!all_bounded) {
    throw std::runtime_error("embeddings must be finite, and their products too.");
  }
  return out;
}

// out [count, d] = rows times factor times their inverse norms.
void scaled_rows(const Rows& rows, const std::vector<float>& norms, float factor, float* out) {
  run_chunks(rows.count, grain(rows.dim), [&](int64_t begin, int64_t end) {
    thread_local Buffer buffer;
    for (int64_t i = begin; i < end; ++i) {
      simd().scale_add(rows.row(i, buffer), factor * norms[static_cast<size_t>(i)], nullptr,
                       out + i * rows.dim, rows.dim);
    }
  });
}

// Both sides of the logits, prepared for products; in memory that the thread keeps.
struct Sides {
  std::vector<float> row_norms;        // [B]
  std::vector<float> column_norms[2];  // of positives, and of hard negatives
  float* scaled_q;                     // [B, d], scale / ln 2 times the anchors at unit length
};

Sides prepare(const Problem& problem, Buffer& buffer) {
  Sides sides;
  sides.row_norms = inverse_norms(problem, problem.anchors);
  for (int part = 0; part < 2; ++part) {
    sides.column_norms[part] = inverse_norms(problem, problem.candidates[part]);
  }
  sides.scaled_q = buffer.get<float>(problem.batch() * problem.dim());
  scaled_rows(problem.anchors, sides.row_norms, static_cast<float>(problem.scale / kLn2),
              sides.scaled_q);
  return sides;
}

// C [m, n] (+)= A [m, k] B of packed panels, the rows of A divided among the threads.
void multiply_rows(const Gemm& gemm, const float* a, int64_t lda, int64_t m, int64_t k,
                   const float* panels, int64_t n, float* c, int64_t ldc, bool add) {
  run_chunks(m, grain(n * k), [&](int64_t begin, int64_t end) {
    multiply<float>(gemm, {a + begin * lda, lda}, end - begin, k, panels, n, c + begin * ldc, ldc,
                    add);
    gemm.finish();
  });
}

// Computes the logits [B, N].
void compute_logits(const Problem& problem, const Sides& sides, float* logits) {
  thread_local Buffer memory;
  const int64_t batch = problem.batch(), dim = problem.dim(), n = problem.num_candidates();
  for (int part = 0; part < 2; ++part) {
    const Rows& rows = problem.candidates[part];
    if (rows.count == 0) continue;
    std::vector<int64_t> order(static_cast<size_t>(rows.count));
    std::iota(order.begin(), order.end(), int64_t{0});
    const RowSource source{rows.data, rows.dtype, dim, order.data()};
    float* panels = memory.get<float>(round_up(rows.count, 16) * std::max<int64_t>(dim, 1));
    const int64_t num_panels = (rows.count + kPanel - 1) / kPanel;
    run_chunks(num_panels, grain(kPanel * dim), [&](int64_t begin, int64_t end) {
      thread_local Buffer converted;
      for (int64_t p = begin; p < end; ++p) {
        const int64_t first = panel_of(rows.count, p * kPanel);
        const int64_t width = panel_width(rows.count, first);
        pack_columns(source, first, std::min(width, rows.count - first), panels + first * dim,
                     converted);
      }
    });
    multiply_rows(gemm(), sides.scaled_q, dim, batch, dim, panels, rows.count,
                  logits + problem.first(part), n, false);
    for (int64_t i = 0; i < batch && problem.cosine; ++i) {
      simd().scale_columns(logits + i * n + problem.first(part), sides.column_norms[part].data(),
                           1, rows.count);
    }
  }
}

// The rows of i's group, or i alone: its positives among the first B candidates.
void find_positives(const Problem& problem, int64_t i, std::vector<int64_t>& found) {
  found.clear();
  if (problem.group_ids == nullptr) {
    found.push_back(i);
    return;
  }
  for (int64_t j = 0; j < problem.batch(); ++j) {
    if (problem.group_ids[j] == problem.group_ids[i]) found.push_back(j);
  }
}

// Masks the logits s [N] of anchor i, except those of its positives.
void mask_row(const Problem& problem, int64_t i, const std::vector<int64_t>& positives, float* s) {
  if (problem.row_ids == nullptr && problem.domain_ids == nullptr) return;
  const int64_t batch = problem.batch(), n = problem.num_candidates();
  std::vector<float> kept;
  for (const int64_t j : positives) kept.push_back(s[j]);
  if (problem.row_ids != nullptr) {
    for (const int64_t id : {problem.row_ids[i], problem.col_ids[i]}) {
      simd().logits->mask_equal(problem.row_ids, id, s, batch);
      simd().logits->mask_equal(problem.col_ids, id, s, n);
    }
  }
  if (problem.domain_ids != nullptr) {
    const int64_t per_row = n / batch - 1;
    for (int64_t j = 0; j < batch; ++j) {
      if (problem.domain_ids[j] == problem.domain_ids[i]) continue;
      s[j] = kMasked;
      std::fill_n(s + batch + j * per_row, per_row, kMasked);
    }
  }
  for (size_t p = 0; p < positives.size(); ++p) s[positives[p]] = kept[p];
}

// Computes the loss of row i from its masked logits s [n], writes what its gradient needs to sums, n
// apart, and, if rank is not null, the rank of its own positive.
float row_loss(const Problem& problem, int64_t i, const std::vector<int64_t>& positives, float* s,
               int64_t n, float* sums, int64_t* rank) {
  const LogitOps& rows = *simd().logits;
  const double smoothing = problem.smoothing;
  const auto count = static_cast<double>(positives.size());
  const float own = s[i];
  float all = 0.0f;
  const int64_t num_all = smoothing > 0.0 ? rows.count_and_sum(s, n, &all) : 1;
  double top = -INFINITY, mean = 0.0, total = 0.0;  // of the positives
  std::vector<float> kept;
  for (const int64_t j : positives) {
    kept.push_back(s[j]);
    top = std::max<double>(top, s[j]);
    mean += s[j] / count;
    s[j] = kMasked;
  }
  for (const float value : kept) total += std::exp2(value - top);
  const double pos = positives.size() == 1 ? own : top + std::log2(total);
  // Without negatives this is about kMasked, and its exponential is 0.
  const float largest = rows.largest(s, n);
  const double neg = largest + std::log2(rows.sum_exp2(s, largest, n));
  if (rank != nullptr) *rank = 1 + rows.count_not_below(s, own, n);
  for (size_t p = 0; p < positives.size(); ++p) s[positives[p]] = kept[p];

  // softplus(neg - pos), which is exact where lse - pos would be 0
  const double difference = (neg - pos) * kLn2;
  const double excess =
      std::max(difference, 0.0) + std::log1p(std::exp(-std::abs(difference)));
  const int64_t batch = problem.batch();
  sums[kLogTotal * batch] = static_cast<float>(pos + excess / kLn2);
  const bool alone = positives.size() == 1 && smoothing == 0.0;
  sums[kOwn * batch] = alone ? static_cast<float>(-1.0 / (1.0 + std::exp(-difference))) : 0.0f;
  sums[kTarget * batch] = static_cast<float>((1.0 - smoothing) / count);
  sums[kEvery * batch] = static_cast<float>(smoothing / static_cast<double>(num_all));
  if (smoothing == 0.0) return static_cast<float>(excess + (pos - mean) * kLn2);
  const double target = (1.0 - smoothing) * mean + smoothing * all / static_cast<double>(num_all);
  return static_cast<float>(excess + (pos - target) * kLn2);
}

// out [n] = the gradient of row i's loss with respect to its logits s, times its weight.
void row_gradient(const Problem& problem, int64_t i, const std::vector<int64_t>& positives,
                  const float* s, int64_t n, const float* sums, float* out) {
  const int64_t batch = problem.batch();
  const float weight = problem.weight(i);
  simd().logits->softmax_gradient(s, sums[kLogTotal * batch], weight,
                                  weight * sums[kEvery * batch], out, n);
  const bool alone = positives.size() == 1 && problem.smoothing == 0.0;
  if (alone) {
    out[i] = weight * sums[kOwn * batch];
    return;
  }
  for (const int64_t j : positives) out[j] -= weight * sums[kTarget * batch];
}

// Calls work(i, positives of i) for each of the B rows, whose logits are n.
template <typename Work>
void for_each_row(const Problem& problem, int64_t n, Work work) {
  run_chunks(problem.batch(), grain(16 * n), [&](int64_t begin, int64_t end) {
    std::vector<int64_t> positives;
    for (int64_t i = begin; i < end; ++i) {
      find_positives(problem, i, positives);
      work(i, positives);
    }
  });
}

// Transposes x [rows, columns], ld apart, to memory whose rows are round_up(rows, 16) apart.
float* transposed(const float* x, int64_t ld, int64_t rows, int64_t columns, Buffer& buffer) {
  float* out = buffer.get<float>(columns * round_up(rows, 16));
  transpose_floats(x, ld, rows, columns, out, round_up(rows, 16));
  return out;
}

// Adds the transpose of y [n, m], ld apart, to x [m, n].
void add_transposed(const float* y, int64_t ld, int64_t m, int64_t n, float* x, int64_t x_ld) {
  thread_local Buffer buffer;
  const float* flipped = transposed(y, ld, n, m, buffer);
  for (int64_t i = 0; i < m; ++i) {
    simd().add_scaled(x + i * x_ld, flipped + i * round_up(n, 16), 1.0f, n);
  }
}

// The gradient of the loss with respect to the logits, [B, N], without the upstream gradient; `out`
// may not be `logits`.
void logits_gradient(const Problem& problem, const float* logits, const float* row_sums,
                     const float* column_sums, float* out) {
  const int64_t batch = problem.batch(), n = problem.num_candidates(), ld = round_up(batch, 16);
  for_each_row(problem, n, [&](int64_t i, const std::vector<int64_t>& positives) {
    row_gradient(problem, i, positives, logits + i * n, n, row_sums + i, out + i * n);
  });
  if (!problem.symmetric) return;
  thread_local Buffer flipped, gradient;
  const float* s = transposed(logits, n, batch, batch, flipped);
  float* by_column = gradient.get<float>(batch * ld);
  for_each_row(problem, batch, [&](int64_t i, const std::vector<int64_t>& positives) {
    row_gradient(problem, i, positives, s + i * ld, batch, column_sums + i, by_column + i * ld);
  });
  add_transposed(by_column, ld, batch, batch, out, n);
}

// Packs x [rows, d] as the right factor of a product with a sum over rows.
float* pack_factor(const void* data, Dtype dtype, int64_t rows, int64_t dim, Buffer& buffer) {
  float* panels = buffer.get<float>(rows * round_up(dim, 16));
  pack_matrix(data, dtype, dim, rows, dim, panels);
  return panels;
}

// Turns grad [count, d], the gradient with respect to the rows at unit length, into that with respect
// to the rows themselves, times `factor`, and stores it in their dtype. Returns <rows at unit length,
// grad>.
double finish(const Rows& rows, const std::vector<float>& norms, bool cosine, float factor,
              float* grad, void* out) {
  std::vector<float> along(static_cast<size_t>(rows.count));
  run_chunks(rows.count, grain(4 * rows.dim), [&](int64_t begin, int64_t end) {
    thread_local Buffer buffer;
    for (int64_t i = begin; i < end; ++i) {
      const float norm = norms[static_cast<size_t>(i)];
      const float* x = rows.row(i, buffer);
      float* g = grad + i * rows.dim;
      const float u = norm * simd().dot(x, g, rows.dim);
      if (cosine) simd().add_scaled(g, x, -u * norm, rows.dim);
      simd().scale_add(g, factor * norm, nullptr, g, rows.dim);
      simd().store(g, rows.dtype, at(out, rows.dtype, i * rows.dim), rows.dim);
      along[static_cast<size_t>(i)] = u;
    }
  });
  return std::accumulate(along.begin(), along.end(), 0.0);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> info_nce_cpu(
    Tensor a, Tensor b, std::optional<Tensor> negatives, Tensor scale,
    std::optional<Tensor> row_ids, std::optional<Tensor> col_ids, std::optional<Tensor> domain_ids,
    std::optional<Tensor> group_ids, std::optional<Tensor> weights, double label_smoothing,
    bool symmetric, bool cosine) {
  const Problem problem = view_problem(a, b, negatives, scale, row_ids, col_ids, domain_ids,
                                       group_ids, weights, label_smoothing, symmetric, cosine);
  const int64_t batch = problem.batch(), n = problem.num_candidates(), ld = round_up(batch, 16);
  Tensor loss = new_tensor(scale, {});
  Tensor losses = new_tensor(scale, {batch});
  Tensor rank = new_tensor(scale, {batch}, ScalarType::Long);
  Tensor row_sums = new_tensor(scale, {kNumSums, batch});
  Tensor column_sums = new_tensor(scale, {kNumSums, symmetric ? batch : 0});
  Tensor logits = new_tensor(scale, {batch, n});
  auto* s = logits.mutable_data_ptr<float>();
  auto* losses_to = losses.mutable_data_ptr<float>();
  auto* rank_to = rank.mutable_data_ptr<int64_t>();
  auto* row_sums_to = row_sums.mutable_data_ptr<float>();
  auto* column_sums_to = column_sums.mutable_data_ptr<float>();

  thread_local Buffer scaled;
  compute_logits(problem, prepare(problem, scaled), s);
  for_each_row(problem, n, [&](int64_t i, const std::vector<int64_t>& positives) {
    mask_row(problem, i, positives, s + i * n);
    losses_to[i] =
        row_loss(problem, i, positives, s + i * n, n, row_sums_to + i, rank_to + i);
  });
  if (symmetric) {
    thread_local Buffer flipped;
    float* columns = transposed(s, n, batch, batch, flipped);
    for_each_row(problem, batch, [&](int64_t i, const std::vector<int64_t>& positives) {
      const float other = row_loss(problem, i, positives, columns + i * ld, batch,
                                   column_sums_to + i, nullptr);
      losses_to[i] = (losses_to[i] + other) / 2.0f;
    });
  }
  double total = 0.0;
  for (int64_t i = 0; i < batch; ++i) total += double{problem.weight(i)} * losses_to[i];
  *loss.mutable_data_ptr<float>() = static_cast<float>(total);
  return {loss, losses, rank, row_sums, column_sums, logits};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> info_nce_backward_cpu(
    Tensor grad_loss, Tensor a, Tensor b, std::optional<Tensor> negatives, Tensor scale,
    std::optional<Tensor> row_ids, std::optional<Tensor> col_ids, std::optional<Tensor> domain_ids,
    std::optional<Tensor> group_ids, std::optional<Tensor> weights, Tensor row_sums,
    Tensor column_sums, Tensor logits, double label_smoothing, bool symmetric, bool cosine) {
  const Problem problem = view_problem(a, b, negatives, scale, row_ids, col_ids, domain_ids,
                                       group_ids, weights, label_smoothing, symmetric, cosine);
  const int64_t batch = problem.batch(), dim = problem.dim(), n = problem.num_candidates();
  const float upstream = *floats_of("grad_loss", grad_loss, {}) / (symmetric ? 2.0f : 1.0f);
  const float* s = floats_of("logits", logits, {batch, n});
  const float* by_row = floats_of("row_sums", row_sums, {kNumSums, batch});
  const float* by_column =
      floats_of("column_sums", column_sums, {kNumSums, symmetric ? batch : 0});
  Tensor grad_a = new_tensor(a, {batch, dim});
  Tensor grad_b = new_tensor(b, {batch, dim});
  const int64_t num_hard = problem.candidates[1].count;
  Tensor grad_hard = new_tensor(negatives.has_value() ? *negatives : a, {num_hard, dim});
  Tensor grad_scale = new_tensor(scale, {});
  void* const outputs[] = {grad_b.mutable_data_ptr(), grad_hard.mutable_data_ptr()};

  thread_local Buffer scaled, gradient, flipped, panels, sums;
  const Sides sides = prepare(problem, scaled);
  float* g = gradient.get<float>(batch * n);
  logits_gradient(problem, s, by_row, by_column, g);
  const int64_t most = std::max(batch, num_hard);
  float* grad_rows = sums.get<float>((batch + most) * std::max<int64_t>(dim, 1));
  float* grad_columns = grad_rows + batch * dim;
  for (int part = 0; part < 2; ++part) {
    const Rows& rows = problem.candidates[part];
    if (rows.count == 0) continue;
    float* here = g + problem.first(part);
    const float* left = transposed(here, n, batch, rows.count, flipped);
    const float* right = pack_factor(sides.scaled_q, Dtype::f32, batch, dim, panels);
    multiply_rows(gemm(), left, round_up(batch, 16), rows.count, batch, right, dim, grad_columns,
                  dim, false);
    // scaled_q has a factor 1 / ln 2, because logits are in base 2
    finish(rows, sides.column_norms[part], cosine, static_cast<float>(upstream * kLn2),
           grad_columns, outputs[part]);
    for (int64_t i = 0; i < batch && cosine; ++i) {
      simd().scale_columns(here + i * n, sides.column_norms[part].data(), 1, rows.count);
    }
    right = pack_factor(rows.data, rows.dtype, rows.count, dim, panels);
    multiply_rows(gemm(), here, n, batch, rows.count, right, dim, grad_rows, dim, part > 0);
  }
  const double total = finish(problem.anchors, sides.row_norms, cosine, problem.scale * upstream,
                              grad_rows, grad_a.mutable_data_ptr());
  *grad_scale.mutable_data_ptr<float>() = static_cast<float>(total * upstream);
  return {grad_a, grad_b, grad_hard, grad_scale};
}

}  // namespace moe_fast
