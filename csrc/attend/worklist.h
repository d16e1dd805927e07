// Which packed tiles a panel of query rows runs over.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/job.h"
#include "plan/plan.h"

namespace gossamer {

// Where packed tiles lie, one after the other: the keys of each, then its values.
struct PackedTiles {
  char* base = nullptr;
  int64_t key_bytes = 0, value_bytes = 0;

  int64_t tile_bytes() const { return key_bytes + value_bytes; }
  char* keys(int64_t tile) const { return base + tile * tile_bytes(); }
  char* values(int64_t tile) const { return keys(tile) + key_bytes; }
  PackedTiles from(int64_t tile) const { return {keys(tile), key_bytes, value_bytes}; }
};

// The least and the greatest position among the keys of a packed chunk, where the plan orders them.
struct ChunkBounds {
  int32_t lowest, highest;
};

// A query block of one head of the plan, with queries at positions in [lowest, highest].
struct QueryBlock {
  int64_t b, plan_head, block;
  int64_t lowest, highest;
  Rules rules;
};

// Keys that some row may attend at all.
Range reachable(const QueryBlock& block);

class Worklist {
 public:
  // For batch rows of at most that many chunks of 64 keys.
  Worklist(const Plan& plan, int64_t most_chunks);

  // Lists the tiles for a query block. `packed` holds the chunks of its head; `columns` the tiles of its column list,
  // or null: then the columns that no listed chunk covers are left in gathered(), for the caller to pack and add.
  // `bounds` are of its head's chunks, null where the plan does not order keys.
  void build(const QueryBlock& block, const PackedTiles& packed, const PackedTiles* columns, const ChunkBounds* bounds);
  // The same for keys at positions [begin, end) alone, whole chunks that the plan does not order.
  void build_within(const QueryBlock& block, const PackedTiles& packed, Range keys);
  // `positions` is gathered(), or a copy of it that lives longer.
  void add_gathered(const QueryBlock& block, const PackedTiles& packed, const int32_t* positions);

  // The tiles of means, of which the query block attends those of blocks that it sees whole and does not select.
  void add_means(const QueryBlock& block, const PackedTiles& means, const float* log_lengths);

  const std::vector<Tile>& tiles() const { return tiles_; }
  const std::vector<int32_t>& gathered() const { return gathered_; }

 private:
  void list_in_order(const QueryBlock& block, const PackedTiles& packed, const PackedTiles* columns, Range keys);
  void list_permuted(const QueryBlock& block, const PackedTiles& packed, const ChunkBounds* bounds);
  // Adds to a chunk's selected keys those that are columns. Returns whether a column or band holds any of them.
  bool add_scattered(const QueryBlock& block, const Row& columns, const int32_t* positions, int64_t chunk, int count);
  void add_columns(const QueryBlock& block, int64_t low, int64_t high, const PackedTiles* columns);
  void add_column_tile(const QueryBlock& block, const int32_t* positions, int count, uint64_t bits, const char* keys,
                       const char* values);
  void select(int64_t begin, int64_t end);
  void touch(int64_t begin, int64_t end);

  const Plan& plan_;
  std::vector<uint64_t> selected_;  // by chunk: keys that a block or a column selects
  std::vector<char> touched_;       // by chunk: listed
  std::vector<uint64_t> pruned_;    // by tile of means: key blocks that count by their mean
  std::vector<int32_t> gathered_;
  std::vector<Tile> tiles_;
};

// Keys that the parts of the plan list for a query block: an estimate, overlaps count twice.
int64_t listed_keys(const Plan& plan, int64_t b, int64_t plan_head, int64_t m);

}  // namespace gossamer
