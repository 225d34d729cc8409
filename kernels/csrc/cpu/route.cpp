// Logits are computed as dot products, four experts at a time: a router is so narrow that packing
// for a matrix product would cost more than it saves. Experts are chosen per group of tokens, which
// is a sentence or a single token, by the mean logits of its real tokens.
#include "../route.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "packing.h"
#include "plan_view.h"
#include "simd.h"
#include "tasks.h"

namespace moe_fast {
namespace {

using torch::headeronly::ScalarType;

constexpr int64_t kFour = 4;  // the number of rows of simd().dot4 and add_scaled4

enum class WeightMode { renormalize, probability, straight_through, one };

WeightMode weight_mode_of(const std::string& name) {
  if (name == "renormalize") return WeightMode::renormalize;
  if (name == "probability") return WeightMode::probability;
  if (name == "straight_through") return WeightMode::straight_through;
  if (name == "one") return WeightMode::one;
  throw std::runtime_error("weight_mode is unknown: " + name + ".");
}

struct Router {
  int64_t num_tokens, dim, num_experts, k;
  bool dense;
  WeightMode weight_mode;
  const void* x;
  Dtype x_dtype, weight_dtype;
  std::vector<float> converted;  // the weight as floats, if it is not float32
  const float* weight;           // [E, D]
  const bool* mask;              // [T], or null: all are real
  const int64_t* starts;         // [groups + 1], or null: each token is a group
  int64_t groups;

  bool real(int64_t token) const { return mask == nullptr || mask[token]; }
  int64_t first(int64_t group) const { return starts == nullptr ? group : starts[group]; }
  int64_t last(int64_t group) const { return starts == nullptr ? group + 1 : starts[group + 1]; }

  // Rows e .. e + 3 of the weight; the last row is repeated if there are no more, so that equal
  // rows have equal logits at every position.
  void four_rows(int64_t e, const float* (&rows)[kFour]) const {
    for (int64_t j = 0; j < kFour; ++j) rows[j] = weight + std::min(e + j, num_experts - 1) * dim;
  }
};

// x's row as floats: in place, or converted.
const float* token_row(const Router& router, int64_t token, Buffer& buffer) {
  return router.x_dtype == Dtype::f32
             ? static_cast<const float*>(router.x) + token * router.dim
             : load_floats(router.x, router.x_dtype, token * router.dim, router.dim, buffer);
}

// The least number of tokens that is worth a thread.
int64_t grain(const Router& router) {
  return (1 << 20) / std::max<int64_t>(router.dim * router.num_experts, 1) + 1;
}

void check_starts(const int64_t* starts, int64_t size, int64_t num_tokens) {
  bool rises = size > 0 && starts[0] == 0 && starts[size - 1] == num_tokens;
  for (int64_t i = 1; i < size; ++i) rises &= starts[i - 1] <= starts[i];
  if (rises) return;
  std::string text;
  for (int64_t i = 0; i < size; ++i) text += (i ? ", " : "") + std::to_string(starts[i]);
  throw std::runtime_error("cu_seqlens must rise from 0 to T = " + std::to_string(num_tokens) +
                           "; got [" + text + "].");
}

Router view_router(const Tensor& x, const Tensor& router_weight, int64_t k,
                   const std::string& mode, const std::string& weight_mode,
                   const std::optional<Tensor>& token_mask, const std::optional<Tensor>& starts) {
  if (x.dim() != 2 || router_weight.dim() != 2) {
    throw std::runtime_error("x must be [T, D] and router_weight [E, D].");
  }
  Router router;
  router.num_tokens = x.size(0);
  router.dim = x.size(1);
  router.num_experts = router_weight.size(0);
  router.dense = mode == "dense";
  router.k = router.dense ? router.num_experts : k;
  if (router.num_experts < 1 || router.k < 1 || router.k > router.num_experts) {
    throw std::runtime_error("num_experts_per_tok must lie in 1 .. num_experts = " +
                             std::to_string(router.num_experts) + "; got " + std::to_string(k) +
                             ".");
  }
  router.weight_mode = weight_mode_of(weight_mode);
  router.x_dtype = dtype_of(x);
  router.x = data_of("x", x, x, {router.num_tokens, router.dim});
  router.weight_dtype = dtype_of(router_weight);
  const void* weight = data_of("router_weight", router_weight, router_weight,
                               {router.num_experts, router.dim});
  if (router.weight_dtype == Dtype::f32) {
    router.weight = static_cast<const float*>(weight);
  } else {
    router.converted.resize(static_cast<size_t>(router.num_experts * router.dim));
    simd().load(weight, router.weight_dtype, router.converted.data(),
                  router.num_experts * router.dim);
    router.weight = router.converted.data();
  }
  router.mask = nullptr;
  if (token_mask.has_value()) {
    check_shape("token_mask", *token_mask, {router.num_tokens});
    if (token_mask->scalar_type() != ScalarType::Bool) {
      throw std::runtime_error("token_mask must be bool.");
    }
    router.mask = static_cast<const bool*>(token_mask->const_data_ptr());
  }
  router.starts = nullptr;
  router.groups = router.num_tokens;
  const bool sentences = mode == "sentence_topk" || mode == "sentence_switch";
  if (sentences && !starts.has_value()) throw std::runtime_error(mode + " needs cu_seqlens.");
  if (!sentences && !router.dense && mode != "token_topk") {
    throw std::runtime_error("mode is unknown: " + mode + ".");
  }
  if (starts.has_value()) {
    const int64_t* values = indices_of("cu_seqlens", *starts, starts->numel());
    check_starts(values, starts->numel(), router.num_tokens);
    if (sentences) {
      router.starts = values;
      router.groups = starts->numel() - 1;
    }
  }
  return router;
}

// [T, E] = x W^T, 0 for padding, whose rows are not read. Throws if a logit is not finite.
void compute_logits(const Router& router, float* logits) {
  std::atomic<int64_t> bad{router.num_tokens};
  run_chunks(router.num_tokens, grain(router), [&](int64_t begin, int64_t end) {
    thread_local Buffer buffer;
    for (int64_t token = begin; token < end; ++token) {
      float* out = logits + token * router.num_experts;
      std::fill_n(out, router.num_experts, 0.0f);
      if (!router.real(token)) continue;
      const float* row = token_row(router, token, buffer);
      bool finite = true;
      for (int64_t e = 0; e < router.num_experts; e += kFour) {
        const float* rows[kFour];
        float dots[kFour];
        router.four_rows(e, rows);
        simd().dot4(row, rows, dots, router.dim);
        for (int64_t j = 0; j < std::min(kFour, router.num_experts - e); ++j) {
          finite &= std::isfinite(dots[j]);
          out[e + j] = dots[j];
        }
      }
      if (!finite) {
        int64_t first = bad;
        while (token < first && !bad.compare_exchange_weak(first, token)) {
        }
      }
    }
  });
  if (bad == router.num_tokens) return;
  std::string values;
  for (int64_t e = 0; e < router.num_experts; ++e) {
    values += (e ? ", " : "") + std::to_string(logits[bad * router.num_experts + e]);
  }
  throw std::runtime_error("router logits must not be NaN or infinite; got [" + values +
                           "] for token " + std::to_string(bad) +
                           ": x or router_weight holds such values.");
}

// The logits of one group, the experts it chose, and their weights.
struct Choice {
  std::vector<float> mean;     // [E], of a sentence
  const float* logits;         // [E]
  int64_t num_real;            // tokens of the group that are not padding
  std::vector<int64_t> index;  // [E], the first K of them chosen
  std::vector<float> weights;  // [K]
  std::vector<float> p;        // [E] softmax over all experts, if the weight mode needs it

