// A plan in plain pointers; see plan/plan.py.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "plan/extent.h"

namespace gossamer {

// Ascending numbers.
struct Row {
  const int32_t *first, *past;

  const int32_t* begin() const { return first; }
  const int32_t* end() const { return past; }
  int64_t size() const { return past - first; }
};

// Rows of ascending numbers, one behind the other.
struct Lists {
  const int64_t* indptr;
  const int32_t* indices;
  int64_t count;  // of all indices
  int64_t most;   // of a row's

  // Within the indices and no longer than a row can be, whatever the row pointers say; see plan/checks.h.
  Row row(int64_t n) const {
    const int64_t begin = std::clamp<int64_t>(indptr[n], 0, count);
    const int64_t end = std::clamp<int64_t>(indptr[n + 1], begin, count);
    return {indices + begin, indices + std::min(end, begin + most)};
  }
};

struct Plan {
  Grid grid;
  int64_t heads, query_len, key_len;
  int64_t query_blocks;  // rows of the lists of a head
  int64_t column_group;
  Lists blocks, columns;
  const int32_t* sink;
  const int32_t* window;
  const int32_t* q_order;  // null: not permuted
  const int32_t* k_order;
  bool pruned_mean = false;
  float skip = std::numeric_limits<float>::infinity();  // infinite: none

  const Extent& extent() const { return grid.extent; }
  int64_t batch() const { return grid.extent.batch; }
  bool permuted() const { return q_order != nullptr || k_order != nullptr; }

  bool skips() const { return skip < std::numeric_limits<float>::infinity(); }

  // Query blocks of a batch row that may hold live queries.
  int64_t row_blocks(int64_t b) const { return q_order != nullptr ? query_blocks : grid.row_blocks(b); }
  // What its query block m holds: live queries, counted from the first; ranks where the plan orders them.
  Range rows(int64_t b, int64_t m) const {
    if (q_order != nullptr) return {m * grid.block_q, std::min((m + 1) * grid.block_q, query_len)};
    const Range queries = grid.queries(b, m);
    const int64_t first = grid.extent.first_position(b);
    return {queries.begin - first, queries.end - first};
  }
  const int32_t* query_ranks(int64_t b, int64_t head) const { return q_order + (b * heads + head) * query_len; }
  const int32_t* key_ranks(int64_t b, int64_t head) const { return k_order + (b * heads + head) * key_len; }

  // Rows of the lists.
  int64_t column_groups() const { return ceil_div(query_blocks, column_group); }
  int64_t block_list(int64_t b, int64_t head, int64_t m) const { return (b * heads + head) * query_blocks + m; }
  int64_t column_list(int64_t b, int64_t head, int64_t m) const {
    return (b * heads + head) * column_groups() + m / column_group;
  }
};

}  // namespace gossamer
