// The schema of every native operation, and the implementations for the CPU; cuda/bindings.cpp adds
// those for the GPU. Python loads this library with torch.ops.load_library; the operations are then
// in torch.ops.moe_fast_cpp.
#include <torch/csrc/stable/library.h>

#include <string>

#include "attention.h"
#include "cpu/gemm.h"
#include "cpu/instruction_set.h"
#include "cpu/int8_simd.h"
#include "expert_linear.h"
#include "expert_mlp.h"
#include "info_nce.h"
#include "int8.h"
#include "layer.h"
#include "plan.h"
#include "route.h"
#include "rows.h"

namespace {

// The libraries and instruction set that the CPU's operations use here, as text; empty if they
// cannot run. Throws std::runtime_error if MOE_FAST_CPU cannot be satisfied.
std::string cpu_capability() {
  const std::string set = moe_fast::name_of(moe_fast::instruction_set());
  if (moe_fast::why_no_gemm() != nullptr) return "";
  return std::string(moe_fast::gemm().name) + ", " + set;
}

std::string int8_capability() { return moe_fast::int8_ops().name; }

}  // namespace

STABLE_TORCH_LIBRARY(moe_fast_cpp, m) {
  m.def(
      "plan(Tensor top_k_index, int num_experts) -> "
      "(Tensor expert_offsets, Tensor row_to_token, Tensor row_to_slot, Tensor slot_to_row)");
  m.def(
      "varlen_attention(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens, float scale, "
      "int? window) -> Tensor");
  m.def("gather_rows(Tensor x, Tensor expert_offsets, Tensor row_to_token) -> Tensor");
  m.def("combine_rows(Tensor rows, Tensor top_k_weights, Tensor slot_to_row) -> Tensor");
  m.def(
      "combine_rows_backward(Tensor grad_y, Tensor rows, Tensor top_k_weights, "
      "Tensor expert_offsets, Tensor slot_to_row) -> (Tensor grad_rows, Tensor grad_weights)");
  m.def(
      "expert_mlp(Tensor x, Tensor up_proj, Tensor down_proj, Tensor? up_proj_bias, "
      "Tensor? down_proj_bias, Tensor top_k_weights, Tensor expert_offsets, Tensor row_to_token, "
      "Tensor row_to_slot, Tensor slot_to_row, str act, bool gated, bool save) -> "
      "(Tensor y, Tensor saved)");
  m.def(
      "expert_mlp_backward(Tensor grad_y, Tensor x, Tensor up_proj, Tensor down_proj, "
      "Tensor? up_proj_bias, Tensor? down_proj_bias, Tensor top_k_weights, "
      "Tensor expert_offsets, Tensor row_to_token, Tensor row_to_slot, Tensor slot_to_row, "
      "Tensor saved, str act, bool gated) -> (Tensor grad_x, Tensor grad_up_proj, "
      "Tensor grad_down_proj, Tensor grad_up_proj_bias, Tensor grad_down_proj_bias, "
      "Tensor grad_top_k_weights)");
  m.def(
      "expert_linear(Tensor x, Tensor weight, Tensor? bias, Tensor top_k_weights, "
      "Tensor expert_offsets, Tensor row_to_token, Tensor row_to_slot, Tensor slot_to_row) -> "
      "Tensor");
  m.def(
      "expert_linear_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor? bias, "
      "Tensor top_k_weights, Tensor expert_offsets, Tensor row_to_token, Tensor row_to_slot, "
      "Tensor slot_to_row) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, "
      "Tensor grad_top_k_weights)");
  m.def(
      "route(Tensor x, Tensor router_weight, int num_experts_per_tok, str mode, str weight_mode, "
      "Tensor? token_mask, Tensor? starts) -> (Tensor top_k_weights, Tensor router_logits, "
      "Tensor top_k_index, Tensor tokens_per_expert)");
  m.def(
      "route_backward(Tensor grad_weights, Tensor grad_logits, Tensor x, Tensor router_weight, "
      "Tensor logits, int num_experts_per_tok, str mode, str weight_mode, Tensor? token_mask, "
      "Tensor? starts) -> (Tensor grad_x, Tensor grad_router_weight)");
  m.def(
      "info_nce(Tensor a, Tensor b, Tensor? negatives, Tensor scale, Tensor? row_ids, "
      "Tensor? col_ids, Tensor? domain_ids, Tensor? group_ids, Tensor? weights, "
      "float label_smoothing, bool symmetric, bool cosine) -> (Tensor loss, Tensor row_loss, "
      "Tensor rank, Tensor row_sums, Tensor column_sums, Tensor logits)");
  m.def(
      "info_nce_backward(Tensor grad_loss, Tensor a, Tensor b, Tensor? negatives, Tensor scale, "
      "Tensor? row_ids, Tensor? col_ids, Tensor? domain_ids, Tensor? group_ids, Tensor? weights, "
      "Tensor row_sums, Tensor column_sums, Tensor logits, float label_smoothing, bool symmetric, "
      "bool cosine) -> (Tensor grad_a, Tensor grad_b, Tensor grad_negatives, Tensor grad_scale)");
  m.def(
      "add_norm(Tensor y, Tensor residual, Tensor weight, Tensor? bias, float eps, "
      "bool keep_exact) -> (Tensor out, Tensor exact)");
  m.def(
      "attention_block(Tensor x, Tensor residual, Tensor q_weight, Tensor k_weight, "
      "Tensor v_weight, Tensor out_weight, Tensor? q_bias, Tensor? k_bias, Tensor? v_bias, "
      "Tensor? out_bias, Tensor norm_weight, Tensor? norm_bias, Tensor cu_seqlens, Tensor? cos, "
      "Tensor? sin, int heads, float scale, int? window, float eps, bool keep_exact) -> "
      "(Tensor out, Tensor exact)");
  m.def(
      "int8_linear(Tensor x, Tensor values, Tensor scale, Tensor sums, Tensor? bias, Tensor? range, "
      "Tensor? residual, Tensor? norm_weight, Tensor? norm_bias, float eps, str dtype) -> Tensor");
  m.def(
      "int8_expert_linear(Tensor x, Tensor values, Tensor scale, Tensor sums, Tensor? bias, "
      "Tensor? range, Tensor top_k_weights, Tensor expert_offsets, Tensor row_to_token, "
      "Tensor row_to_slot, Tensor slot_to_row) -> Tensor");
  m.def(
      "int8_expert_mlp(Tensor x, Tensor up_values, Tensor up_scale, Tensor up_sums, "
      "Tensor? up_bias, Tensor? up_range, Tensor down_values, Tensor down_scale, Tensor down_sums, "
      "Tensor? down_bias, Tensor? down_range, Tensor top_k_weights, Tensor expert_offsets, "
      "Tensor row_to_token, Tensor row_to_slot, Tensor slot_to_row, Tensor? residual, "
      "Tensor? norm_weight, Tensor? norm_bias, float eps, str act, bool gated) -> Tensor");
  m.def("cpu_capability() -> str");
  m.def("int8_capability() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(moe_fast_cpp, CPU, m) {
  m.impl("plan", TORCH_BOX(&moe_fast::plan_cpu));
  m.impl("route", TORCH_BOX(&moe_fast::route_cpu));
  m.impl("route_backward", TORCH_BOX(&moe_fast::route_backward_cpu));
  m.impl("info_nce", TORCH_BOX(&moe_fast::info_nce_cpu));
  m.impl("info_nce_backward", TORCH_BOX(&moe_fast::info_nce_backward_cpu));
  m.impl("gather_rows", TORCH_BOX(&moe_fast::gather_rows_cpu));
  m.impl("combine_rows", TORCH_BOX(&moe_fast::combine_rows_cpu));
  m.impl("combine_rows_backward", TORCH_BOX(&moe_fast::combine_rows_backward_cpu));
  m.impl("varlen_attention", TORCH_BOX(&moe_fast::varlen_attention_cpu));
  m.impl("add_norm", TORCH_BOX(&moe_fast::add_norm_cpu));
  m.impl("attention_block", TORCH_BOX(&moe_fast::attention_block_cpu));
  m.impl("expert_mlp", TORCH_BOX(&moe_fast::expert_mlp_cpu));
  m.impl("expert_mlp_backward", TORCH_BOX(&moe_fast::expert_mlp_backward_cpu));
  m.impl("expert_linear", TORCH_BOX(&moe_fast::expert_linear_cpu));
  m.impl("expert_linear_backward", TORCH_BOX(&moe_fast::expert_linear_backward_cpu));
  m.impl("int8_linear", TORCH_BOX(&moe_fast::int8_linear_cpu));
  m.impl("int8_expert_linear", TORCH_BOX(&moe_fast::int8_expert_linear_cpu));
  m.impl("int8_expert_mlp", TORCH_BOX(&moe_fast::int8_expert_mlp_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(moe_fast_cpp, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&cpu_capability));
  m.impl("int8_capability", TORCH_BOX(&int8_capability));
}