  explicit Choice(const Router& router)
      : mean(static_cast<size_t>(router.num_experts)),
        index(static_cast<size_t>(router.num_experts)),
        weights(static_cast<size_t>(router.k)),
        p(static_cast<size_t>(router.num_experts)) {}
};

void softmax(const float* logits, int64_t n, float* out) {
  const float largest = *std::max_element(logits, logits + n);
  float sum = 0.0f;
  for (int64_t i = 0; i < n; ++i) sum += out[i] = std::exp(logits[i] - largest);
  for (int64_t i = 0; i < n; ++i) out[i] /= sum;
}

void group_logits(const Router& router, const float* logits, int64_t group, Choice& choice) {
  const int64_t first = router.first(group), last = router.last(group);
  choice.num_real = 0;
  for (int64_t t = first; t < last; ++t) choice.num_real += router.real(t);
  choice.logits = logits + first * router.num_experts;
  if (router.starts == nullptr) return;
  std::fill(choice.mean.begin(), choice.mean.end(), 0.0f);
  for (int64_t t = first; t < last; ++t) {  // logits of padding are 0
    simd().add_scaled(choice.mean.data(), logits + t * router.num_experts,
                        1.0f / static_cast<float>(std::max<int64_t>(choice.num_real, 1)),
                        router.num_experts);
  }
  choice.logits = choice.mean.data();
}

// Chooses the K largest logits; of equal ones the lower id comes first.
void choose(const Router& router, Choice& choice) {
  const float* logits = choice.logits;
  std::iota(choice.index.begin(), choice.index.end(), int64_t{0});
  if (!router.dense) {
    std::partial_sort(choice.index.begin(), choice.index.begin() + router.k, choice.index.end(),
                      [&](int64_t a, int64_t b) {
                        return logits[a] > logits[b] || (logits[a] == logits[b] && a < b);
                      });
  }
  if (router.weight_mode == WeightMode::renormalize) {
    for (int64_t i = 0; i < router.k; ++i) choice.p[i] = logits[choice.index[i]];
    softmax(choice.p.data(), router.k, choice.weights.data());
  } else if (router.weight_mode == WeightMode::probability) {
    softmax(logits, router.num_experts, choice.p.data());
    for (int64_t i = 0; i < router.k; ++i) choice.weights[i] = choice.p[choice.index[i]];
  } else {
    std::fill(choice.weights.begin(), choice.weights.end(), 1.0f);
  }
}

// The gradient of a group's logits [E] from that of its weights [K].
void weights_gradient(const Router& router, Choice& choice, const float* grad, float* out) {
  std::fill_n(out, router.num_experts, 0.0f);
  if (router.weight_mode == WeightMode::one) return;
  float along = 0.0f;  // sum of w grad, or of grad
  const bool straight = router.weight_mode == WeightMode::straight_through;
  for (int64_t i = 0; i < router.k; ++i) along += (straight ? 1.0f : choice.weights[i]) * grad[i];
  if (router.weight_mode == WeightMode::renormalize) {
    for (int64_t i = 0; i < router.k; ++i) {
      out[choice.index[i]] = choice.weights[i] * (grad[i] - along);
    }
    return;
  }
  if (straight) softmax(choice.logits, router.num_experts, choice.p.data());
  for (int64_t e = 0; e < router.num_experts; ++e) out[e] = -choice.p[e] * along;
  for (int64_t i = 0; i < router.k; ++i) {
    const int64_t e = choice.index[i];
    out[e] += straight ? grad[i] : choice.p[e] * grad[i];
  }
}

// The gradient of all logits [T, E], including grad_logits; 0 for padding.
void logits_gradient(const Router& router, const float* logits, const float* grad_weights,
                     const float* grad_logits, float* out) {
  const int64_t grain_groups = router.starts == nullptr ? 4096 : 64;
  run_chunks(router.groups, grain_groups, [&](int64_t begin, int64_t end) {
    Choice choice(router);
    std::vector<float> sum(static_cast<size_t>(router.k));
    std::vector<float> grad(static_cast<size_t>(router.num_experts));
    for (int64_t group = begin; group < end; ++group) {
      group_logits(router, logits, group, choice);
      choose(router, choice);
      std::fill(sum.begin(), sum.end(), 0.0f);
      for (int64_t t = router.first(group); t < router.last(group); ++t) {
        for (int64_t i = 0; router.real(t) && i < router.k; ++i) {
          sum[i] += grad_weights[t * router.k + i];
        }
      }
      weights_gradient(router, choice, sum.data(), grad.data());
      const float share = 1.0f / static_cast<float>(std::max<int64_t>(choice.num_real, 1));
      for (int64_t t = router.first(group); t < router.last(group); ++t) {
        for (int64_t e = 0; e < router.num_experts; ++e) {
          const int64_t at = t * router.num_experts + e;
          out[at] = router.real(t) ? grad_logits[at] + share * grad[e] : 0.0f;
        }
      }
    }
  });
}

// The gradient of x: the gradients of each token's logits times the rows of the weight.
void input_gradient(const Router& router, const float* grad, void* grad_x) {
  run_chunks(router.num_tokens, grain(router), [&](int64_t begin, int64_t end) {
    thread_local Buffer buffer;
    float* sum = buffer.get<float>(router.dim);
    for (int64_t t = begin; t < end; ++t) {
      std::fill_n(sum, router.dim, 0.0f);
      for (int64_t e = 0; router.real(t) && e < router.num_experts; e += kFour) {
        const float* rows[kFour];
        float by[kFour] = {};
        router.four_rows(e, rows);
        std::copy_n(grad + t * router.num_experts + e, std::min(kFour, router.num_experts - e), by);
        simd().add_scaled4(sum, rows, by, router.dim);
      }
      simd().store(sum, router.x_dtype, at(grad_x, router.x_dtype, t * router.dim), router.dim);
    }
  });
}

// Adds the weight's gradient over tokens begin .. end to sums [E, D], four tokens at a time.
void add_weight_gradient(const Router& router, const float* grad, int64_t begin, int64_t end,
                         float* sums) {
  Buffer buffers[kFour];
  const float* rows[kFour];
  int64_t tokens[kFour];
  for (int64_t t = begin; t < end;) {
    int64_t found = 0;
    for (; t < end && found < kFour; ++t) {
      if (!router.real(t)) continue;
      rows[found] = token_row(router, t, buffers[found]);
      tokens[found++] = t;
    }
    if (found == 0) return;
    for (int64_t j = found; j < kFour; ++j) rows[j] = rows[0];  // times 0
    for (int64_t e = 0; e < router.num_experts; ++e) {
      float by[kFour] = {};
      for (int64_t j = 0; j < found; ++j) by[j] = grad[tokens[j] * router.num_experts + e];
      simd().add_scaled4(sums + e * router.dim, rows, by, router.dim);
    }
  }
}

// The tokens are divided into static parts, whose sums are added in a fixed order.
void weight_gradient(const Router& router, const float* grad, void* grad_weight) {
  const int64_t size = router.num_experts * router.dim;
  const int64_t parts = std::clamp<int64_t>(router.num_tokens / grain(router), 1,
                                            std::max<int64_t>(torch::stable::get_num_threads(), 1));
  std::vector<float> sums(static_cast<size_t>(parts * size));
  run_chunks(parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      add_weight_gradient(router, grad, p * router.num_tokens / parts,
                          (p + 1) * router.num_tokens / parts, sums.data() + p * size);
    }
  });
  for (int64_t p = 1; p < parts; ++p) {
    simd().add_scaled(sums.data(), sums.data() + p * size, 1.0f, size);
  }
  simd().store(sums.data(), router.weight_dtype, grad_weight, size);
}

