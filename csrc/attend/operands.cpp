#include "attend/operands.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "kernels/half.h"
#include "kernels/integers.h"
#include "kernels/score_job.h"

namespace gossamer {

Operands::Operands(const Kernels& kernels, const Plan& plan, const AttentionCall& call)
    : kernels(kernels),
      plan(plan),
      call(call),
      padded_dim(round_up(call.k.dim, kernels.head_dim_multiple)),
      padded_value_dim(round_up(call.v.dim, kernels.head_dim_multiple)),
      heads_a_plan_head(call.q.heads / plan.heads) {}

int64_t Operands::most_chunks() const {
  int64_t most = 0;
  for (int64_t b = 0; b < plan.batch(); ++b) most = std::max(most, chunks(b));
  return most;
}

PackedTiles Operands::tiles(char* base) const {
  const int64_t unit = kernels.bf16_tiles ? 2 : 4;
  return {base, kChunk * padded_dim * unit, kChunk * padded_value_dim * unit};
}

void Operands::pack_from(const Tokens& k, int64_t b, int64_t group, const int32_t* positions, int count, char* keys,
                         char* values) const {
  const Extent& extent = plan.extent();
  int64_t slots[kChunk];
  for (int t = 0; t < kChunk; ++t) {
    // A dead slot may hold anything, NaN too, and is never read; nor is what no position can be.
    const bool live = t < count && positions[t] >= 0 && positions[t] < extent.key_count[b];
    slots[t] = live ? extent.key_slot(b, positions[t]) : -1;
  }
  PointedRows key_rows, value_rows;
  k.point_at(*kernels.scores, b, group, slots, key_rows);
  if (values != nullptr) call.v.point_at(*kernels.scores, b, group, slots, value_rows);
  kernels.pack({call.k.dtype, key_rows.rows, value_rows.rows, call.k.dim, call.v.dim, padded_dim, padded_value_dim,
                keys, values});
}

int64_t Operands::means_room() const {
  const int64_t means = kChunk * int64_t{call.k.dim + call.v.dim} * int64_t{sizeof(float)};
  const int64_t block = std::min(plan.grid.block_k, call.k.tokens);
  return means + (call.k.paged() ? block * call.k.row_bytes() : 0) + (call.v.paged() ? block * call.v.row_bytes() : 0);
}

void Operands::pack_means(int64_t b, int64_t group, int64_t block, char* room, char* keys, char* values) const {
  const void* rows[2][kChunk] = {};
  const Tokens* tokens[2] = {&call.k, &call.v};
  float* scratch = reinterpret_cast<float*>(room);
  char* copies = room + kChunk * int64_t{call.k.dim + call.v.dim} * int64_t{sizeof(float)};
  const DType dtype = kernels.bf16_tiles ? DType::kBFloat16 : DType::kFloat32;
  for (int n = 0; n < 2; ++n)
    for (int t = 0; t < kChunk; ++t) {
      const int64_t begin = (block + t) * plan.grid.block_k;
      const int64_t end = std::min(begin + plan.grid.block_k, plan.extent().key_count[b]);
      if (begin >= end) break;
      const Tokens& x = *tokens[n];
      const EvenRows from =
          x.consecutive(*kernels.scores, b, group, plan.extent().key_slot(b, begin), end - begin, copies);
      kernels.scores->mean(from.first, from.stride, end - begin, x.dim, x.dtype, scratch);
      uint16_t* narrow = reinterpret_cast<uint16_t*>(scratch);
      for (int d = 0; dtype == DType::kBFloat16 && d < x.dim; ++d) narrow[d] = float_to_bf16(scratch[d]);
      rows[n][t] = scratch;
      scratch += x.dim;
    }
  kernels.pack({dtype, rows[0], rows[1], call.k.dim, call.v.dim, padded_dim, padded_value_dim, keys, values});
}

void Operands::clear_row(int64_t b, int64_t head, int64_t row) const {
  std::memset(call.out.row(b, head, row), 0, static_cast<size_t>(call.out.row_bytes()));
  call.lse[(b * call.q.heads + head) * call.out.tokens + row] =
      call.sinks != nullptr ? call.sinks[head] : -std::numeric_limits<float>::infinity();
}

void PanelRows::start(const Operands& operands, int64_t b, int64_t plan_head, int64_t block) {
  const Plan& plan = operands.plan;
  const Extent& extent = plan.extent();
  queries_.clear();
  outputs_.clear();
  lse_.clear();
  positions_.clear();
  places_.clear();
  sinks_.clear();
  block_ = {b, plan_head, block, kUnlimited, -kUnlimited, {}};
  block_.rules = {extent.key_count[b], plan.sink[plan_head], plan.window[plan_head], extent.limit, extent.causal};
}

void PanelRows::add(const Operands& operands, int64_t head, int64_t query, int64_t output_row) {
  const AttentionCall& call = operands.call;
  const Extent& extent = operands.plan.extent();
  const int64_t b = block_.b, position = extent.first_position(b) + query;
  queries_.push_back(call.q.row(b, head, extent.first_query(b) + query));
  outputs_.push_back(call.out.row(b, head, output_row));
  lse_.push_back(call.lse + (b * call.q.heads + head) * call.out.tokens + output_row);
  positions_.push_back(position);
  places_.emplace_back(head, extent.first_query(b) + query);
  block_.lowest = std::min(block_.lowest, position);
  block_.highest = std::max(block_.highest, position);
  if (call.sinks != nullptr) sinks_.push_back(call.sinks[head]);
}

void PanelRows::collect(const Operands& operands, const RowRange& range) {
  const Plan& plan = operands.plan;
  const Extent& extent = plan.extent();
  start(operands, range.b, range.plan_head, range.block);
  const int32_t* ranks = plan.q_order != nullptr ? plan.query_ranks(range.b, range.plan_head) : nullptr;
  for (int64_t h = range.first_head; h < range.first_head + range.heads; ++h)
    for (int64_t r = range.first_row; r < range.first_row + range.rows; ++r) {
      const int64_t query = ranks != nullptr ? ranks[r] : r;
      if (query < extent.query_count[range.b]) add(operands, h, query, extent.first_query(range.b) + query);
    }
}

Panel PanelRows::panel(const Operands& operands) const {
  const AttentionCall& call = operands.call;
  Panel panel{};
  panel.rows = static_cast<int>(queries_.size());
  panel.head_dim = call.q.dim;
  panel.value_dim = call.v.dim;
  panel.padded_head_dim = operands.padded_dim;
  panel.padded_value_dim = operands.padded_value_dim;
  panel.dtype = call.q.dtype;
  panel.output_dtype = call.out.dtype;
  panel.queries = queries_.data();
  panel.outputs = outputs_.data();
  panel.lse = lse_.data();
  panel.positions = positions_.data();
  panel.sink_logits = call.sinks != nullptr ? sinks_.data() : nullptr;
  panel.scale = call.scale;
  panel.softcap = call.softcap;
  panel.skip = operands.plan.skip * kLog2E;
  panel.rules = block_.rules;
  return panel;
}

}  // namespace gossamer
