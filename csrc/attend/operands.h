// The tensors of a call as the kernels want them: keys and values in packed tiles, query rows in panels.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "attend/executor.h"
#include "attend/worklist.h"
#include "kernels/job.h"

namespace gossamer {

// Some rows of a query block of a head of the plan, for the query heads [first_head, first_head + heads) that run it
// together. Rows are live queries counted from the first, or ranks where the plan orders them; see Plan::rows.
struct RowRange {
  int32_t b, plan_head, block, first_head, heads, first_row, rows;
};

class Operands {
 public:
  Operands(const Kernels& kernels, const Plan& plan, const AttentionCall& call);

  const Kernels& kernels;
  const Plan& plan;
  const AttentionCall& call;
  const int padded_dim, padded_value_dim;
  const int64_t heads_a_plan_head;  // query heads

  // Chunks of 64 keys of a batch row; of ranks where the plan orders them.
  int64_t chunks(int64_t b) const {
    return ceil_div(plan.k_order != nullptr ? plan.key_len : plan.extent().key_count[b], kChunk);
  }
  int64_t most_chunks() const;
  // Packed tiles from a base address on.
  PackedTiles tiles(char* base) const;
  int64_t tile_bytes() const { return tiles(nullptr).tile_bytes(); }
  // The key/value head that a head of the plan reads.
  int64_t group_of(int64_t plan_head) const { return plan_head * call.k.heads / plan.heads; }
  // Packs up to 64 keys and values, by their positions; keys alone where values is null.
  void pack(int64_t b, int64_t group, const int32_t* positions, int count, char* keys, char* values) const {
    pack_from(call.k, b, group, positions, count, keys, values);
  }
  // The same with the keys from elsewhere.
  void pack_from(const Tokens& k, int64_t b, int64_t group, const int32_t* positions, int count, char* keys,
                 char* values) const;
  // Packs the means of the keys and values of 64 key blocks, from the given one on; zeros beyond the last.
  void pack_means(int64_t b, int64_t group, int64_t block, char* room, char* keys, char* values) const;
  // Bytes of room that this needs: for the means, and for a block of keys or values.
  int64_t means_room() const;
  // What a query row that attends nothing has, in a row of the output.
  void clear_row(int64_t b, int64_t head, int64_t row) const;
};

// The rows of a panel: where they lie, and what they may see.
class PanelRows {
 public:
  // Live rows alone.
  void collect(const Operands& operands, const RowRange& range);
  // The same one by one: a head of the plan says what bands there are; queries count from the first live one.
  void start(const Operands& operands, int64_t b, int64_t plan_head, int64_t block);
  void add(const Operands& operands, int64_t head, int64_t query, int64_t output_row);
  // A panel over these rows; tiles and scratch are left to the caller.
  Panel panel(const Operands& operands) const;

  const QueryBlock& block() const { return block_; }
  int64_t position(int64_t row) const { return positions_[row]; }
  // The head of a row's query, and its row in the tensors.
  int64_t head(int64_t row) const { return places_[row].first; }
  int64_t token(int64_t row) const { return places_[row].second; }
  int64_t size() const { return static_cast<int64_t>(queries_.size()); }
  void* output(int64_t row) const { return outputs_[row]; }
  float* lse(int64_t row) const { return lse_[row]; }

 private:
  QueryBlock block_{};
  std::vector<const void*> queries_;
  std::vector<void*> outputs_;
  std::vector<float*> lse_;
  std::vector<int64_t> positions_;
  std::vector<std::pair<int64_t, int64_t>> places_;
  std::vector<float> sinks_;
};

}  // namespace gossamer