const float* floats_of(const char* name, const Tensor& tensor, std::vector<int64_t> shape) {
  check_shape(name, tensor, shape);
  if (tensor.scalar_type() != ScalarType::Float) {
    throw std::runtime_error(std::string(name) + " must be float32.");
  }
  return tensor.const_data_ptr<float>();
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> route_cpu(Tensor x, Tensor router_weight, int64_t k,
                                                     std::string mode, std::string weight_mode,
                                                     std::optional<Tensor> token_mask,
                                                     std::optional<Tensor> starts) {
  const Router router =
      view_router(x, router_weight, k, mode, weight_mode, token_mask, starts);
  const int64_t tokens = router.num_tokens, experts = router.num_experts;
  Tensor weights = new_tensor(x, {tokens, router.k}, ScalarType::Float);
  Tensor logits = new_tensor(x, {tokens, experts}, ScalarType::Float);
  Tensor index = new_tensor(x, {tokens, router.k}, ScalarType::Long);
  Tensor counts = new_tensor(x, {experts}, ScalarType::Long);
  auto* weights_to = weights.mutable_data_ptr<float>();
  auto* logits_to = logits.mutable_data_ptr<float>();
  auto* index_to = index.mutable_data_ptr<int64_t>();
  auto* counts_to = counts.mutable_data_ptr<int64_t>();

  compute_logits(router, logits_to);
  const int64_t grain_groups = router.starts == nullptr ? 4096 : 64;
  run_chunks(router.groups, grain_groups, [&](int64_t begin, int64_t end) {
    Choice choice(router);
    for (int64_t group = begin; group < end; ++group) {
      group_logits(router, logits_to, group, choice);
      choose(router, choice);
      for (int64_t t = router.first(group); t < router.last(group); ++t) {
        for (int64_t i = 0; i < router.k; ++i) {
          const int64_t slot = t * router.k + i;
          index_to[slot] = router.real(t) ? choice.index[i] : experts;
          weights_to[slot] = router.real(t) ? choice.weights[i] : 0.0f;
        }
      }
    }
  });
  std::fill_n(counts_to, experts, int64_t{0});
  for (int64_t slot = 0; slot < tokens * router.k; ++slot) {
    if (index_to[slot] < experts) ++counts_to[index_to[slot]];
  }
  return {weights, logits, index, counts};
}

std::tuple<Tensor, Tensor> route_backward_cpu(Tensor grad_weights, Tensor grad_logits, Tensor x,
                                              Tensor router_weight, Tensor logits, int64_t k,
                                              std::string mode, std::string weight_mode,
                                              std::optional<Tensor> token_mask,
                                              std::optional<Tensor> starts) {
  const Router router =
      view_router(x, router_weight, k, mode, weight_mode, token_mask, starts);
  const int64_t tokens = router.num_tokens, experts = router.num_experts;
  const float* from_weights = floats_of("grad_weights", grad_weights, {tokens, router.k});
  const float* from_logits = floats_of("grad_logits", grad_logits, {tokens, experts});
  const float* values = floats_of("logits", logits, {tokens, experts});
  Tensor grad_x = new_tensor(x, {tokens, router.dim});
  Tensor grad_weight = new_tensor(router_weight, {experts, router.dim});
  Tensor grad = new_tensor(logits, {tokens, experts});
  auto* grad_to = grad.mutable_data_ptr<float>();
  logits_gradient(router, values, from_weights, from_logits, grad_to);
  input_gradient(router, grad_to, grad_x.mutable_data_ptr());
  weight_gradient(router, grad_to, grad_weight.mutable_data_ptr());
  return {grad_x, grad_weight};
}

}  // namespace moe_fast
