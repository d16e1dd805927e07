#include "attend/packed_worker.h"

#include <algorithm>

namespace gossamer {

PackedWorker::PackedWorker(const PackedKeys& keys, int64_t most_chunks, char* scratch)
    : keys_(keys), o_(keys.operands), worklist_(o_.plan, most_chunks), scratch_(scratch) {}

void PackedWorker::mark_chunks(const PackedHead& head, char* marks) {
  const PackedTiles offsets = o_.tiles(nullptr);
  for (int64_t h = head.first_plan_head; h < head.first_plan_head + head.plan_heads; ++h)
    for (int64_t m = 0; m < o_.plan.row_blocks(head.b); ++m) {
      const Range rows = o_.plan.rows(head.b, m);
      rows_.collect(o_, {int32_t(head.b), int32_t(h), int32_t(m), int32_t(h * o_.heads_a_plan_head), 1,
                         int32_t(rows.begin), int32_t(rows.size())});
      worklist_.build(rows_.block(), offsets, head.shares_columns ? &offsets : nullptr, keys_.bounds(head));
      for (const Tile& tile : worklist_.tiles()) {
        if (tile.positions != nullptr && o_.plan.k_order == nullptr) continue;  // columns
        marks[(static_cast<const char*>(tile.keys) - offsets.base) / offsets.tile_bytes()] = 1;
      }
    }
}

void PackedWorker::pack_tile(int64_t tile) {
  const auto after = std::upper_bound(keys_.heads.begin(), keys_.heads.end(), tile,
                                      [](int64_t n, const PackedHead& head) { return n < head.first_tile; });
  const PackedHead& head = *(after - 1);
  const int64_t n = tile - head.first_tile;
  if (n < head.chunks)
    pack_chunk(head, n, keys_.tiles_from(tile));
  else if (n < head.chunks + head.column_tiles)
    pack_columns(head, n - head.chunks, keys_.tiles_from(tile));
  else
    pack_means(head, n - head.chunks - head.column_tiles, keys_.tiles_from(tile));
}

void PackedWorker::pack_chunk(const PackedHead& head, int64_t chunk, const PackedTiles& to) {
  const Plan& plan = o_.plan;
  const int64_t keys = plan.k_order != nullptr ? plan.key_len : plan.extent().key_count[head.b];
  const int count = static_cast<int>(std::min<int64_t>(kChunk, keys - chunk * kChunk));
  int32_t positions[kChunk];
  if (plan.k_order != nullptr)
    std::copy_n(plan.key_ranks(head.b, head.first_plan_head) + chunk * kChunk, count, positions);
  else
    for (int t = 0; t < count; ++t) positions[t] = static_cast<int32_t>(chunk * kChunk + t);
  o_.pack_from(keys_.keys_of(head), head.b, o_.group_of(head.first_plan_head), positions, count, to.keys(0),
               to.values(0));
}

void PackedWorker::pack_columns(const PackedHead& head, int64_t column_tile, const PackedTiles& to) {
  const auto [list, tile] = keys_.list_of_column_tile(head, column_tile);
  const Row columns = o_.plan.columns.row(list);
  const int32_t* first = columns.begin() + tile * kChunk;
  const int count = static_cast<int>(std::min<int64_t>(kChunk, columns.end() - first));
  o_.pack_from(keys_.keys_of(head), head.b, o_.group_of(head.first_plan_head), first, count, to.keys(0),
               to.values(0));
}

void PackedWorker::pack_means(const PackedHead& head, int64_t mean_tile, const PackedTiles& to) {
  char* room = means_buffer_.reserve(o_.means_room());
  o_.pack_means(head.b, o_.group_of(head.first_plan_head), mean_tile * kChunk, room, to.keys(0), to.values(0));
}

void PackedWorker::attend(const RowRange& range) {
  rows_.collect(o_, range);
  if (rows_.size() == 0) return;
  const PackedHead& head = keys_.heads[keys_.head_of(range.b, range.plan_head)];
  const PackedTiles chunks = keys_.tiles_from(head.first_tile);
  PackedTiles columns;
  if (head.shares_columns) {
    const int64_t list = o_.plan.column_list(range.b, range.plan_head, range.block);
    columns = keys_.tiles_from(keys_.first_column_tile(head, list));
  }
  worklist_.build(rows_.block(), chunks, head.shares_columns ? &columns : nullptr, keys_.bounds(head));
  gather(head);
  if (o_.plan.pruned_mean)
    worklist_.add_means(rows_.block(), keys_.tiles_from(head.first_mean_tile()), keys_.log_lengths(range.b));
  Panel panel = rows_.panel(o_);
  panel.tiles = worklist_.tiles().data();
  panel.tile_count = static_cast<int64_t>(worklist_.tiles().size());
  panel.scratch = scratch_;
  o_.kernels.attend(panel);
}

void PackedWorker::gather(const PackedHead& head) {
  const auto& positions = worklist_.gathered();
  if (positions.empty()) return;
  const int64_t total = static_cast<int64_t>(positions.size());
  const PackedTiles tiles = o_.tiles(gather_buffer_.reserve(ceil_div(total, kChunk) * o_.tile_bytes()));
  const QueryBlock& block = rows_.block();
  const Tokens keys = keys_.keys_of(head);
  for (int64_t n = 0; n * kChunk < total; ++n)
    o_.pack_from(keys, block.b, o_.group_of(block.plan_head), positions.data() + n * kChunk,
                 static_cast<int>(std::min<int64_t>(kChunk, total - n * kChunk)), tiles.keys(n), tiles.values(n));
  worklist_.add_gathered(block, tiles, positions.data());
}

}  // namespace gossamer
