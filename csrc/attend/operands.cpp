#include "attend/operands.h"

#include <algorithm>

#include "kernels/integers.h"

namespace gossamer {

Operands::Operands(const Kernels& kernels, const PlanView& plan, const Call& call)
    : kernels(kernels),
      plan(plan),
      call(call),
      element(element_size(call.dtype)),
      dim(round_up(call.head_dim, kernels.head_dim_multiple)),
      value_dim(round_up(call.value_dim, kernels.head_dim_multiple)),
      chunks(ceil_div(plan.key_len, kChunk)),
      blocks(ceil_div(plan.query_len, plan.block_q)) {}

PackedTiles Operands::tiles(char* base) const {
  const int64_t unit = kernels.bf16_tiles ? 2 : 4;
  return {base, kChunk * dim * unit, kChunk * value_dim * unit};
}

int64_t Operands::tile_bytes() const {
  const PackedTiles one = tiles(nullptr);
  return one.key_bytes + one.value_bytes;
}

void Operands::pack(int64_t b, int64_t group, const int32_t* slots, int count, char* keys, char* values) const {
  const int64_t low = plan.key_start[b], high = low + plan.key_count[b];
  const void* key_rows[kChunk];
  const void* value_rows[kChunk];
  for (int t = 0; t < kChunk; ++t) {
    // A dead slot may hold anything, NaN too, and is never read.
    const bool live = t < count && slots[t] >= low && slots[t] < high;
    key_rows[t] = live ? call.k.row(b, group, slots[t], element) : nullptr;
    value_rows[t] = live ? call.v.row(b, group, slots[t], element) : nullptr;
  }
  kernels.pack({call.dtype, key_rows, value_rows, call.head_dim, call.value_dim, dim, value_dim, keys, values});
}

void PanelRows::collect(const Operands& operands, const RowRange& range) {
  const PlanView& plan = operands.plan;
  const Call& call = operands.call;
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
      queries_.push_back(call.q.row(range.b, h, row, operands.element));
      outputs_.push_back(call.out.row(range.b, h, row, operands.element));
      lse_.push_back(call.lse + (range.b * call.query_heads + h) * plan.query_len + row);
      const int64_t at = plan.query_start[range.b] + row + plan.key_start[range.b];
      coordinates_.push_back(at);
      block_.lowest = std::min(block_.lowest, at);
      block_.highest = std::max(block_.highest, at);
      if (call.sinks != nullptr) sinks_.push_back(call.sinks[h]);
    }
  Rules& rules = block_.rules;
  rules.live_begin = plan.key_start[range.b];
  rules.live_end = rules.live_begin + plan.key_count[range.b];
  rules.sink_end = rules.live_begin + plan.sink[range.plan_head];
  rules.window = plan.window[range.plan_head];
  rules.limit = plan.limit;
  rules.causal = plan.causal;
}

Panel PanelRows::panel(const Operands& operands) const {
  const Call& call = operands.call;
  Panel panel{};
  panel.rows = static_cast<int>(queries_.size());
  panel.head_dim = call.head_dim;
  panel.value_dim = call.value_dim;
  panel.padded_head_dim = operands.dim;
  panel.padded_value_dim = operands.value_dim;
  panel.dtype = call.dtype;
  panel.output_dtype = call.dtype;
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
