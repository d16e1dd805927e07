// Many query rows, as in a prefill: keys and values are packed once for all query blocks, then each query block runs
// over the tiles that it lists.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "attend/operands.h"

namespace gossamer {

class PackedWorker;

// What the query blocks of a pass share: where the tiles of its keys and of its column lists lie.
class PackedKeys {
 public:
  explicit PackedKeys(const Operands& operands);

  const Operands& operands;
  // A permutation of the keys belongs to a head of the plan; else keys are packed once for each key/value head.
  const int64_t heads;
  int64_t first_head = 0;  // of this pass, counted over the batch
  PackedTiles chunks, columns;

  // The packed head, counted over the batch, that a head of the plan reads.
  int64_t head_of(int64_t b, int64_t plan_head) const;
  // Tiles of all column lists, or 0 where query blocks gather columns for themselves.
  int64_t column_tiles() const { return column_start_.empty() ? 0 : column_start_.back(); }
  bool has_columns() const { return !column_start_.empty(); }
  const std::vector<int64_t>& column_start() const { return column_start_; }

 private:
  void place_columns();

  std::vector<int64_t> column_start_;  // by column list: its first tile
};

class PackedExecution {
 public:
  explicit PackedExecution(const Operands& operands);
  ~PackedExecution();

  void run();

 private:
  // A panel of query rows, in the pass that packs its keys; the cost is in pairs.
  struct WorkItem {
    int64_t pass, cost;
    RowRange rows;
  };

  std::vector<WorkItem> work_items() const;
  // Threads get their scratch, and tiles their places, in one piece of memory.
  void place(char* base, int threads, int64_t heads_at_once);
  void pack_pass(int64_t heads);
  void list_needed(int64_t heads);
  // Where queries are as many as keys, some query block lists nearly every key; where they are fewer, as in a chunk of
  // a long prompt, it pays to look which chunks are needed at all.
  bool few_queries() const { return o_.plan.query_len <= o_.plan.key_len / 2; }

  const Operands& o_;
  PackedKeys keys_;
  const int64_t heads_per_pass_;
  std::vector<std::unique_ptr<PackedWorker>> workers_;  // one a thread
  std::vector<char> marks_;      // by packed head of this pass and chunk: listed
  std::vector<int64_t> needed_;  // these, where not all are packed
};

}  // namespace gossamer
