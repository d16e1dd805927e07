// Many query rows, as in a prefill: keys and values are packed once for all query blocks, then each query block runs
// over the tiles that it lists.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "attend/operands.h"

namespace gossamer {

class PackedWorker;

// A packed head: the keys that some heads of the plan read. Its tiles lie one after the other, first its chunks of 64
// keys, then its column lists, then the means of its key blocks. Where single keys are gathered from pages that do not
// hold them as rows, all of the head's keys lie behind them as rows, in the room of some tiles.
struct PackedHead {
  int64_t b, first_plan_head, plan_heads;
  int64_t first_tile;  // counted over all packed heads
  int64_t chunks, column_tiles;
  bool shares_columns;  // its column lists are packed once; else each query block gathers its own
  int64_t mean_tiles;
  int64_t row_tiles = 0;

  int64_t tiles() const { return chunks + column_tiles + mean_tiles + row_tiles; }
  int64_t first_mean_tile() const { return first_tile + chunks + column_tiles; }
  int64_t first_row_tile() const { return first_mean_tile() + mean_tiles; }
};

// What the query blocks of a pass share: which tiles there are, and where they lie.
class PackedKeys {
 public:
  PackedKeys(const Operands& operands, const std::vector<int64_t>& batch_rows);

  const Operands& operands;
  // By batch row, and by key/value head, or by head of the plan where it orders keys.
  std::vector<PackedHead> heads;

  int64_t head_of(int64_t b, int64_t plan_head) const;
  // Tile of a column list, counted over all packed heads.
  int64_t first_column_tile(const PackedHead& head, int64_t list) const;
  // Of a packed head's chunks; null where the plan does not order keys.
  const ChunkBounds* bounds(const PackedHead& head) const {
    return bounds_.empty() ? nullptr : bounds_[&head - heads.data()].data();
  }
  // Logs, to the base 2, of the numbers of keys of a batch row's key blocks; one for each place in its tiles of means.
  const float* log_lengths(int64_t b) const { return log_lengths_[b].data(); }
  // The list of which a column tile is a part, and the number of the tile in it.
  std::pair<int64_t, int64_t> list_of_column_tile(const PackedHead& head, int64_t column_tile) const;

  // Where the rows of a packed head's keys are of this pass, by slot.
  char* rows(const PackedHead& head) const { return tiles_from(head.first_row_tile()).base; }
  // What its keys are read from.
  Tokens keys_of(const PackedHead& head) const;

  // Of this pass: its first tile, and where it lies.
  int64_t first_tile = 0;
  PackedTiles base;
  PackedTiles tiles_from(int64_t tile) const { return base.from(tile - first_tile); }

 private:
  int64_t column_tiles(int64_t list) const { return ceil_div(operands.plan.columns.row(list).size(), kChunk); }
  bool shares_columns(int64_t b, int64_t packed_heads) const;
  void place_columns(PackedHead& head);
  void place_rows(PackedHead& head) const;
  int64_t measure_blocks(int64_t b);
  void bound_chunks();

  std::vector<int64_t> first_heads_;    // by batch row
  std::vector<std::vector<float>> log_lengths_;
  std::vector<std::vector<ChunkBounds>> bounds_;  // by packed head
  std::vector<int64_t> column_starts_;  // by column list: its first tile, counted from its packed head's first
};

class PackedExecution {
 public:
  PackedExecution(const Operands& operands, const std::vector<int64_t>& batch_rows);
  ~PackedExecution();

  void run();

 private:
  // A panel of query rows; the cost is in pairs.
  struct WorkItem {
    int64_t cost;
    RowRange rows;
  };
  struct Pass {
    int64_t first_head, stop_head, tiles;
    std::vector<WorkItem> items;
  };

  void divide_into_passes();
  void add_items(int64_t packed_head, std::vector<WorkItem>& items) const;
  int64_t most_jobs() const;
  void copy_rows(const Pass& pass);
  void pack(const Pass& pass);
  void list_needed(const Pass& pass);

  const Operands& o_;
  PackedKeys keys_;
  std::vector<Pass> passes_;
  std::vector<std::unique_ptr<PackedWorker>> workers_;  // one a thread
  std::vector<char> marks_;      // by tile of this pass: needed
  std::vector<int64_t> needed_;  // these tiles
};

}  // namespace gossamer
