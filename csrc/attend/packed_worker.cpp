#include "attend/packed_worker.h"

#include <algorithm>

namespace gossamer {

PackedWorker::PackedWorker(const PackedKeys& keys, char* scratch)
    : keys_(keys), o_(keys.operands), worklist_(o_.plan, o_.chunks), scratch_(scratch) {}

void PackedWorker::mark_chunks(int64_t packed_head, char* marks) {
  const Plan& plan = o_.plan;
  const int64_t b = packed_head / keys_.heads, share = plan.heads / keys_.heads;
  const int64_t first_head = packed_head % keys_.heads * share;
  const PackedTiles offsets = o_.tiles(nullptr), columns = offsets;
  for (int64_t h = first_head; h < first_head + share; ++h)
    for (int64_t m = 0; m < o_.blocks; ++m) {
      const int64_t row = m * plan.block_q, rows = std::min<int64_t>(plan.block_q, plan.query_len - row);
      rows_.collect(o_, {int32_t(b), int32_t(h), int32_t(m), int32_t(h * o_.heads_a_plan_head), 1, int32_t(row),
                         int32_t(rows)});
      worklist_.build(rows_.block(), offsets, keys_.has_columns() ? &columns : nullptr);
      for (const Tile& tile : worklist_.tiles()) {
        if (tile.slots != nullptr && plan.k_order == nullptr) continue;  // columns
        marks[(static_cast<const char*>(tile.keys) - offsets.base) / offsets.tile_bytes()] = 1;
      }
    }
}

void PackedWorker::pack_chunk(int64_t n) {
  const Plan& plan = o_.plan;
  const int64_t chunk = n % o_.chunks, packed_head = keys_.first_head + n / o_.chunks;
  const int64_t b = packed_head / keys_.heads, head = packed_head % keys_.heads;
  const int count = static_cast<int>(std::min<int64_t>(kChunk, plan.key_len - chunk * kChunk));
  int32_t slots[kChunk];
  for (int t = 0; t < count; ++t) slots[t] = static_cast<int32_t>(chunk * kChunk + t);
  if (plan.k_order != nullptr) std::copy_n(plan.k_order + packed_head * plan.key_len + chunk * kChunk, count, slots);
  const int64_t group = plan.k_order != nullptr ? o_.group_of(head) : head;
  o_.pack(b, group, slots, count, keys_.chunks.keys(n), keys_.chunks.values(n));
}

void PackedWorker::pack_columns(int64_t n) {
  const Plan& plan = o_.plan;
  const auto& start = keys_.column_start();
  const int64_t list = std::upper_bound(start.begin(), start.end(), n) - start.begin() - 1;
  const int64_t head = list / plan.column_groups();
  const int32_t* first = plan.columns.begin(list) + (n - start[list]) * kChunk;
  const int count = static_cast<int>(std::min<int64_t>(kChunk, plan.columns.end(list) - first));
  o_.pack(head / plan.heads, o_.group_of(head % plan.heads), first, count, keys_.columns.keys(n),
          keys_.columns.values(n));
}

void PackedWorker::attend(const RowRange& range) {
  rows_.collect(o_, range);
  const PackedTiles chunks =
      keys_.chunks.from((keys_.head_of(range.b, range.plan_head) - keys_.first_head) * o_.chunks);
  PackedTiles columns;
  if (keys_.has_columns())
    columns = keys_.columns.from(keys_.column_start()[o_.plan.column_list(range.b, range.plan_head, range.block)]);
  worklist_.build(rows_.block(), chunks, keys_.has_columns() ? &columns : nullptr);
  gather();
  Panel panel = rows_.panel(o_);
  panel.tiles = worklist_.tiles().data();
  panel.tile_count = static_cast<int64_t>(worklist_.tiles().size());
  panel.scratch = scratch_;
  o_.kernels.attend(panel);
}

void PackedWorker::gather() {
  const auto& slots = worklist_.gathered();
  if (slots.empty()) return;
  const int64_t total = static_cast<int64_t>(slots.size());
  const PackedTiles tiles = o_.tiles(gather_buffer_.reserve(ceil_div(total, kChunk) * o_.tile_bytes()));
  const QueryBlock& block = rows_.block();
  for (int64_t n = 0; n * kChunk < total; ++n)
    o_.pack(block.b, o_.group_of(block.plan_head), slots.data() + n * kChunk,
            static_cast<int>(std::min<int64_t>(kChunk, total - n * kChunk)), tiles.keys(n), tiles.values(n));
  worklist_.add_gathered(block, tiles, slots.data());
}

}  // namespace gossamer
