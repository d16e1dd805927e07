// Which pairs of query and key the model allows, and how blocks lie on them. Everything is in positions, which count
// from a batch row's first live key.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/integers.h"
#include "kernels/job.h"

namespace gossamer {

// Half-open.
struct Range {
  int64_t begin, end;

  bool empty() const { return begin >= end; }
  int64_t size() const { return empty() ? 0 : end - begin; }
};

// Arrays hold a number for each batch row; see plan/extent.py.
struct Extent {
  int64_t batch;
  const int64_t* query_start;
  const int64_t* query_count;
  const int64_t* key_start;
  const int64_t* key_count;
  bool causal;
  int64_t limit;  // kUnlimited: none

  int64_t first_query(int64_t b) const { return std::max<int64_t>(-query_start[b], 0); }
  int64_t first_position(int64_t b) const { return std::max<int64_t>(query_start[b], 0); }
  // Where the query or key of a position lies in its tensor.
  int64_t query_row(int64_t b, int64_t position) const { return position - query_start[b]; }
  int64_t key_slot(int64_t b, int64_t position) const { return position + key_start[b]; }

  // Keys of which queries at some positions may attend any.
  Range keys_of(int64_t b, Range queries) const {
    if (queries.empty()) return {0, 0};
    const int64_t begin = std::max<int64_t>(queries.begin - limit + 1, 0);
    return {begin, std::min(key_count[b], causal ? queries.end : queries.end - 1 + limit)};
  }
};

// See plan/grid.py.
struct Grid {
  Extent extent;
  int64_t block_q, block_k;

  // Global number of a batch row's first query block.
  int64_t first_block(int64_t b) const { return extent.first_position(b) / block_q; }
  // Number of its query blocks.
  int64_t row_blocks(int64_t b) const {
    if (extent.query_count[b] == 0) return 0;
    return ceil_div(extent.first_position(b) + extent.query_count[b], block_q) - first_block(b);
  }
  // Positions of the live queries of its query block m.
  Range queries(int64_t b, int64_t m) const {
    const int64_t begin = (first_block(b) + m) * block_q, first = extent.first_position(b);
    return {std::max(begin, first), std::min(begin + block_q, first + extent.query_count[b])};
  }
  // Key blocks of which every query of the block may attend every live key.
  Range wholly_seen(int64_t b, int64_t m) const {
    const Range of_block = queries(b, m);
    if (of_block.empty()) return {0, 0};
    const int64_t keys = extent.key_count[b];
    const int64_t low = std::max<int64_t>(of_block.end - extent.limit, 0);
    const int64_t high = std::min(keys, of_block.begin + (extent.causal ? 1 : extent.limit));
    return {ceil_div(low, block_k), high == keys ? ceil_div(keys, block_k) : high / block_k};  // the last ends early
  }
  // Key blocks that hold keys of a range of positions.
  Range blocks_of(Range keys) const {
    if (keys.empty()) return {0, 0};
    return {keys.begin / block_k, ceil_div(keys.end, block_k)};
  }
  // Key blocks of which some query of the block may attend some key.
  Range seen(int64_t b, int64_t m) const { return blocks_of(extent.keys_of(b, queries(b, m))); }
};

}  // namespace gossamer
