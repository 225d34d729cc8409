// The GPU's kernels, run on the CPU over random problems and compared with plain loops.
//
//   main SEED SECONDS    prints the number of problems; exit code 1 at the first that is wrong
//
// Every array is a heap allocation of its exact size, filled with garbage, for the sanitizers.
#include "cuda_on_cpu.h"
// And then what is tested.
#include "../../../kernels/csrc/cuda/plan_kernels.cuh"
#include "../../../kernels/csrc/cuda/rows_kernels.cuh"

#include <chrono>
#include <cmath>
#include <string>

namespace {

using namespace moe_fast;
using cuda_on_cpu::launch;
using Ints = std::vector<int64_t>;

struct Problem {
  int64_t experts, tokens, k;
  Ints ids;
  std::string name;
  int64_t slots() const { return tokens * k; }
};

struct Plan {
  Ints offsets, row_to_token, row_to_slot, slot_to_row;
  bool operator==(const Plan&) const = default;
};

int64_t draw(std::mt19937_64& random, int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(random);
}

Problem draw_problem(std::mt19937_64& random) {
  const int64_t few[] = {1, 2, 3, 7, 8, 31, 32, 33, 64};
  Problem p;
  p.experts = few[draw(random, 0, 8)];
  p.k = draw(random, 1, 3);
  p.tokens = draw(random, 0, 200);
  const int64_t used = draw(random, 1, p.experts);
  const int64_t odd[] = {p.experts, p.experts + 1, -1, INT64_MIN, INT64_MAX};
  for (int64_t slot = 0; slot < p.slots(); ++slot) {
    const bool skipped = draw(random, 0, 9) == 0;
    p.ids.push_back(skipped ? odd[draw(random, 0, 4)] : draw(random, 0, used - 1));
  }
  p.name = "E=" + std::to_string(p.experts) + " T=" + std::to_string(p.tokens) +
           " K=" + std::to_string(p.k);
  return p;
}

Plan expected_plan(const Problem& p) {
  Plan plan{Ints(p.experts + 1), {}, {}, Ints(p.slots(), -1)};
  for (int64_t expert = 0; expert <= p.experts; ++expert) {
    plan.offsets[expert] = static_cast<int64_t>(plan.row_to_slot.size());
    for (int64_t slot = 0; slot < p.slots(); ++slot) {
      const bool skipped = p.ids[slot] < 0 || p.ids[slot] >= p.experts;
      if (skipped ? expert != p.experts : p.ids[slot] != expert) continue;
      if (!skipped) plan.slot_to_row[slot] = static_cast<int64_t>(plan.row_to_slot.size());
      plan.row_to_slot.push_back(slot);
      plan.row_to_token.push_back(slot / p.k);
    }
  }
  return plan;
}

// The cut of so small a problem is one block: more and smaller ones, and counters in either memory,
// are put together by hand. PlanCut::of must only cover the slots, within its bounds.
PlanCut draw_cut(const Problem& p, std::mt19937_64& random) {
  const int64_t per_warp = 32 * draw(random, 1, 3);
  const int64_t blocks = (p.slots() + per_warp * PlanCut::kWarps) / (per_warp * PlanCut::kWarps);
  return {p.slots(), p.experts + 1, per_warp, blocks + draw(random, 0, 1)};
}

void check_cut(std::mt19937_64& random) {
  const int64_t slots = draw(random, 0, int64_t{1} << draw(random, 0, 40));
  const int64_t experts = draw(random, 1, int64_t{1} << draw(random, 0, 14));
  const PlanCut cut = PlanCut::of(slots, experts);
  const bool covers = cut.num_warps() * cut.slots_per_warp >= slots;
  const bool bounded = cut.num_blocks >= 1 && cut.num_warps() < PlanCut::kMaxWarps + PlanCut::kWarps;
  const bool few_counters = cut.num_blocks == 1 || experts <= cut.slots_per_warp;
  const bool fits = experts > 1024 || cut.in_shared_memory();
  if (covers && bounded && few_counters && fits && cut.slots_per_warp % 32 == 0) return;
  std::printf("wrong: cut of %lld slots, E=%lld\n", static_cast<long long>(slots),
              static_cast<long long>(experts));
  std::exit(1);
}

template <typename Id>
Plan plan_by_kernels(const Problem& p, std::mt19937_64& random) {
  std::vector<Id> ids;
  for (const int64_t id : p.ids) {  // the same kind of id, in fewer bits
    ids.push_back(static_cast<Id>(std::clamp<int64_t>(id, std::numeric_limits<Id>::min(),
                                                      std::numeric_limits<Id>::max())));
  }
  const int64_t garbage = -77;
  const PlanCut cut = draw_cut(p, random);
  const bool shared = draw(random, 0, 1) == 1;
  Ints counts(cut.num_buckets * cut.num_warps(), garbage);
  Ints counters(shared ? 0 : cut.num_blocks * cut.counters_per_block(), garbage);
  Plan plan{Ints(cut.num_buckets, garbage), Ints(p.slots(), garbage), Ints(p.slots(), garbage),
            Ints(p.slots(), garbage)};
  const PlanJob<Id> job{cut, ids.data(), p.k, counts.data(), shared ? nullptr : counters.data()};
  const PlanRows out{plan.offsets.data(), plan.row_to_token.data(), plan.row_to_slot.data(),
                     plan.slot_to_row.data()};
  const auto blocks = static_cast<unsigned>(cut.num_blocks);
  const size_t bytes = shared ? cut.counters_per_block() * sizeof(int64_t) : 0;
  launch(count_slots<Id>, blocks, 32 * PlanCut::kWarps, bytes, random, job);
  launch(place_slots<Id>, blocks, 32 * PlanCut::kWarps, bytes, random, job, out);
  return plan;
}

void require(bool holds, const Problem& p, const char* what) {
  if (holds) return;
  std::printf("wrong: %s, %s\n", what, p.name.c_str());
  std::exit(1);
}

// --- gather_rows and combine_rows ----------------------------------------------------------------

template <typename T>
T rounded(double value) {
  return from_float<T>(static_cast<float>(value));
}

template <typename T>
std::vector<T> normal(int64_t size, std::mt19937_64& random) {
  std::normal_distribution<float> unit;
  std::vector<T> values;
  for (int64_t i = 0; i < size; ++i) values.push_back(from_float<T>(unit(random)));
  return values;
}

template <typename T>
std::vector<T> garbage(int64_t size) {
  return std::vector<T>(size, from_float<T>(std::nanf("")));
}

// Sums of a few products of unit scale: their own rounding, and that of the result.
template <typename T>
bool near(T actual, double expected) {
  const double bits = std::is_same_v<T, float> ? 1e-5 : std::is_same_v<T, __half> ? 1e-3 : 8e-3;
  return std::fabs(to_float(actual) - expected) <= bits * (1 + std::fabs(expected));
}

template <typename T, int Size>
void check_rows(const Problem& p, const Plan& plan, int64_t width, std::mt19937_64& random) {
  using Row = Pack<T, Size>;
  const int64_t dim = width * Size, slots = p.slots(), valid = plan.offsets.back();
  const auto blocks = static_cast<unsigned>(draw(random, 1, 3));
  const auto packs = [](auto& values) { return reinterpret_cast<Row*>(values.data()); };

  std::vector<T> x = normal<T>(p.tokens * dim, random), rows = garbage<T>(slots * dim);
  launch(gather_rows<Row>, blocks, 64, 0, random, packs(x), &plan.offsets.back(),
         plan.row_to_token.data(), p.tokens, slots, width, packs(rows));
  for (int64_t i = 0; i < slots * dim; ++i) {
    const bool skipped = i / dim >= valid;
    const double want = skipped ? 0 : to_float(x[plan.row_to_token[i / dim] * dim + i % dim]);
    require(to_float(rows[i]) == want, p, "gather_rows");
  }

  rows = normal<T>(valid * dim, random);
  rows.resize(slots * dim, from_float<T>(std::nanf("")));  // skipped rows must not be read
  std::vector<float> weights = normal<float>(slots, random);
  std::vector<T> y = garbage<T>(p.tokens * dim);
  launch(combine_rows<T, Size>, blocks, 64, 0, random, packs(rows), weights.data(),
         plan.slot_to_row.data(), p.tokens, p.k, width, packs(y));
  for (int64_t i = 0; i < p.tokens * dim; ++i) {
    double want = 0;
    for (int64_t slot = i / dim * p.k; slot < (i / dim + 1) * p.k; ++slot) {
      const int64_t row = plan.slot_to_row[slot];
      if (row >= 0) want += double(weights[slot]) * to_float(rows[row * dim + i % dim]);
    }
    require(near(y[i], want), p, "combine_rows");
  }

  std::vector<T> upstream = normal<T>(p.tokens * dim, random), grad_rows = garbage<T>(slots * dim);
  std::vector<float> grad_weights = garbage<float>(slots);
  launch(combine_rows_backward<T, Size>, blocks, 64, 0, random, packs(upstream), packs(rows),
         weights.data(), &plan.offsets.back(), plan.slot_to_row.data(), slots, p.k, width,
         packs(grad_rows), grad_weights.data());
  for (int64_t slot = 0; slot < slots; ++slot) {
    const int64_t row = plan.slot_to_row[slot];
    double dot = 0;
    for (int64_t d = 0; row >= 0 && d < dim; ++d) {
      const double g = to_float(upstream[slot / p.k * dim + d]);
      dot += g * to_float(rows[row * dim + d]);
      require(near(grad_rows[row * dim + d], weights[slot] * g), p, "gradient of rows");
    }
    // Up to 300 terms of unit scale, which may cancel.
    require(std::fabs(grad_weights[slot] - dot) <= 1e-4, p, "gradient of weights");
  }
  for (int64_t i = valid * dim; i < slots * dim; ++i) {
    require(to_float(grad_rows[i]) == 0, p, "gradient of skipped rows");
  }
}

void check(std::mt19937_64& random) {
  const Problem p = draw_problem(random);
  const Plan plan = expected_plan(p);
  require(plan_by_kernels<int64_t>(p, random) == plan, p, "plan, int64");
  require(plan_by_kernels<int32_t>(p, random) == plan, p, "plan, int32");
  const int64_t width = draw(random, 1, 40);
  switch (draw(random, 0, 3)) {
    case 0: return check_rows<float, 1>(p, plan, width, random);
    case 1: return check_rows<float, 4>(p, plan, width, random);
    case 2: return check_rows<__half, 8>(p, plan, width, random);
    default: return check_rows<__nv_bfloat16, 8>(p, plan, width, random);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  std::mt19937_64 random(std::stoull(argv[1]));
  const auto end = std::chrono::steady_clock::now() +
                   std::chrono::duration<double>(std::stod(argv[2]));
  int problems = 0;
  do {
    check_cut(random);
    check(random);
    ++problems;
  } while (std::chrono::steady_clock::now() < end);
  std::printf("%d problems\n", problems);
}
