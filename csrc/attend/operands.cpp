#include "attend/operands.h"

#include <algorithm>

#include "kernels/integers.h"

namespace gossamer {

Operands::Operands(const Kernels& kernels, const Plan& plan, const AttentionCall& call)
    : kernels(kernels),
      plan(plan),
      call(call),
      padded_dim(round_up(call.k.dim, kernels.head_dim_multiple)),
      padded_value_dim(round_up(call.v.dim, kernels.head_dim_multiple)),
      chunks(ceil_div(plan.key_len, kChunk)),
      blocks(plan.query_blocks()),
      heads_a_plan_head(call.q.heads / plan.heads) {}

PackedTiles Operands::tiles(char* base) const {
  const int64_t unit = kernels.bf16_tiles ? 2 : 4;
  return {base, kChunk * padded_dim * unit, kChunk * padded_value_dim * unit};
}

void Operands::pack(int64_t b, int64_t group, const int32_t* slots, int count, char* keys, char* values) const {
  const int64_t low = plan.extent.key_start[b], high = low + plan.extent.key_count[b];
  const void* key_rows[kChunk];
  const void* value_rows[kChunk];
  for (int t = 0; t < kChunk; ++t) {
    // A dead slot may hold anything, NaN too, and is never read.
    const bool live = t < count && slots[t] >= low && slots[t] < high;
    key_rows[t] = live ? call.k.row(b, group, slots[t]) : nullptr;
    value_rows[t] = live ? call.v.row(b, group, slots[t]) : nullptr;
  }
  kernels.pack({call.k.dtype, key_rows, value_rows, call.k.dim, call.v.dim, padded_dim, padded_value_dim, keys,
                values});
}

void PanelRows::collect(const Operands& operands, const RowRange& range) {
  const Plan& plan = operands.plan;
  const AttentionCall& call = operands.call;
  queries_.clear();
  outputs_.clear();
  lse_.clear();
  coordinates_.clear();
  sinks_.clear();
  block_ = {range.b, range.plan_head, range.block, kUnlimited, -kUnlimited, {}};
  for (int64_t h = range.first_head; h < range.first_head + range.heads; ++h)
    for (int64_t r = range.first_row; r < range.first_row + range.rows; ++r) {
      int64_t row = r;
      if (plan.q_order != nullptr)
        row = plan.q_order[(int64_t{range.b} * plan.heads + range.plan_head) * plan.query_len + r];
      queries_.push_back(call.q.row(range.b, h, row));
      outputs_.push_back(call.out.row(range.b, h, row));
      lse_.push_back(call.lse + (range.b * call.q.heads + h) * plan.query_len + row);
      const int64_t coordinate = plan.extent.query_start[range.b] + row + plan.extent.key_start[range.b];
      coordinates_.push_back(coordinate);
      block_.lowest = std::min(block_.lowest, coordinate);
      block_.highest = std::max(block_.highest, coordinate);
      if (call.sinks != nullptr) sinks_.push_back(call.sinks[h]);
    }
  Rules& rules = block_.rules;
  rules.live_begin = plan.extent.key_start[range.b];
  rules.live_end = rules.live_begin + plan.extent.key_count[range.b];
  rules.sink_end = rules.live_begin + plan.sink[range.plan_head];
  rules.window = plan.window[range.plan_head];
  rules.limit = plan.extent.limit;
  rules.causal = plan.extent.causal;
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
  panel.coordinates = coordinates_.data();
  panel.sink_logits = call.sinks != nullptr ? sinks_.data() : nullptr;
  panel.scale = call.scale;
  panel.softcap = call.softcap;
  panel.rules = block_.rules;
  return panel;
}

}  // namespace gossamer
